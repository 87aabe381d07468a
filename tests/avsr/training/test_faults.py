"""Numbers that are not finite, dead loader processes, memory that runs out."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from avsr.config import Config, load_config
from avsr.data.dataset import SpeechDataset
from avsr.errors import Interrupted, UserError
from avsr.models.speech_llm import SpeechLLM
from avsr.training import checkpoint, trainer
from avsr.training.checkpoint import Progress
from avsr.training.engine import learning_rate_factor
from avsr.training.faults import explained
from avsr.training.metrics import read_metrics
from avsr.training.run import train
from avsr.training.trainer import Trainer

pytestmark = pytest.mark.integration
Recipe = Callable[..., Path]
Run = Callable[..., Path]


def poison(monkeypatch: pytest.MonkeyPatch, losses: Sequence[int], gradients: Sequence[int] = ()) -> None:
    """Makes the loss of some steps NaN, and in others, whose loss stays finite, the gradient infinite."""
    real, calls = trainer.scaled, itertools.count(1)

    def broken(*args: Any) -> Any:
        cross_entropy, decorrelation = real(*args)
        step = next(calls)
        if step in gradients:
            cross_entropy.register_hook(lambda grad: grad * float("inf"))
        return cross_entropy * float("nan") if step in losses else cross_entropy, decorrelation

    monkeypatch.setattr(trainer, "scaled", broken)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        (2, "bf16"),
        (3, "fp32"),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, "fp32"), (0, "bf16"))),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_the_schedule_goes_on(
    tiny_recipe: Recipe,
    run: Run,
    weights: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    precision: str,
) -> None:
    """In step 3 the loss, in step 5 the gradient alone."""
    settings = {"deepspeed.stage": stage, "training.precision": precision, "training.validate_every": 1}
    recipe = tiny_recipe(tmp_path, **settings, **{"training.steps": 6, "training.keep_last": 6, "training.warmup": 2})
    poison(monkeypatch, losses=[3], gradients=[5])
    rows = read_metrics(folder := run(recipe))
    rate = load_config(str(recipe)).training.learning_rate
    assert [row["lr"] for row in rows] == pytest.approx([rate * learning_rate_factor(n, 6, 2) for n in range(1, 7)])
    assert [row.get("skipped", False) for row in rows] == [False, False, True, False, True, False]
    saved = [weights(folder, f"step-{step:06d}") for step in range(1, 7)]
    for step in (2, 3, 4, 5, 6):
        unchanged = [torch.equal(saved[step - 1][name], tensor) for name, tensor in saved[step - 2].items()]
        assert all(unchanged) == (step in (3, 5)), step
        assert all(tensor.isfinite().all() for tensor in saved[step - 1].values())
    for step in (3, 5):
        before, row = rows[step - 2 : step]
        assert row["grad_norm"] is None and row["validation_ce"] == before["validation_ce"]
    entries = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [3, 5]
    assert all(len(entry["ranks"][0]["utterances"]) == 4 for entry in entries)


def test_too_many_steps_that_are_not_finite_end_the_training(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, losses=[2, 4])
    with pytest.raises(UserError, match=r"step 4 is not finite; utterances: u\d+, .*2 steps so far, .* = 1; all"):
        run(tiny_recipe(tmp_path, **{"training.skip_nonfinite": 1}))
    assert len((tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("fault", ["data", "forward"])
def test_a_fault_in_the_third_step_leaves_the_rows_of_two(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Its data is read during the second step, whose row is written during the third."""
    owner: Any = SpeechDataset if fault == "data" else SpeechLLM
    name = "__getitem__" if fault == "data" else "forward"
    real, calls = getattr(owner, name), itertools.count(1)

    def broken(self: Any, given: Any) -> Any:
        if next(calls) == 3:
            raise UserError("broken")
        return real(self, given)

    monkeypatch.setattr(owner, name, broken)
    settings = {"training.utterances": 1, "training.validate_every": 100}
    with pytest.raises(UserError, match="broken"):
        run(tiny_recipe(tmp_path, **settings))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and all(row["seconds"] > 0 for row in rows)


def test_a_dead_loader_process_ends_with_what_to_do(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SpeechDataset.__getitem__

    def die(self: SpeechDataset, key: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key)

    monkeypatch.setattr(SpeechDataset, "__getitem__", die)
    with pytest.raises(
        UserError, match=r"a loader process died .*DataLoader worker.*data\.workers lower than 1.*resume=true"
    ):
        run(tiny_recipe(tmp_path, **{"data.workers": 1}))


def test_without_shared_memory_the_loader_says_what_to_do(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As multiprocessing fails where /dev/shm is full."""

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    with pytest.raises(UserError, match=r"data\.workers = 1: cannot start .*No space left.*/dev/shm.*data\.workers=0"):
        run(tiny_recipe(tmp_path, **{"data.workers": 1}))


def test_a_batch_that_finds_no_shared_memory_says_what_to_do() -> None:
    error = RuntimeError("unable to open shared memory object </torch_12_34_0> in read-write mode: Too many open files")
    with (
        pytest.raises(UserError, match=r"step 3 .*</torch_12_34_0>.*/dev/shm.*data\.workers=0"),
        explained(None, Config(), Progress(step=3)),
    ):
        raise error


@pytest.mark.parametrize("during", ["validate", "save"])
def test_a_signal_during_validation_or_a_save_takes_no_further_step(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    owner: Any = Trainer if during == "validate" else checkpoint
    real = getattr(owner, during)

    def told(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, during, told)
    with pytest.raises(Interrupted) as caught:
        train(load_config(str(tiny_recipe(tmp_path))))
    assert caught.value.number == signal.SIGTERM
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())["step"] == 2


def test_lack_of_memory_without_a_word_is_explained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avsr.training.faults.measured", lambda engine: {})
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with (
        pytest.raises(UserError, match=r"step 3 on rank 0 \(MemoryError\)"),
        explained(None, Config(), Progress(step=3)),
    ):
        raise MemoryError


def test_lack_of_memory_ends_with_the_peak_by_part_and_what_helps(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SpeechLLM.forward

    def greedy(self: SpeechLLM, batch: Any) -> Any:
        if self.training:
            torch.empty(1 << 60)
        return real(self, batch)

    monkeypatch.setattr(SpeechLLM, "forward", greedy)
    with pytest.raises(UserError) as caught:
        run(tiny_recipe(tmp_path))
    message = str(caught.value)
    assert "out of memory in step 1 on rank 0" in message and "frozen weights" in message
    for way in (
        "training.frames=60 training.accumulation=2",
        "training.gradient_checkpointing=true",
        "loss.cross_entropy=chunked",
        "deepspeed.stage=3",
    ):
        assert way in message


def test_a_validation_that_is_not_finite_is_never_the_best_and_stops_no_resume(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([float("nan"), 3.0, float("inf"), 2.0])
    monkeypatch.setattr(trainer.Trainer, "validate", lambda self: {"validation_ce": next(found)})
    recipe = tiny_recipe(tmp_path, **{"training.steps": 3, "training.validate_every": 1})
    folder = run(recipe)
    best = folder / "checkpoints" / "best" / "state.json"
    assert json.loads(best.read_text())["step"] == 2
    assert [row["validation_ce"] for row in read_metrics(folder)] == [None, 3.0, None]
    (folder / "checkpoints" / "last" / "state.json").unlink()  # the one before is of step 2
    run(recipe, "resume=true")
    assert json.loads(best.read_text())["step"] == 3
    assert [row["validation_ce"] for row in read_metrics(folder)] == [None, 3.0, 2.0]
