"""Checkpoints: adapter, projector and delimiters as safetensors with their config, and what a resume needs.

``checkpoints/last`` also holds the engine's optimizer state; ``checkpoints/best`` and the ``training.keep_last``
newest ``checkpoints/step-NNNNNN`` are for use alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from avsr.build import WEIGHTS, load_weights, step_checkpoints
from avsr.composing import differences
from avsr.config import Config, read_run_config, to_yaml
from avsr.errors import UserError
from avsr.models.speech_llm import SpeechLLM

STATE = "state.json"
_TAG = "engine"
# A resumed run may change these: where it lies, how it logs and decodes, and what does not change the steps.
_FREE = (
    *("run", "resume", "log.", "decode.", "data.workers", "data.cache", "data.test", "training.keep_last"),
    *("noise.snr", "act."),  # of a later evaluation
)


@dataclass
class Progress:
    """Where training stands: finished steps, the epoch and its next step, the best validation loss."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    clipped: int = 0


def gather_state(model: SpeechLLM) -> dict[str, Tensor]:
    """The checkpoint's tensors on CPU, from the float32 masters where the engine keeps some. All ranks call it."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in model.own_state().items():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is None:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                master = parameter.detach().clone()
        state[name] = master.detach().float().cpu().reshape(_full_shape(parameter)).contiguous()
    return state


def save(engine: Any, config: Config, progress: Progress, *, best: bool) -> None:
    """Writes ``checkpoints/last``, when ``best`` ``checkpoints/best``, and with ``training.keep_last``
    ``checkpoints/step-NNNNNN``, of which older ones go. All ranks call it.

    Each folder is written beside and then swapped in, so that an interrupted save leaves the old one.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    folder = Path(config.run) / "checkpoints"
    state = gather_state(engine.module)
    failure = ""
    if dist.get_rank() == 0:
        try:
            shutil.rmtree(folder / "last.part", ignore_errors=True)
            _write(folder / "last.part", state, config, asdict(progress))
        except OSError as error:
            failure = f"cannot save a checkpoint in {folder}: {error}"
    agree(failure)
    engine.save_checkpoint(str(folder / "last.part"), tag=_TAG, exclude_frozen_parameters=True)
    dist.barrier()
    if dist.get_rank() == 0:
        try:
            _swap(folder / "last.part", folder / "last")
            if best:
                publish(folder / "best", state, config, asdict(progress))
            if config.training.keep_last:
                publish(folder / f"step-{progress.step:06d}", state, config, asdict(progress))
                for old in step_checkpoints(config.run)[: -config.training.keep_last]:
                    shutil.rmtree(old)
        except OSError as error:
            failure = f"cannot save a checkpoint in {folder}: {error}"
    agree(failure)


def prepare_run(config: Config) -> None:
    """Makes the run folder. Rank 0 alone.

    Raises:
        UserError: it holds a run and ``resume`` is off, there is nothing to resume, or the config differs.
    """
    run = Path(config.run)
    saved = run / "config.yaml"
    if config.resume:
        if not (run / "checkpoints" / "last" / STATE).is_file():
            raise UserError(f"resume: {run} has no checkpoint to resume from")
        changed = [line for line in differences(config, read_run_config(run)) if not line.startswith(_FREE)]
        if changed:
            raise UserError(f"resume: the config differs from {saved} (new != saved): {'; '.join(changed)}")
    elif run.exists() and not run.is_dir() or run.is_dir() and _holds_something(run):
        raise UserError(f"run: {run} exists already; continue it with resume=true, or name another folder with run=")
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        saved.write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run: cannot write to {run}: {error}") from error


def _holds_something(run: Path) -> bool:
    """More than this function's caller leaves behind when a training is refused before its first step."""
    extra = {item.name for item in run.iterdir()} - {"config.yaml", "checkpoints"}
    return bool(extra) or (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir())


def load_progress(config: Config, model: SpeechLLM) -> Progress:
    """The progress of ``checkpoints/last``; its weights go into ``model`` (before the engine is made)."""
    folder = Path(config.run) / "checkpoints" / "last"
    load_weights(model, folder)
    try:
        return Progress(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"resume: {folder / STATE} cannot be read: {error}") from error


def load_engine(engine: Any, config: Config) -> None:
    """Optimizer and schedule of ``checkpoints/last``.

    Raises:
        UserError: it was made by another number of ranks.
    """
    folder = Path(config.run) / "checkpoints" / "last"
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
    except Exception as error:  # DeepSpeed's own exceptions have no common base
        raise UserError(
            f"resume: the optimizer state in {folder} cannot be loaded ({str(error).splitlines()[0]}); use the same "
            "number of processes and deepspeed.stage as before"
        ) from error
    if path is None:
        raise UserError(f"resume: {folder} holds no optimizer state")


def publish(folder: Path, state: dict[str, Tensor], config: Config, record: Mapping[str, Any]) -> None:
    """Writes a checkpoint without optimizer state at once: never is there half of one under the name of ``folder``.

    Args:
        folder: an earlier one is replaced.
        state: the tensors of :meth:`SpeechLLM.own_state`, on CPU.
        config: saved beside them.
        record: what state.json says; ``step`` must be in it.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    _write(part, state, config, record)
    _swap(part, folder)


def _write(folder: Path, state: dict[str, Tensor], config: Config, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt", "step": str(record["step"])})
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / STATE).write_text(json.dumps(dict(record)), encoding="utf-8")


def _swap(new: Path, place: Path) -> None:
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def agree(failure: str) -> None:
    """Raises rank 0's failure on every rank, so that none waits for another."""
    message = [failure]
    dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise UserError(message[0])


def _full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
