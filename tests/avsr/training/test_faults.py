"""Numbers that are not finite, dead loader processes, memory that gives out, ranks that hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from avsr.config import load_config
from avsr.data.dataset import SpeechDataset
from avsr.errors import EXIT_HUNG, UserError
from avsr.models.speech_llm import SpeechLLM
from avsr.training import trainer
from avsr.training.metrics import read_metrics
from avsr.training.run import train

Recipe = Callable[..., Path]


def run(recipe: Path, *overrides: str) -> Path:
    return train(load_config(str(recipe), list(overrides)))


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int, gradient_alone: bool = False) -> None:
    """Makes the loss of these steps NaN, or, of finite loss, its gradient infinite."""
    real, calls = trainer.scaled, [0]

    def broken(*args: Any) -> Any:
        cross_entropy, decorrelation = real(*args)
        calls[0] += 1
        if calls[0] not in steps:
            return cross_entropy, decorrelation
        if gradient_alone:
            cross_entropy.register_hook(lambda grad: grad * float("inf"))
            return cross_entropy, decorrelation
        return cross_entropy * float("nan"), decorrelation

    monkeypatch.setattr(trainer, "scaled", broken)


@pytest.mark.parametrize("gradient_alone", [False, True])
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    precision: str,
    gradient_alone: bool,
) -> None:
    settings = {"deepspeed.stage": stage, "training.precision": precision, "training.validate_every": 1}
    recipe = tiny_recipe(tmp_path, **settings, **{"training.keep_last": 4, "training.warmup": 2})
    clean = read_metrics(run(recipe, f"run={tmp_path / 'clean'}"))
    poison(monkeypatch, 3, gradient_alone=gradient_alone)
    rows = read_metrics(folder := run(recipe))
    assert [row["lr"] for row in rows] == [row["lr"] for row in clean]
    assert [row.get("skipped", False) for row in rows] == [False, False, True, False]
    assert rows[2]["grad_norm"] is None and rows[2]["validation_ce"] == rows[1]["validation_ce"]
    saved = [load_file(str(folder / f"checkpoints/step-{step:06d}/model.safetensors")) for step in (2, 3, 4)]
    for name, tensor in saved[0].items():
        assert torch.equal(saved[1][name], tensor), name
    assert any(not torch.equal(saved[2][name], tensor) for name, tensor in saved[0].items())
    assert all(tensor.isfinite().all() for tensor in saved[2].values())
    (entry,) = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert entry["step"] == 3 and len(entry["ranks"][0]["utterances"]) == 4


def test_too_many_steps_that_are_not_finite_end_the_training(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2, 4)
    with pytest.raises(UserError, match=r"step 4 is not finite; utterances: u\d+, .*2 steps so far, .* = 1; all"):
        run(tiny_recipe(tmp_path, **{"training.skip_nonfinite": 1}))
    assert len((tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()) == 2


def test_a_dead_loader_process_ends_with_what_to_do(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_lack_of_memory_ends_with_the_peak_by_part_and_what_helps(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


HANGING = """
    import sys, time
    from avsr.models.speech_llm import SpeechLLM
    from avsr.cli import main

    real = SpeechLLM.forward
    calls = [0]

    def sleepy(self, batch):
        calls[0] += self.training
        if calls[0] == 3:
            time.sleep(600)
        return real(self, batch)

    SpeechLLM.forward = sleepy
    main(["train", sys.argv[1], "training.timeout=2"])
"""


def test_a_hanging_rank_is_named_with_its_stage_and_ended(tiny_recipe: Recipe, tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(textwrap.dedent(HANGING))
    command = [sys.executable, str(script), str(tiny_recipe(tmp_path, **{"training.validate_every": 100}))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == EXIT_HUNG, done.stderr
    assert "rank 0 hangs in forward of step 3 for " in done.stderr
    assert "in sleepy" in done.stderr  # where it stands


def test_a_validation_that_is_not_finite_is_never_the_best_and_stops_no_resume(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
