"""Faults during training: vanished clips, nonfinite losses or gradients, lack of memory, dead loader processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from avsr.config import Config
from avsr.data.batches import Lost
from avsr.errors import UserError, visible
from avsr.runtime.machine import lacks_memory
from avsr.runtime.rows import append_row, read_rows
from avsr.training.checkpoint import Progress
from avsr.training.memory import measured

logger = logging.getLogger("avsr")


class Nonfinite:
    """Counts the steps of a run that were skipped because their loss or gradient was not finite, and writes their
    utterances to ``nonfinite.jsonl``; after more than ``most`` of them training ends."""

    def __init__(self, run: Path, most: int) -> None:
        self._path, self._most = run / "nonfinite.jsonl", most

    def add(self, progress: Progress, step: int, ids: Sequence[str], sums: Tensor) -> None:
        """Collective. Counts ``step`` as skipped; ``ids`` of its utterances and ``sums`` are those of this rank.

        Raises:
            UserError: more than ``training.skip_nonfinite`` steps were skipped.
        """
        own = {"rank": dist.get_rank(), "finite": bool(sums.isfinite().all()), "utterances": list(ids)}
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        progress.skipped += 1
        # a nonfinite gradient of a finite loss cannot be attributed to one rank
        guilty = [part for part in parts if not part["finite"]] or parts
        names = (
            ", ".join(visible(name) for part in guilty for name in part["utterances"]) or "none, all its clips are lost"
        )
        if dist.get_rank() == 0:
            _append(self._path, {"step": step, "ranks": guilty})
            logger.warning("step %d is skipped: its loss or gradient is not finite (%s)", step, names)
        if progress.skipped > self._most:
            raise UserError(
                f"the loss or gradient of step {step} is not finite; utterances: {names}; {progress.skipped} "
                f"steps so far, training.skip_nonfinite = {self._most}; all are in {self._path}"
            )


class LostClips:
    """Reports every utterance that a run has lost once: in a warning and as a line of ``lost.jsonl``."""

    def __init__(self, run: Path) -> None:
        self._path = run / "lost.jsonl"
        self._known: set[str] = set()

    def add(self, step: int, lost: Sequence[Lost]) -> None:
        """Collective: every rank calls it with its own as soon as any has lost an utterance."""
        own = [(item.utterance.id, item.utterance.where, item.reason) for item in lost]
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        if dist.get_rank():
            return
        written = {row["where"] for row in read_rows(self._path, lambda row: hash(row["where"]))}
        for name, where, reason in (row for part in parts for row in part):
            place = where or name
            if place in self._known:
                continue
            self._known.add(place)
            logger.warning("%s is left out wherever it cannot be read, now in step %d: %s", visible(name), step, reason)
            if place not in written:  # by an earlier run of this folder
                _append(self._path, {"step": step, "id": name, "where": place, "reason": reason})


def _append(path: Path, entry: dict[str, Any]) -> None:
    try:
        append_row(path, entry)
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error)


@contextmanager
def explained(engine: Any, config: Config, progress: Progress) -> Iterator[None]:
    """Turns out-of-memory errors and dead loader processes into messages that say what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if "DataLoader worker" in text:
            raise UserError(
                f"a loader process died at step {progress.step} ({text.splitlines()[0]}): most often the kernel killed "
                f"it for lack of memory; set data.workers lower than {config.data.workers}, then continue with "
                "resume=true"
            ) from error
        if "shared memory" in text or "torch_shm" in text or "</torch_" in text:
            raise UserError(
                f"the loader processes lack shared memory at step {progress.step} ({text.splitlines()[-1]}): enlarge "
                "/dev/shm (docker run --shm-size=8g), or set data.workers=0; then continue with resume=true"
            ) from error
        if not lacks_memory(error):
            raise
        cause = (text.splitlines() or [type(error).__name__])[0]
        raise UserError(_out_of_memory(engine, config, progress, cause)) from error


def _out_of_memory(engine: Any, config: Config, progress: Progress, cause: str) -> str:
    parts = ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in measured(engine).items())
    training = config.training
    ways = [f"training.frames={training.frames // 2} training.accumulation={training.accumulation * 2}"]
    if training.gradient_checkpointing != "true":
        ways.append("training.gradient_checkpointing=true")
    if config.loss.cross_entropy == "plain":
        ways.append("loss.cross_entropy=chunked")
    if config.deepspeed.stage < 3:
        ways.append("deepspeed.stage=3 (with several ranks, or with deepspeed.offload_parameters=true)")
    return (
        f"out of memory in step {progress.step} on rank {dist.get_rank()} ({cause}); in use: {parts}. What helps: "
        f"{'; '.join(ways)}. The first changes the batches and needs a new run, the others go with resume=true"
    )
