"""Where numbers go: ``metrics.jsonl`` always, TensorBoard and W&B by config."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from avsr.config import LogConfig
from avsr.errors import UserError

logger = logging.getLogger("avsr")
DRAWN = ("ce", "decorrelation", "grad_norm", "validation_ce")  # as curves, by ``avsr analyze``


class MetricsLog:
    """Appends one JSON object a step; on ``resume_at`` drops the lines of later steps."""

    def __init__(self, run: Path, config: LogConfig, *, resume_at: int | None = None) -> None:
        self._path = run / "metrics.jsonl"
        if resume_at is None:
            self._path.unlink(missing_ok=True)
        elif self._path.is_file():
            rows = zip(_whole(self._path), read_metrics(run), strict=True)
            kept = [line for line, row in rows if row["step"] <= resume_at]
            self._path.write_text("".join(line + "\n" for line in kept))
        self._unwritten: list[str] = []
        self._writer: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"))
        self._wandb = _start_wandb(config.wandb, run) if config.wandb else None

    def write(self, row: dict[str, Any]) -> None:
        """``row`` holds ``step`` and numbers, null where one is not finite; others are written to the file alone. What
        a full disk does not take is kept and written with a later row."""
        row = {key: _finite(value) for key, value in row.items()}
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            with self._path.open("a", encoding="utf-8") as file:
                place = file.tell()
                try:
                    file.write("".join(self._unwritten))
                    file.flush()
                except OSError:
                    file.truncate(place)  # no half a line
                    raise
            self._unwritten.clear()
        except OSError as error:
            logger.error("cannot write %s: %s; its rows are kept for later", self._path, error)
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if self._writer is not None:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``, none when it has no such file.

    Raises:
        UserError: a line is not what :class:`MetricsLog` writes.
    """
    path = run / "metrics.jsonl"
    if not os.path.isfile(path):
        return []
    rows: list[dict[str, Any]] = []
    try:
        for line in _whole(path):
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("no object with a step")
            for key in ("step", *DRAWN):
                if not isinstance(row.get(key, 0), int | float | None) or abs(row.get(key) or 0) > sys.float_info.max:
                    raise ValueError(f"{key} is no number")
            rows.append(row)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {len(rows) + 1} is damaged: {error}") from error
    return rows


def _whole(path: Path) -> list[str]:
    """The lines of ``path`` without a last one that a full disk or a kill cut short."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def peak_memory_mb() -> float:
    """Largest memory of this process so far: resident on CPU, allocated on the CUDA device."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**10 if sys.platform != "darwin" else peak / 2**20


def _start_wandb(project: str, run: Path) -> ModuleType | Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb: the package wandb is not installed: pip install wandb") from error
    return wandb.init(project=project, name=run.name, dir=str(run))
