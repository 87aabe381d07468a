"""Checkpoints: adapter, projector and delimiter tokens as safetensors with their config, and what a resume needs.

``checkpoints/last`` also holds the state of the optimizer and of the random generators; ``checkpoints/previous`` is the
one before. ``checkpoints/best``, the ``training.keep_last`` newest and the ``training.keep_best`` best
``checkpoints/step-NNNNNN`` hold weights only. Every folder has the SHA-256 of its files.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avsr.config import Config, to_yaml
from avsr.models.weights import WEIGHTS, step_checkpoints
from avsr.runtime import folders
from avsr.runtime.tensors import save_file
from avsr.training import optimizer_state
from avsr.training.optimizer_state import OptimizerState

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
GENERATORS = "generators.safetensors"


@dataclass
class Progress:
    """How far training is: finished steps, the epoch and its next step, the best validation loss."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    clipped: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    validation: float | None = None  # validation loss at this very step, where it was measured


def gather_state(engine: Any) -> dict[str, Tensor]:
    """The checkpoint's tensors on CPU, trained ones from their float32 masters. Collective: all ranks call it."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    masters = optimizer_state.masters(engine)
    state = {}
    for name, parameter in engine.module.own_state().items():
        value = masters.get(name)
        if value is None:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                value = parameter.detach().clone()
        state[name] = value.detach().float().cpu().reshape(_full_shape(parameter)).contiguous()
    return state


def save(engine: Any, config: Config, progress: Progress, *, best: bool) -> str:
    """Writes ``checkpoints/last``; if ``best``, ``checkpoints/best``; and with ``training.keep_last`` or ``keep_best``
    ``checkpoints/step-NNNNNN``, deleting those that no longer count. Collective: all ranks call it.

    Each folder is written under a temporary name and then renamed, so an interrupted save leaves the old one intact.

    Returns:
        What failed, the same on every rank, or "".
    """
    state = gather_state(engine)
    kept = optimizer_state.gather(engine)
    generators = _gather_generators()
    failure = ""
    if dist.get_rank() == 0:
        folder = Path(config.run) / "checkpoints"
        record = {**asdict(progress), **_engine_record(engine, config, kept)}
        try:
            if best:  # before "last", whose state says that this step was the best
                publish(folder / "best", state, config, asdict(progress))
            _keep_steps(folder, state, config, progress)
            part = folders.part_of(folder / "last")
            _write(part, state, config, record)
            save_file(kept.tensors, str(part / OPTIMIZER))
            save_file(generators, str(part / GENERATORS))
            folders.seal(part)
            folders.swap_in(part, folder / "last", keep=folder / "previous")
        except OSError as error:
            failure = f"cannot save a checkpoint in {folder}: {error}"
            folders.drop_parts(folder)  # they would fill the disk
    return agree(failure)


def _keep_steps(folder: Path, state: dict[str, Tensor], config: Config, progress: Progress) -> None:
    """Keeps the newest and the best of the step checkpoints, this one among them."""
    newest, best = config.training.keep_last, config.training.keep_best
    if not newest and not best:
        return
    publish(folder / f"step-{progress.step:06d}", state, config, asdict(progress))
    there = step_checkpoints(config.run)
    by_loss = sorted((path for path in there if _validation(path) is not None), key=lambda path: _validation(path) or 0)
    keep = {*(there[-newest:] if newest else []), *by_loss[:best]}
    for path in there:
        if path not in keep:
            shutil.rmtree(path)


def _validation(folder: Path) -> float | None:
    try:
        value = json.loads((folder / STATE).read_text(encoding="utf-8")).get("validation")
    except (OSError, ValueError, AttributeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def _engine_record(engine: Any, config: Config, kept: OptimizerState) -> dict[str, Any]:
    scheduler = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else {}
    version, numbers, rest = random.getstate()
    return {
        "ranks": dist.get_world_size(),
        "accumulation": config.training.accumulation,
        "optimizer": kept.scalars,
        "scheduler": {key: value for key, value in scheduler.items() if key != "lr_lambdas"},
        "random": [version, list(numbers), rest],
    }


def _gather_generators() -> dict[str, Tensor]:
    """States of torch's generators of every rank: "cpu/RANK" and "cuda/RANK", uint8."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {f"{kind}/{rank}": value for rank, part in enumerate(parts) for kind, value in part.items()}


def publish(folder: Path, state: dict[str, Tensor], config: Config, record: Mapping[str, Any]) -> None:
    """Writes a checkpoint without optimizer state atomically: ``folder`` never holds half of one.

    Args:
        folder: an earlier one is replaced.
        state: the tensors of :meth:`SpeechLLM.own_state`, on CPU.
        config: saved with them.
        record: contents of state.json; must have ``step``.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    part = folders.part_of(folder)
    _write(part, state, config, record)
    folders.seal(part)
    folders.swap_in(part, folder)


def _write(folder: Path, state: dict[str, Tensor], config: Config, record: Mapping[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt", "step": str(record["step"])})
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / STATE).write_text(json.dumps(dict(record)), encoding="utf-8")


def agree(value: str) -> str:
    """Rank 0's ``value`` on every rank."""
    message = [value]
    dist.broadcast_object_list(message, src=0)
    return str(message[0])


def _full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
