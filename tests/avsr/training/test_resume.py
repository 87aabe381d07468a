"""A training that ends anywhere continues as if it had not: bit for bit, from whole checkpoints only."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from avsr.errors import EXIT_PREEMPTED, UserError
from avsr.models.build import load_run
from avsr.runtime import folders
from avsr.training import checkpoint
from avsr.training.metrics import read_metrics
from avsr.training.trainer import Trainer

pytestmark = pytest.mark.integration
Recipe = Callable[..., Path]
Run = Callable[..., Path]
# dropout makes the generators' states count; a warm-up makes the schedule's
SETTINGS = {
    "training.steps": 7,
    "training.utterances": 2,
    "training.warmup": 3,
    "model.lora.dropout": 0.2,
    "loss.decorrelation": 1.0,
    "model.delimiters.train": True,
}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("resume"), **SETTINGS)


@pytest.fixture(scope="module")
def whole(recipe: Path, run: Run) -> Path:
    """All steps without an interruption; the checkpoint before the last is that of step 6."""
    return run(recipe)


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, to be damaged."""
    return shutil.copytree(whole, tmp_path / "parts")


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("stage", "precision", "number"),
    [
        (0, "fp32", signal.SIGTERM),
        (3, "fp32", signal.SIGTERM),
        (1, "bf16", signal.SIGTERM),
        (2, "bf16", signal.SIGINT),
        *(
            pytest.param(*p, signal.SIGTERM, marks=pytest.mark.slow)
            for p in ((1, "fp32"), (2, "fp32"), (0, "bf16"), (3, "bf16"))
        ),
    ],
)
def test_a_resumed_training_is_the_uninterrupted_one_bit_by_bit(
    recipe: Path,
    run: Run,
    stop: Callable[..., int],
    identical: Callable[..., None],
    weights: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    stage: int,
    precision: str,
    number: int,
) -> None:
    settings = [f"deepspeed.stage={stage}", f"training.precision={precision}", f"training.accumulation={1 + stage % 2}"]
    one = run(recipe, f"run={tmp_path / 'one'}", *settings)
    stop(3, recipe, f"run={tmp_path / 'parts'}", *settings, number=number)
    identical(one, run(recipe, f"run={tmp_path / 'parts'}", "resume=true", *settings))
    if precision == "bf16":  # what is saved is the float32 master, finer than bf16
        saved = weights(one)["projectors.audio.0.weight"]
        assert saved.dtype == torch.float32 and not torch.equal(saved, saved.bfloat16().float())


@pytest.mark.parametrize(
    "changes",
    [
        ["deepspeed.stage=0", "loss.cross_entropy=chunked"],
        ["deepspeed.stage=3", "training.gradient_checkpointing=selective"],
    ],
    ids=str,
)
def test_what_changes_no_step_may_change(
    recipe: Path, whole: Path, parts: Path, run: Run, agree: Callable[..., float], changes: list[str]
) -> None:
    """The state of every parameter is saved by its name, not in the pieces of a stage."""
    spoil(parts / "checkpoints" / "last" / "optimizer.safetensors")
    run(recipe, f"run={parts}", "resume=true", *changes)
    agree(whole, parts, "ce", "grad_norm", "lr", rel=1e-5, rtol=1e-4, atol=1e-6)


def test_a_damaged_checkpoint_is_never_chosen(
    recipe: Path,
    whole: Path,
    parts: Path,
    run: Run,
    identical: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoints = parts / "checkpoints"
    (checkpoints / "last.part").mkdir()
    spoil(checkpoints / "last" / "optimizer.safetensors")
    run(recipe, f"run={parts}", "resume=true")
    assert "optimizer.safetensors is damaged" in caplog.text
    identical(whole, parts)
    for name in ("last", "previous"):
        spoil(checkpoints / name / "state.json")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole: .*state\.json is damaged.*state\.json is dam"):
        run(recipe, f"run={parts}", "resume=true")
    spoil(checkpoints / "best" / "model.safetensors")
    with pytest.raises(UserError, match=r"best/model\.safetensors is damaged"):
        load_run(parts, [], torch.device("cpu"))


@pytest.mark.parametrize("file", ["optimizer.safetensors", "model.safetensors"])
def test_a_state_that_is_not_finite_is_refused(recipe: Path, parts: Path, run: Run, file: str) -> None:
    """Even where its sums are right."""
    folder = parts / "checkpoints" / "last"
    state = load_file(str(folder / file))
    name = sorted(state)[-1]
    state[name].view(-1)[0] = math.nan
    save_file(state, str(folder / file))
    folders.seal(folder)
    with pytest.raises(UserError, match=rf"last/{file}: {re.escape(name)} has values that are not finite"):
        run(recipe, f"run={parts}", "resume=true")


def test_a_run_is_continued_only_as_it_was(
    recipe: Path, whole: Path, parts: Path, run: Run, identical: Callable[..., None]
) -> None:
    with pytest.raises(UserError, match="exists already.*resume=true"):
        run(recipe, f"run={parts}")
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.5 != "):
        run(recipe, f"run={parts}", "resume=true", "training.learning_rate=0.5")
    with pytest.raises(UserError, match=r"1 ranks x training.accumulation = 1, now .* 1 x 2.* training.accumulation=1"):
        run(recipe, f"run={parts}", "resume=true", "training.accumulation=2")
    run(recipe, f"run={parts}", "resume=true")  # it has finished and stays as it is
    identical(whole, parts)


def test_a_run_goes_on_for_more_steps_along_the_longer_cosine(
    recipe: Path, parts: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = []
    step = Trainer.step

    def watch(self: Trainer, batches: Any) -> Any:
        used.append(self.engine.optimizer.param_groups[0]["lr"])
        return step(self, batches)

    def cosine(done: int, steps: int) -> float:
        return 1e-3 * 0.5 * (1 + math.cos(math.pi * (done - 3) / (steps - 3)))

    done = read_metrics(parts)[-1]["step"]
    with pytest.raises(UserError, match=rf"training\.steps = 1, but the run has {done} steps already"):
        run(recipe, f"run={parts}", "resume=true", "training.steps=1")
    monkeypatch.setattr(Trainer, "step", watch)
    run(recipe, f"run={parts}", "resume=true", "training.steps=9")
    assert [row["step"] for row in read_metrics(parts)] == list(range(1, 10))
    assert used == pytest.approx([cosine(n, 9) for n in range(done, 9)])
    old, new = cosine(done, 7), cosine(done, 9)
    assert f"steps = 9 instead of 7: the schedule ends there: the learning rate after step {done} is" in caplog.text
    assert f"{new:.3g} instead of {old:.3g}" in caplog.text


def test_a_resumed_run_needs_the_lines_of_its_manifest(recipe: Path, parts: Path, run: Run, tmp_path: Path) -> None:
    lines = (recipe.parent / "corpus" / "train" / "manifest.jsonl").read_text().splitlines()
    shorter = recipe.parent / "corpus" / "train" / "shorter.jsonl"
    shorter.write_text("\n".join(lines[:-1]) + "\n")
    config = parts / "config.yaml"
    config.write_text(config.read_text().replace("train/manifest.jsonl", "train/shorter.jsonl"))
    with pytest.raises(UserError, match=r"^resume: .*shorter\.jsonl lacks 1 utterances .* \(u007\); restore"):
        run(recipe, f"run={parts}", "resume=true", f"data.train={shorter}")


def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot save a checkpoint.*No space left.*resume=true repeats it"):
        run(tiny_recipe(tmp_path))


def test_the_best_and_the_newest_steps_are_kept(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr(Trainer, "validate", lambda self: {"validation_ce": next(losses)})
    settings = {"training.steps": 6, "training.validate_every": 1, "training.keep_last": 1, "training.keep_best": 2}
    folder = run(tiny_recipe(tmp_path, **settings))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["best", "last", "previous", "step-000002", "step-000003", "step-000006"]
    for name in kept:
        assert folders.damage(folder / "checkpoints" / name) == ""
    assert json.loads((folder / "checkpoints/best/state.json").read_text())["step"] == 2


KILLER = """
    import os, signal, sys
    from avsr.runtime import folders
    from avsr.training import checkpoint
    from avsr.cli import main

    point, count, recipe = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    number = signal.SIGTERM if point == "stop" else signal.SIGKILL
    calls = [0]

    def dying(real, after):
        def call(*args, **kwargs):
            calls[0] += point != "rename" or os.path.isdir(args[0])  # of checkpoints, not of files
            if calls[0] == count and not after:
                os.kill(os.getpid(), number)
            result = real(*args, **kwargs)
            if calls[0] == count:
                os.kill(os.getpid(), number)
            return result
        return call

    if point == "write":
        checkpoint.save_file = dying(checkpoint.save_file, after=True)
    elif point == "seal":
        folders.seal = dying(folders.seal, after=False)
    elif point == "rename":
        os.replace = dying(os.replace, after=True)
    elif point in ("step", "stop"):
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


def finish(tmp_path: Path, recipe: Path) -> None:
    done = start(tmp_path, "never", 0, recipe, f"run={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "run").rglob("*.part")) and not (tmp_path / "run" / ".lock").exists()


def test_killed_in_a_save_and_then_told_to_stop_nothing_is_lost(
    recipe: Path, whole: Path, identical: Callable[..., None], tmp_path: Path
) -> None:
    """Killed between the two renames that replace the last checkpoint; then SIGTERM, with a status of its own."""
    checkpoints = tmp_path / "run" / "checkpoints"
    done = start(tmp_path, "rename", 5, recipe, f"run={tmp_path / 'run'}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (checkpoints / "previous").is_dir() and not (checkpoints / "last").exists()
    done = start(tmp_path, "stop", 2, recipe, f"run={tmp_path / 'run'}")
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert "a checkpoint is written" in done.stderr and "Traceback" not in done.stderr
    reached = json.loads((checkpoints / "last" / "state.json").read_text())["step"]
    assert 4 <= reached < 7 and reached == read_metrics(tmp_path / "run")[-1]["step"]
    finish(tmp_path, recipe)
    identical(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times_nothing_is_lost(
    tiny_recipe: Recipe, run: Run, identical: Callable[..., None], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, **{**SETTINGS, "training.steps": 24, "training.keep_last": 2})
    points = [("step", 1), ("write", 1), ("seal", 2), ("rename", 3), ("step", 5)]
    points += [("rename", 5), ("write", 9), ("rename", 6), ("seal", 5), ("rename", 7)]
    for point, count in points:
        done = start(tmp_path, point, count, recipe, f"run={tmp_path / 'run'}")
        assert done.returncode == -signal.SIGKILL, (point, count, done.stderr)
    finish(tmp_path, recipe)
    identical(run(recipe, f"run={tmp_path / 'whole'}"), tmp_path / "run")
