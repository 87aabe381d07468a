"""The training loop on tiny random parts: its files and numbers, and settings that must not change the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avsr.config import load_config
from avsr.data.batches import Batch, BatchSampler, Lost, collate
from avsr.data.dataset import Reading, load_dataset
from avsr.data.manifest import Utterance
from avsr.errors import UserError
from avsr.models.build import build_model, build_store
from avsr.training.checkpoint import Progress
from avsr.training.engine import learning_rate_factor, make_engine, partitioned_loading, start_distributed
from avsr.training.feed import feed
from avsr.training.losses import attach
from avsr.training.metrics import read_metrics
from avsr.training.trainer import Trainer

pytestmark = pytest.mark.integration

Recipe = Callable[..., Path]
Run = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_recipe: Recipe, make_corpus: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two micro-batches per step of utterances of different lengths; the longest is alone in its micro-batch."""
    folder = tmp_path_factory.mktemp("base")
    settings = {
        "data.train": str(make_corpus(folder / "uneven", seconds=[0.3, 0.9, 0.5, 1.8, 0.3, 0.7])),
        "training.accumulation": 2,
        "training.utterances": 2,
        "training.frames": 100,
        "training.gradient_norms_every": 2,
        "loss.decorrelation": 5.0,
        "model.delimiters.train": True,
    }
    return tiny_recipe(folder, **settings)


@pytest.fixture(scope="module")
def trained(base: Path, run: Run) -> Path:
    return run(base)


def test_a_run_folder_holds_what_it_promises(base: Path, trained: Path, weights: Callable[..., Any]) -> None:
    rows = read_metrics(trained)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce"] + 5.0 * row["decorrelation"])
        assert {"lr", "grad_norm", "clipped_share", "seconds", "tokens", "peak_memory_mb"} <= row.keys()
        assert ("validation_ce" in row) == (row["step"] % 2 == 0)
        assert ("grad_norm_ce" in row) == (row["step"] % 2 == 0)
    for row in rows[1::2]:  # both terms' gradients add up to the whole one
        ce, decorrelation = row["grad_norm_ce"], row["grad_norm_decorrelation"]
        square = ce**2 + decorrelation**2 + 2 * ce * decorrelation * row["grad_cosine"]
        assert row["grad_norm"] == pytest.approx(square**0.5, rel=1e-3)
    assert load_config(str(trained / "config.yaml")) == load_config(str(base))
    for name in ("best", "last"):
        saved = trained / "checkpoints" / name
        assert (saved / "config.yaml").is_file() and (saved / "model.safetensors").is_file()
    assert {name.split(".")[0] for name in weights(trained)} == {"projectors", "delimiters", "llm"}
    assert not any("embed" in name or "lm_head" in name for name in weights(trained))


NO_NORMS = "training.gradient_norms_every=0"


@pytest.mark.parametrize(
    ("settings", "rel"),
    [
        (["deepspeed.stage=0", "model.llm.attention=sdpa"], 1e-3),
        (["model.llm.attention=eager"], 1e-3),
        (["deepspeed.stage=2", "loss.cross_entropy=chunked"], 1e-4),
        (["deepspeed.stage=3", "loss.cross_entropy=chunked", NO_NORMS], 1e-4),
        (["deepspeed.stage=3", "training.gradient_checkpointing=selective", NO_NORMS], 1e-4),
        (["deepspeed.stage=2", "deepspeed.offload_optimizer=true"], 1e-4),
        (
            ["deepspeed.stage=3", "deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true", NO_NORMS],
            1e-4,
        ),
        (["deepspeed.config=ds.json", "training.gradient_checkpointing=selective", NO_NORMS], 1e-4),
        (["training.packed=true"], 1e-4),
        (["training.packed=true", "training.gradient_checkpointing=true", NO_NORMS], 1e-4),
    ],
    ids=str,
)
def test_settings_that_change_no_number(
    base: Path, trained: Path, run: Run, tmp_path: Path, settings: list[str], rel: float
) -> None:
    """ZeRO stages and a user's own JSON, ways of attention and of the loss, recomputation and packing."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}))
    other = run(base, f"run={tmp_path / 'run'}", *(text.replace("ds.json", str(path)) for text in settings))
    for one, two in zip(read_metrics(trained), read_metrics(other), strict=True):
        norms = [key for key in one if key.startswith("grad_norm_") and NO_NORMS not in settings]
        assert two["accuracy"] == one["accuracy"]
        for key in ("ce", "decorrelation", "grad_norm", *norms):
            assert two[key] == pytest.approx(one[key], rel=rel), (one["step"], key)


def test_no_decorrelation_means_that_it_is_not_computed_and_training_lowers_the_loss(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("computed")

    for backend in ("reference", "cpu.backend"):
        for name in ("decorrelation_sums", "rms_norm"):
            monkeypatch.setattr(f"flashsink.{backend}.{name}", refuse)
    settings = {"loss.decorrelation": 0.0, "training.steps": 30, "training.learning_rate": 0.01}
    rows = read_metrics(run(tiny_recipe(tmp_path, **settings, **{"training.validate_every": 30})))
    assert all("decorrelation" not in row for row in rows)
    assert rows[-1]["validation_ce"] < 0.9 * rows[0]["ce"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.llm.attention": "quick"}, r"model\.llm\.attention.*flash_attention_2.*'quick'"),
        ({"training.packed": True, "model.llm.attention": "sdpa"}, r"training\.packed.*attention=flashsink"),
    ],
)
def test_attention_that_does_not_work_is_refused(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tiny_recipe(tmp_path, **settings))


def test_zero_3_reads_the_language_model_in_pieces(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """No weight is whole after loading, and the delimiters' scale is that of the whole table."""
    start_distributed()
    models = []
    for stage in (1, 3):
        settings = [f"deepspeed.stage={stage}", "model.delimiters.init=table"]
        config = load_config(str(tiny_recipe(tmp_path)), settings)
        models.append(build_model(config, build_store(config, CPU), CPU, around=partitioned_loading(config))[0])
    whole, pieces = models
    sizes = {n: p.numel() for n, p in pieces.named_parameters() if n.startswith("llm.") and not p.requires_grad}
    assert sizes and not any(sizes.values())
    assert all(p.numel() for n, p in whole.named_parameters())
    torch.testing.assert_close(pieces.delimiters, whole.delimiters)


@pytest.fixture
def prepared(tiny_recipe: Recipe, tmp_path: Path) -> tuple[Trainer, list[Batch], Batch]:
    """A trainer with accumulation 2, two micro-batches of 1 and 5 utterances, and one batch of all six."""
    config = load_config(
        str(tiny_recipe(tmp_path, **{"loss.decorrelation": 3.0})), ["training.accumulation=2", "training.clip=1e9"]
    )
    start_distributed()
    store = build_store(config, CPU)
    model, loaded = build_model(config, store, CPU)
    data = load_dataset(config.data.train, config.data, store, loaded.tokenize, title="train", reading=Reading("audio"))
    attach(model, config)
    loop = Trainer(make_engine(model, config), config, data, data, Progress(step=1))
    return loop, [collate([data[0]]), collate([data[i] for i in range(1, 6)])], collate([data[i] for i in range(6)])


def test_unbalanced_accumulation_gives_the_gradient_of_one_batch(prepared: tuple[Trainer, list[Batch], Batch]) -> None:
    """Numbers of label and of span tokens differ by a factor of five and more between the micro-batches."""
    loop, micro, together = prepared
    model = loop.model
    model.train()
    terms = model(together)
    loss = terms.cross_entropy / together.label_tokens + 3.0 * terms.decorrelation
    grads = torch.autograd.grad(loss, list(model.trainable().values()), allow_unused=True)
    norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
    row = loop.row(loop.step(loop.data(micro)))
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["ce"] == pytest.approx(float(terms.cross_entropy.detach()) / together.label_tokens, rel=1e-5)
    assert row["decorrelation"] == pytest.approx(float(terms.decorrelation.detach()), rel=1e-5)


def test_validation_is_the_mean_over_its_split(prepared: tuple[Trainer, list[Batch], Batch]) -> None:
    loop, _, _ = prepared
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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_makes_no_step_ends_those_before_it_whole(workers: int) -> None:
    """Loader processes look ahead."""
    sizes = np.array([18, 48, 30, 32, 22, 26, 52, 47])
    whole = [BatchSampler(sizes, 120, 4, seed) for seed in range(1000)]
    counts = [[len(sampler.epoch_steps(epoch, 0)) for epoch in range(2)] for sampler in whole]
    sampler = replace(whole[counts.index([4, 3])], accumulation=4)
    clip = Utterance("u", Path("u.wav"), "text", 1.0)
    data: Any = {(index, 0): Lost(clip, "audio", "") for index in range(len(sizes))}
    steps = feed(data, sampler, 0, Progress(), workers=workers)
    place, batches = next(steps)
    assert len(batches) == 4 and place == (1, 0, 1)
    with pytest.raises(UserError, match="make 3 batches, but one step"):
        next(steps)
