"""``avsr average RUN``: the mean of a run's newest checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from avsr.config import read_run_config
from avsr.config.composing import differences
from avsr.errors import UserError
from avsr.models.weights import WEIGHTS, checkpoint_shapes, step_checkpoints
from avsr.runtime.locks import claim
from avsr.runtime.tensors import read_file
from avsr.training.checkpoint import publish

NAME = "average"


def average(run: str | Path, last: int = 0) -> Path:
    """Writes ``checkpoints/average``: the float32 mean of the newest ``last`` of ``checkpoints/step-NNNNNN``.

    Its state.json names the steps under ``averaged``.

    Args:
        run: a run folder.
        last: how many; 0 takes all.

    Returns:
        The folder written.

    Raises:
        UserError: fewer than two checkpoints, a damaged one, two that do not belong together, or another process writes
            there.
    """
    run = Path(run)
    read_run_config(run)
    folders = step_checkpoints(run)
    for path in sorted((run / "checkpoints").glob("step-*")):
        if path.name.removeprefix("step-").isdecimal() and path not in folders:
            raise UserError(f"{path} has no {WEIGHTS}: restore it, or delete the folder to average the others")
    if last < 0 or last == 1:
        raise UserError(f"--last: expected at least 2, got {last}")
    if len(folders) < max(last, 2):
        there = f"{run / 'checkpoints'} has {len(folders)} of step-NNNNNN"
        raise UserError(f"{there}, expected at least {max(last, 2)}; train with training.keep_last=N to keep N of them")
    folders = folders[-last:] if last else folders
    with claim(run / "checkpoints", NAME):
        return _write(run / "checkpoints" / NAME, folders)


def _write(target: Path, folders: list[Path]) -> Path:
    _check(folders)
    mean: dict[str, Tensor] = {}
    for folder in folders:
        for name, tensor in read_file(folder / WEIGHTS).items():
            mean[name] = mean.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    state = {name: (total / len(folders)).float() for name, total in mean.items()}
    steps = [int(folder.name.removeprefix("step-")) for folder in folders]
    try:
        publish(target, state, read_run_config(folders[-1]), {"step": steps[-1], "averaged": steps})
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error
    return target


def _check(folders: list[Path]) -> None:
    """Refuses checkpoints that differ from the newest in the name or shape of a tensor or in the model's config."""
    newest = folders[-1]
    expected, config = checkpoint_shapes(newest), read_run_config(newest).model
    for folder in folders[:-1]:
        shapes = checkpoint_shapes(folder)
        for name in sorted(expected.keys() | shapes.keys()):
            if shapes.get(name) != expected.get(name):
                ours, theirs = (found.get(name, "missing") for found in (shapes, expected))
                raise UserError(f"{folder} and {newest} do not belong together: {name} is {ours} and {theirs}")
        changed = differences(read_run_config(folder).model, config, "model.")
        if changed:
            raise UserError(f"{folder} and {newest} have different configs: {', '.join(changed)}")
