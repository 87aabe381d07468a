"""avsr plan: closed forms against what a training holds, as torch's profiler and the engine say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from avsr.cli import main
from avsr.config import load_config
from avsr.models.build import build_model, build_store
from avsr.tools.estimate.memory import largest, read_sizes
from avsr.tools.estimate.planning import plan
from avsr.tools.estimate.profiling import profile

pytestmark = pytest.mark.integration

Recipe = Callable[..., Path]


@pytest.fixture(scope="session")
def wide_llm(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path) -> Path:
    """Large enough that weights and states outweigh what every step needs besides."""
    folder = tmp_path_factory.mktemp("wide_llm")
    for path in tiny_llm.glob("tok*"):
        (folder / path.name).write_bytes(path.read_bytes())
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    ends = {"vocab_size": 4000, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"training.precision": "bf16", "deepspeed.stage": 1}, marks=pytest.mark.slow),
        pytest.param({"training.precision": "bf16", "deepspeed.stage": 3}, marks=pytest.mark.slow),
        {"training.precision": "fp32", "deepspeed.stage": 2, "model.lora.targets": ["q_proj", "o_proj", "down_proj"]},
        pytest.param(
            {"training.precision": "bf16", "deepspeed.stage": 0, "training.gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
        {"training.precision": "bf16", "training.gradient_checkpointing": "selective", "loss.cross_entropy": "chunked"},
        pytest.param(
            {"training.precision": "fp32", "deepspeed.stage": 0, "training.packed": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_planned_is_what_a_step_holds(
    tiny_recipe: Recipe, wide_llm: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    recipe = tiny_recipe(
        tmp_path, **options, **{"model.llm.name": str(wide_llm), "loss.decorrelation": 1.0, "training.frames": 400}
    )
    result = profile(load_config(str(recipe)), 1)
    planned, found = result["planned, MB"], result["memory, MB"]
    for name in ("frozen weights", "optimizer"):
        assert planned[name] == pytest.approx(found[name], rel=0.01), name
    # under ZeRO-3 autograd keeps more than the inputs of its linear layers
    rel = 0.2 if options.get("deepspeed.stage") == 3 else 0.1
    assert planned["activations"] == pytest.approx(found["activations"], rel=rel, abs=0.15)
    # where the head is small it is a layer's gradients, which are only roughly counted
    rel = 0.25 if "loss.cross_entropy" in options else 0.1
    assert planned["head or layer"] == pytest.approx(found["head or layer"], rel=rel)


def test_an_outline_counts_what_the_model_has(tiny_recipe: Recipe, tmp_path: Path) -> None:
    config = load_config(str(tiny_recipe(tmp_path)))
    planned = plan(config, 4, 1e9)
    cpu = torch.device("cpu")
    model, _ = build_model(config, build_store(config, cpu), cpu)
    projectors = sum(p.numel() for p in model.projectors.parameters())
    assert planned["sizes"] == read_sizes(model.decoder.config, model.llm, config.model.lora, projectors, 0)
    assert planned["sizes"].trained == sum(p.numel() for p in model.trainable().values())


def test_stages_and_ranks_share_out_what_they_should(tiny_recipe: Recipe, tmp_path: Path) -> None:
    config = load_config(str(tiny_recipe(tmp_path)))
    one, eight = (plan(config, ranks, 1e9)["stages"] for ranks in (1, 8))
    assert [eight[s]["optimizer"] for s in range(4)] == [one[0]["optimizer"]] + [one[1]["optimizer"] / 8] * 3
    assert [eight[s]["frozen weights"] == one[s]["frozen weights"] for s in range(4)] == [True, True, True, False]
    assert eight[3]["frozen weights"] == one[3]["frozen weights"] / 8
    assert eight[2]["gradients"] < eight[1]["gradients"] == one[1]["gradients"]
    assert all(stages[s]["activations"] == one[0]["activations"] for stages in (one, eight) for s in range(3))
    assert one[3]["activations"] == eight[3]["activations"] > one[0]["activations"]


def test_the_frames_that_fit_fill_the_memory(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """The plan of the largest budget stays below the limit, one more frame does not, and none fits in too little."""
    recipe = str(tiny_recipe(tmp_path, **{"training.utterances": 1000}))
    room = plan(load_config(recipe, ["training.frames=130"]), 1, 1e9)["stages"][1]["total"] / 0.9
    frames = int(plan(load_config(recipe), 1, room)["stages"][1]["frames"])
    assert frames >= 130

    def total(budget: int) -> float:
        return plan(load_config(recipe, [f"training.frames={budget}"]), 1, 1e9)["stages"][1]["total"]

    assert total(frames) <= 0.9 * room < total(frames + 1)
    assert plan(load_config(recipe), 1, 1000.0)["stages"][1]["frames"] == 0


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 10**7))
def test_largest_is_the_last_that_fits(start: int, last: int) -> None:
    assert largest(lambda n: n <= last, start) == (last if start <= last else 0)


def test_a_plan_of_a_corpus_that_is_not_there_says_what_it_assumes(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, **{"data.train": str(tmp_path / "none.jsonl"), "training.frames": 2000})
    main(["plan", str(recipe), "--ranks", "2", "--memory", "80"])
    shown = capsys.readouterr().out
    assert "assumed" in shown and "2 ranks, 76,294 MB" in shown and "activations" in shown
    assert not (tmp_path / "run").exists()


def test_a_plan_refuses_in_one_line(tiny_recipe: Recipe, tmp_path: Path, refuse: Callable[..., str]) -> None:
    recipe = tiny_recipe(tmp_path)
    assert "training.frames" in refuse("plan", recipe, "training.frames=1")
    assert "model.llm.name" in refuse("plan", recipe, f"model.llm.name={tmp_path}")
    assert "--ranks" in refuse("plan", recipe, "--ranks=0")
