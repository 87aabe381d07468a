"""Metrics of a run: ``metrics.jsonl`` always, TensorBoard and W&B by config."""

from __future__ import annotations

import importlib
import io
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avsr.config import LogConfig
from avsr.errors import UserError
from avsr.runtime.folders import append, write_durably
from avsr.runtime.rows import Row, as_lines, read_rows

logger = logging.getLogger("avsr")
METRICS = "metrics.jsonl"
DRAWN = ("ce", "decorrelation", "grad_norm", "validation_ce")  # as curves, by ``avsr analyze``


class MetricsLogger:
    """Appends one JSON object per step; with ``resume_at``, first drops the rows of later steps."""

    def __init__(self, run: Path, config: LogConfig, *, resume_at: int | None = None) -> None:
        self._path = run / METRICS
        if resume_at is None:
            self._path.unlink(missing_ok=True)
        elif self._path.is_file():
            kept = as_lines(row for row in read_metrics(run) if row["step"] <= resume_at)
            try:
                write_durably(self._path, kept)
            except OSError as error:
                raise UserError(f"resume: cannot write {self._path}: {error}") from error
        self._unwritten: list[str] = []
        self._writers: dict[str, Any] = {}
        if config.tensorboard:
            self._start("TensorBoard", lambda: _TensorBoard(run / "tensorboard"))
        if config.wandb:
            try:
                importlib.import_module("wandb")
            except ImportError as error:
                raise UserError("log.wandb: the package wandb is not installed: pip install wandb") from error
            self._start("W&B", lambda: _Wandb(str(config.wandb), run))

    def write(self, row: dict[str, Any]) -> None:
        """Writes ``step`` and the numbers of ``row``, null where not finite; other values go to the file only. Rows
        that a full disk refuses are kept and written with a later one."""
        row = {key: _finite(value) for key, value in row.items()}
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            append(self._path, "".join(self._unwritten).encode())
            self._unwritten.clear()
        except OSError as error:
            logger.error("cannot write %s: %s; its rows are kept for later", self._path, error)
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        for name, writer in list(self._writers.items()):
            with self._spared(name):
                writer.write(numbers, row["step"])

    def close(self) -> None:
        for name, writer in list(self._writers.items()):
            with self._spared(name):
                writer.close()
        self._writers.clear()

    def _start(self, name: str, make: Callable[[], Any]) -> None:
        with self._spared(name):
            self._writers[name] = make()

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """A writer that fails, for whatever reason, is reported once and dropped: training continues."""
        try:
            yield
        except Exception as error:
            self._writers.pop(name, None)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("%s gets no more of the metrics, which are all in %s: %s", name, self._path, reason)


class _TensorBoard:
    """An event file, written synchronously: torch's SummaryWriter uses a thread, which a full disk kills with a
    traceback."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
        self._path = folder / name
        self._add(file_version="brain.Event:2")

    def write(self, numbers: dict[str, float], step: int) -> None:
        values = [{"tag": key, "simple_value": value} for key, value in numbers.items()]
        self._add(step=step, summary={"value": values})

    def close(self) -> None:
        """Nothing to do: every event is written at once."""

    def _add(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        append(self._path, record.getvalue())


class _Wandb:
    def __init__(self, project: str, run: Path) -> None:
        import wandb

        self._run = wandb.init(project=project, name=run.name, dir=str(run))

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run: Path) -> list[Row]:
    """The rows of a run's ``metrics.jsonl``; none if there is no such file. Lines that are not what
    :class:`MetricsLogger` writes are left out, with a message.

    Raises:
        UserError: the file cannot be read.
    """
    return read_rows(run / METRICS, _check)


def _check(row: Row) -> None:
    """Raises ValueError for what cannot be drawn."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("no object with a step")
    for key in ("step", *DRAWN):
        if not isinstance(row.get(key, 0), int | float | None) or abs(row.get(key) or 0) > sys.float_info.max:
            raise ValueError(f"{key} is no number")


def peak_memory_mb() -> float:
    """Peak memory of this process in MiB: resident on CPU, allocated on a CUDA device."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**10 if sys.platform != "darwin" else peak / 2**20
