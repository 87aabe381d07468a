"""A step whose sums may still be computed by the device, and the row of metrics that it becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from avsr.config import Config
from avsr.runtime.transfer import Later
from avsr.training.checkpoint import Progress
from avsr.training.losses import Counts, Sums


@dataclass
class Launched:
    """Attributes:
    place: (step, epoch).
    ids: of this rank's utterances.
    counts: of all ranks.
    sums: of this rank.
    totals: summed over ranks: those of :class:`Sums`, audio seconds, tokens, and ``along``.
    norm: of the gradient; infinite if no weight was changed.
    lr: after the step.
    peak_memory_mb: after the step.
    norms: of the gradients of both terms, if asked for.
    times: "seconds" without waiting for the loader, and "wait_seconds".
    """

    place: tuple[int, int]
    ids: list[str]
    counts: Counts
    sums: Sums
    totals: Later
    norm: Later | float | None
    lr: float
    peak_memory_mb: float
    norms: dict[str, float]
    times: dict[str, float] = field(default_factory=dict)

    @property
    def along(self) -> list[float]:
        """What the host has sent along with the sums, summed over ranks."""
        numbers: list[float] = self.totals.read()
        return numbers[5:]

    def row(self, config: Config, progress: Progress) -> dict[str, Any]:
        """The metrics, "skipped" if not finite; counts in ``progress`` whether the gradient was clipped."""
        counts, weight, (step, epoch) = self.counts, config.loss.decorrelation, self.place
        ce, decorrelation, correct, audio_seconds, tokens, *_ = self.totals.read()
        norm = self.norm.read() if isinstance(self.norm, Later) else self.norm
        labels = counts.labels or math.nan
        progress.clipped += norm is not None and norm > config.training.clip
        row: dict[str, Any] = {"step": step, "epoch": epoch, "ce": ce / labels}
        if weight:
            row["decorrelation"] = decorrelation / max(counts.decorrelated, 1)
        row["loss"] = row["ce"] + weight * row.get("decorrelation", 0.0)
        row["accuracy"] = correct / labels
        row["lr"] = self.lr
        row["grad_norm"] = norm
        row["clipped_share"] = progress.clipped / step
        row["audio_seconds"], row["tokens"] = audio_seconds, int(tokens)
        if counts.lost:
            row["lost"] = counts.lost
        row["peak_memory_mb"] = self.peak_memory_mb
        row.update(self.norms)
        if not math.isfinite(row["loss"]) or norm is None or not math.isfinite(norm):
            row["skipped"] = True
        return {**row, **self.times}
