"""The training loop on tiny random parts: files, resume, interruption, loss scaling, failures."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from avsr.config import load_config
from avsr.data.batches import Batch, collate
from avsr.data.dataset import Reading, load_dataset
from avsr.errors import Interrupted, UserError
from avsr.models.build import build_model, build_store
from avsr.training.checkpoint import Progress
from avsr.training.engine import learning_rate_factor, make_engine, partitioned_loading, start_distributed
from avsr.training.metrics import MetricsLogger, read_metrics
from avsr.training.run import attach, train
from avsr.training.trainer import Trainer

Recipe = Callable[..., Path]


def run(recipe: Path, *overrides: str) -> Path:
    return train(load_config(str(recipe), list(overrides)))


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "checkpoints" / "last" / "model.safetensors"))


def test_a_run_folder_holds_what_it_promises(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{"loss.decorrelation": 1.0, "training.gradient_norms_every": 2})
    folder = run(recipe)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce"] + row["decorrelation"])
        assert {"lr", "grad_norm", "clipped_share", "seconds", "tokens", "peak_memory_mb"} <= row.keys()
        assert ("validation_ce" in row) == (row["step"] % 2 == 0)
        assert ("grad_norm_ce" in row) == (row["step"] % 2 == 0)
    for row in rows[1::2]:  # both terms' gradients add up to the whole one
        ce, decorrelation = row["grad_norm_ce"], row["grad_norm_decorrelation"]
        square = ce**2 + decorrelation**2 + 2 * ce * decorrelation * row["grad_cosine"]
        assert row["grad_norm"] == pytest.approx(square**0.5, rel=1e-3)
    assert load_config(str(folder / "config.yaml")) == load_config(str(recipe))
    for name in ("best", "last"):
        saved = folder / "checkpoints" / name
        assert (saved / "config.yaml").is_file() and (saved / "model.safetensors").is_file()
    kinds = {name.split(".")[0] for name in final_weights(folder)}
    assert kinds == {"projectors", "delimiters", "llm"}
    assert not any("embed" in name or "lm_head" in name for name in final_weights(folder))


def test_off_means_not_computed(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("computed")

    for backend in ("reference", "cpu.backend"):
        for name in ("decorrelation_sums", "rms_norm"):
            monkeypatch.setattr(f"flashsink.{backend}.{name}", refuse)
    folder = run(tiny_recipe(tmp_path, **{"loss.decorrelation": 0.0}))
    assert all("decorrelation" not in row for row in read_metrics(folder))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_works_with_other_attention(tiny_recipe: Recipe, tmp_path: Path, attention: str) -> None:
    rows = []
    for name in ("flashsink", attention):
        settings = {"model.llm.attention": name, "loss.decorrelation": 1.0, "training.steps": 2}
        rows.append(read_metrics(run(tiny_recipe(tmp_path / name, **settings))))
    for ours, theirs in zip(*rows, strict=True):
        for key in ("ce", "decorrelation", "grad_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3)


def test_an_unknown_attention_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.llm\.attention.*flash_attention_2.*'quick'"):
        run(tiny_recipe(tmp_path, **{"model.llm.attention": "quick"}))


def test_training_lowers_the_loss(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = run(tiny_recipe(tmp_path, **{"training.steps": 40, "training.learning_rate": 0.01}))
    rows = read_metrics(folder)
    assert rows[-1]["validation_ce"] < 0.9 * rows[0]["ce"]


def test_an_existing_run_is_refused_or_resumed_only_as_it_was(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    folder = run(recipe, "resume=true")  # nothing is there yet
    with pytest.raises(UserError, match="exists already.*resume=true"):
        run(recipe)
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.5 != "):
        run(recipe, "resume=true", "training.learning_rate=0.5")
    assert len(read_metrics(folder)) == 4


def test_interrupted_and_resumed_equals_uninterrupted(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"training.steps": 7, "training.accumulation": 2, "training.utterances": 2, "loss.decorrelation": 1.0}
    recipe = tiny_recipe(tmp_path, **settings)
    whole = run(recipe, f"run={tmp_path / 'whole'}")
    write = MetricsLogger.write

    def write_and_stop(self: MetricsLogger, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "write", write_and_stop)
        with pytest.raises(Interrupted):
            run(recipe, f"run={tmp_path / 'parts'}")
    parts = tmp_path / "parts"
    done = json.loads((parts / "checkpoints" / "last" / "state.json").read_text())["step"]
    assert 3 <= done < 7
    run(recipe, f"run={parts}", "resume=true")
    expected, got = read_metrics(whole), read_metrics(parts)
    assert [row["step"] for row in got] == list(range(1, 8))
    for one, other in zip(expected, got, strict=True):
        for key in ("ce", "decorrelation", "grad_norm", "lr"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)
    for name, tensor in final_weights(whole).items():
        torch.testing.assert_close(final_weights(parts)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        ["deepspeed.stage=0"],
        ["deepspeed.stage=2"],
        ["deepspeed.stage=3"],
        ["deepspeed.stage=2", "deepspeed.offload_optimizer=true"],
        ["deepspeed.stage=3", "deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true"],
    ],
)
def test_other_zero_stages_train_the_same(tiny_recipe: Recipe, tmp_path: Path, settings: list[str]) -> None:
    recipe = tiny_recipe(
        tmp_path,
        **{
            "training.accumulation": 2,
            "training.utterances": 2,
            "loss.decorrelation": 1.0,
            "model.delimiters.train": True,
        },
    )
    one = read_metrics(run(recipe, f"run={tmp_path / 'one'}"))
    other = read_metrics(run(recipe, f"run={tmp_path / 'other'}", *settings))
    for a, b in zip(one, other, strict=True):
        assert b["ce"] == pytest.approx(a["ce"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_zero_3_reads_the_language_model_in_pieces(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """No weight is whole after loading, and the delimiters' scale is that of the whole table."""
    start_distributed()
    cpu = torch.device("cpu")
    models = []
    for stage in (1, 3):
        settings = [f"deepspeed.stage={stage}", "model.delimiters.init=table"]
        config = load_config(str(tiny_recipe(tmp_path)), settings)
        store = build_store(config, cpu)
        models.append(build_model(config, store, cpu, around=partitioned_loading(config))[0])
    whole, pieces = models
    sizes = {n: p.numel() for n, p in pieces.named_parameters() if n.startswith("llm.") and not p.requires_grad}
    assert sizes and not any(sizes.values())
    assert all(p.numel() for n, p in whole.named_parameters())
    torch.testing.assert_close(pieces.delimiters, whole.delimiters)


def test_a_users_deepspeed_json_trains_the_same(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}))
    one = read_metrics(run(recipe, f"run={tmp_path / 'one'}"))
    other = read_metrics(run(recipe, f"run={tmp_path / 'other'}", f"deepspeed.config={path}"))
    assert [row["ce"] for row in other] == pytest.approx([row["ce"] for row in one], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{"loss.decorrelation": 5.0})
    one = read_metrics(run(recipe, f"run={tmp_path / 'one'}"))
    other = read_metrics(run(recipe, f"run={tmp_path / 'other'}", "training.gradient_checkpointing=true"))
    for key in ("ce", "decorrelation", "grad_norm"):
        assert [row[key] for row in other] == pytest.approx([row[key] for row in one], rel=1e-4)


@pytest.mark.parametrize("settings", [[], ["training.gradient_checkpointing=true"], ["training.utterances=1"]])
def test_packed_batches_train_as_padded_ones(
    tiny_recipe: Recipe, make_corpus: Callable[..., Path], tmp_path: Path, settings: list[str]
) -> None:
    """Utterances of unlike length, with and without the recomputation of layers, and one alone in its batch."""
    train_set = make_corpus(tmp_path / "uneven", seconds=[0.3, 0.9, 0.5, 1.4, 0.3, 0.7])
    recipe = tiny_recipe(tmp_path, **{"loss.decorrelation": 5.0, "data.train": str(train_set)})
    one = read_metrics(run(recipe, f"run={tmp_path / 'one'}", *settings))
    other = read_metrics(run(recipe, f"run={tmp_path / 'other'}", "training.packed=true", *settings))
    for key in ("ce", "decorrelation", "grad_norm"):
        assert [row[key] for row in other] == pytest.approx([row[key] for row in one], rel=1e-4)


def test_packed_batches_need_an_attention_that_keeps_them_apart(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.packed.*attention=flashsink"):
        run(tiny_recipe(tmp_path, **{"training.packed": True, "model.llm.attention": "sdpa"}))


def test_bf16_trains_and_keeps_float32_masters(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = run(tiny_recipe(tmp_path, **{"training.precision": "bf16", "loss.decorrelation": 1.0}))
    weights = final_weights(folder)["projectors.audio.0.weight"]
    assert weights.dtype == torch.float32
    assert not torch.equal(weights, weights.bfloat16().float())  # finer than bf16: the master was saved


def step_trainer(recipe: Path) -> tuple[Trainer, list[Batch], Any]:
    """A trainer with accumulation 2 and two micro-batches of 1 and 5 utterances of unlike length."""
    config = load_config(str(recipe), ["training.accumulation=2", "training.clip=1e9"])
    start_distributed()
    store = build_store(config, torch.device("cpu"))
    model, loaded = build_model(config, store, torch.device("cpu"))
    data = load_dataset(config.data.train, config.data, store, loaded.tokenize, title="train", reading=Reading("audio"))
    attach(model, config)
    engine = make_engine(model, config)
    loop = Trainer(engine, config, data, data, Progress(step=1))
    return loop, [collate([data[0]]), collate([data[i] for i in range(1, 6)])], collate([data[i] for i in range(6)])


def test_unbalanced_accumulation_gives_the_gradient_of_one_batch(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Numbers of label and of span tokens differ by a factor of five and more between the micro-batches."""
    recipe = tiny_recipe(tmp_path, **{"loss.decorrelation": 3.0})
    loop, micro, together = step_trainer(recipe)
    model = loop.model
    model.train()
    terms = model(together)
    loss = terms.cross_entropy / together.label_tokens + 3.0 * terms.decorrelation
    grads = torch.autograd.grad(loss, list(model.trainable().values()), allow_unused=True)
    norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
    row, _ = loop.step(micro)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["ce"] == pytest.approx(float(terms.cross_entropy.detach()) / together.label_tokens, rel=1e-5)
    assert row["decorrelation"] == pytest.approx(float(terms.decorrelation.detach()), rel=1e-5)


def test_validation_is_the_mean_over_its_split(tiny_recipe: Recipe, tmp_path: Path) -> None:
    loop, _, _ = step_trainer(tiny_recipe(tmp_path, **{"loss.decorrelation": 3.0}))
    row = loop.validate()
    batch = collate([loop.validation[i] for i in range(len(loop.validation))])
    with torch.no_grad():
        terms = loop.model.eval()(batch)
    assert row["validation_ce"] == pytest.approx(float(terms.cross_entropy) / batch.label_tokens, rel=1e-5)
    assert row["validation_decorrelation"] == pytest.approx(float(terms.decorrelation), rel=1e-5)
    assert row["validation_accuracy"] == pytest.approx(int(terms.correct) / batch.label_tokens)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0.0)
    assert all(later <= earlier for earlier, later in zip(factors[10:], factors[11:], strict=False))
