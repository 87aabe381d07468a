"""A training that ends anywhere goes on as if it had not: bit by bit, from whole checkpoints alone."""

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
from avsr.errors import EXIT_PREEMPTED, Interrupted, UserError
from avsr.models.build import load_run
from avsr.runtime import folders
from avsr.training import checkpoint
from avsr.training.metrics import MetricsLogger, read_metrics
from avsr.training.run import train

Recipe = Callable[..., Path]
NUMBERS = ("step", "epoch", "ce", "decorrelation", "grad_norm", "lr", "validation_ce")
# dropout makes the generators' states count; a warm-up makes the schedule's
SETTINGS = {
    "training.steps": 7,
    "training.utterances": 2,
    "training.warmup": 3,
    "model.lora.dropout": 0.2,
    "loss.decorrelation": 1.0,
    "model.delimiters.train": True,
}


def run(recipe: Path, *overrides: str) -> Path:
    return train(load_config(str(recipe), list(overrides)))


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(str(run / "checkpoints" / name / "model.safetensors"))


def curve(run: Path) -> list[list[Any]]:
    return [[row.get(key) for key in NUMBERS] for row in read_metrics(run)]


def same(one: Path, other: Path) -> None:
    assert curve(other) == curve(one)
    for name, tensor in weights(one).items():
        assert torch.equal(weights(other)[name], tensor), name


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    write = MetricsLogger.write

    def write_and_stop(self: MetricsLogger, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == step:
            signal.raise_signal(number)

    monkeypatch.setattr(MetricsLogger, "write", write_and_stop)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        (3, "fp32"),
        (1, "bf16"),
        (2, "bf16"),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, "fp32"), (2, "fp32"), (0, "bf16"), (3, "bf16"))),
    ],
)
def test_a_resumed_training_is_the_uninterrupted_one_bit_by_bit(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    settings = {"deepspeed.stage": stage, "training.precision": precision, "training.accumulation": 1 + stage % 2}
    recipe = tiny_recipe(tmp_path, **SETTINGS, **settings)
    whole = run(recipe, f"run={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Interrupted):
            run(recipe, f"run={tmp_path / 'parts'}")
    assert 3 <= len(read_metrics(tmp_path / "parts")) < 7
    run(recipe, f"run={tmp_path / 'parts'}", "resume=true")
    same(whole, tmp_path / "parts")


def test_another_stage_goes_on_in_the_same_way(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """The state of every parameter is saved by its name, not in the pieces of a stage."""
    recipe = tiny_recipe(tmp_path, **SETTINGS)
    whole = run(recipe, f"run={tmp_path / 'whole'}")
    for stage in (0, 3):
        parts = tmp_path / f"parts{stage}"
        run(recipe, f"run={parts}")
        spoil(parts / "checkpoints" / "last" / "optimizer.safetensors")
        run(recipe, f"run={parts}", "resume=true", f"deepspeed.stage={stage}")
        for one, other in zip(read_metrics(whole), read_metrics(parts), strict=True):
            for key in ("ce", "grad_norm", "lr"):
                assert other[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-4, atol=1e-6)


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 255
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_never_chosen(
    tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(tmp_path, **SETTINGS)
    whole = run(recipe, f"run={tmp_path / 'whole'}")
    run(recipe, f"run={tmp_path / 'parts'}")
    checkpoints = tmp_path / "parts" / "checkpoints"
    (checkpoints / "last.part").mkdir()
    spoil(checkpoints / "last" / "optimizer.safetensors")
    run(recipe, f"run={tmp_path / 'parts'}", "resume=true")
    assert "optimizer.safetensors is damaged" in caplog.text
    same(whole, tmp_path / "parts")
    for name in ("last", "previous"):
        spoil(checkpoints / name / "state.json")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole: .*state\.json is damaged.*state\.json is dam"):
        run(recipe, f"run={tmp_path / 'parts'}", "resume=true")


def test_a_damaged_checkpoint_is_not_evaluated(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = run(tiny_recipe(tmp_path))
    spoil(folder / "checkpoints" / "best" / "model.safetensors")
    with pytest.raises(UserError, match=r"best/model\.safetensors is damaged"):
        load_run(folder, [], torch.device("cpu"))


def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Full at step 4 alone: the save of step 6 is whole again."""
    recipe = tiny_recipe(tmp_path, **SETTINGS)
    real = checkpoint.save_file

    def full(tensors: Any, path: str, **kwargs: Any) -> None:
        if read_metrics(tmp_path / "run")[-1]["step"] == 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    seen = []
    save = checkpoint.save

    def watch(*args: Any, **kwargs: Any) -> str:
        failure = save(*args, **kwargs)
        state = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())
        seen.append((args[2].step, state["step"], bool(failure)))
        assert not list((tmp_path / "run/checkpoints").glob("*.part"))
        return failure

    monkeypatch.setattr(checkpoint, "save", watch)
    run(recipe)
    assert seen == [(2, 2, False), (4, 2, True), (6, 6, False), (7, 7, False)]
    assert "No space left on device; training goes on, the old checkpoint stays" in caplog.text


def test_a_full_disk_at_the_end_is_an_error(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot save a checkpoint.*No space left.*resume=true repeats it"):
        run(tiny_recipe(tmp_path))


def test_a_finished_run_stays_as_it_is(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """resume=true may stand in every start."""
    recipe = tiny_recipe(tmp_path)
    folder = run(recipe)
    before = [weights(folder), read_metrics(folder)]
    run(recipe, "resume=true")
    assert read_metrics(folder) == before[1]
    assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in before[0].items())


def test_the_best_and_the_newest_steps_are_kept(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avsr.training.trainer import Trainer

    losses = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr(Trainer, "validate", lambda self: {"validation_ce": next(losses)})
    settings = {"training.steps": 6, "training.validate_every": 1, "training.keep_last": 1, "training.keep_best": 2}
    folder = run(tiny_recipe(tmp_path, **settings))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["best", "last", "previous", "step-000002", "step-000003", "step-000006"]
    for name in kept:
        assert folders.damage(folder / "checkpoints" / name) == ""
    assert json.loads((folder / "checkpoints/best/state.json").read_text())["step"] == 2


def test_what_a_full_disk_did_not_take_is_logged_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from avsr.config import LogConfig

    log = MetricsLogger(tmp_path, LogConfig(tensorboard=False))
    log.write({"step": 1, "ce": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.rename(tmp_path / "kept")
    path.mkdir()  # cannot be opened
    log.write({"step": 2, "ce": 0.9})
    path.rmdir()
    (tmp_path / "kept").rename(path)
    log.write({"step": 3, "ce": 0.8})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_resume_on_ranks_that_do_not_fit_names_the_way_out(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{"training.utterances": 2, "training.accumulation": 2})
    run(recipe)
    with pytest.raises(UserError, match=r"1 ranks x training.accumulation = 2, now .* 1 x 1.* training.accumulation=2"):
        run(recipe, "resume=true", "training.accumulation=1")


KILLER = """
    import os, signal, sys
    from avsr.runtime import folders
    from avsr.training import checkpoint
    from avsr.cli import main

    point, count, recipe = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    calls = [0]

    def dying(real, after):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    if point == "write":
        checkpoint.save_file = dying(checkpoint.save_file, after=True)
    elif point == "seal":
        folders.seal = dying(folders.seal, after=False)
    elif point == "rename":
        os.replace = dying(os.replace, after=True)
    elif point == "step":
        from avsr.training.trainer import Trainer
        Trainer.step = dying(Trainer.step, after=True)
    main(["train", recipe, "resume=true", *sys.argv[4:]])
"""


def start(tmp_path: Path, point: str, count: int, recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "killer.py"
    script.write_text(textwrap.dedent(KILLER))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), point, str(count), str(recipe), *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


def kills(tmp_path: Path, recipe: Path, *points: tuple[str, int]) -> None:
    """The run of the recipe, killed at each of the points in turn and then left alone, against one left alone."""
    whole = run(recipe, f"run={tmp_path / 'whole'}")
    for point, count in points:
        done = start(tmp_path, point, count, recipe)
        assert done.returncode == -signal.SIGKILL, (point, count, done.stderr)
    done = start(tmp_path, "never", 0, recipe)
    assert done.returncode == 0, done.stderr
    same(whole, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.part")) and not (tmp_path / "run" / ".lock").exists()


def test_killed_at_a_step_and_in_a_save_nothing_is_lost(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """The third rename of a training with its config is the one between both names of the last checkpoint."""
    kills(tmp_path, tiny_recipe(tmp_path, **SETTINGS), ("step", 3), ("rename", 5))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times_nothing_is_lost(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{**SETTINGS, "training.steps": 24, "training.keep_last": 2})
    points = [("step", 1), ("write", 1), ("seal", 2), ("rename", 4), ("step", 5)]
    points += [("rename", 7), ("write", 9), ("rename", 8), ("seal", 5), ("rename", 11)]
    kills(tmp_path, recipe, *points)


def test_sigterm_saves_and_ends_with_its_own_status(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{**SETTINGS, "training.steps": 5000, "training.validate_every": 5000})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "avsr.cli", "train", str(recipe)], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        while not read_metrics(tmp_path / "run"):
            assert process.poll() is None
        process.terminate()
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == EXIT_PREEMPTED, err
    assert "a checkpoint is written" in err and "Traceback" not in err
    state = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())
    assert 0 < state["step"] == read_metrics(tmp_path / "run")[-1]["step"]
