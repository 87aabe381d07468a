"""ACT inside an attached model: which columns of which heads are scaled."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flashsink.hf.attention import Call
from flashsink.hf.records import Calibration, Forwards, Record
from flashsink.types import Layout, SinkStats


class Calibrator:
    """Finds the sinks of chosen heads in every full forward and scales them, there and while decoding."""

    def __init__(self, forwards: Forwards, layers: int) -> None:
        self._forwards, self._layers = forwards, layers
        self.calibration: Calibration | None = None

    def choose_heads(self, heads: Iterable[tuple[int, int]], number: int, beta: float, threshold: float) -> None:
        """Raises:
        ValueError: a pair or a number out of range.
        """
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta: expected 0..1, got {beta}")
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold: expected 0 < threshold < 1, got {threshold}")
        chosen: dict[int, list[int]] = {}
        for layer, head in heads:
            if not 0 <= layer < self._layers or not 0 <= head < number:
                raise ValueError(
                    f"heads: expected layers below {self._layers} and heads below {number}, got ({layer}, {head})"
                )
            chosen.setdefault(layer, []).append(head)
        self.calibration = Calibration(chosen, beta, threshold)

    def concerns(self, index: int) -> bool:
        return self.calibration is not None and index in self.calibration.heads

    def counted(self, record: Record) -> list[Tensor | None]:
        """The groups of queries whose statistics :meth:`find` needs."""
        return [None] if record.span_ends is None else [None, record.span_ends]

    def find(self, index: int, stats: list[SinkStats], layout: Layout) -> Tensor:
        """(B, H, S) bool: the sinks of the calibrated heads, never BOS. ``stats`` counts all queries and, where the
        prompt is a span, those after it: the difference is what the prompt's own give."""
        assert self.calibration is not None
        mean = stats[0].mean_received
        if len(stats) > 1:
            queries = (stats[0].queries - stats[1].queries).clamp(min=1)
            mean = (stats[0].received - stats[1].received) / queries.unsqueeze(1)
        heads = torch.zeros(mean.shape[1], dtype=torch.bool, device=mean.device)
        heads[self.calibration.heads[index]] = True
        sinks = mean > self.calibration.threshold
        return sinks & heads[:, None] & (layout.offsets() > 0)[:, None, :]

    def apply(self, index: int, call: Call, out: Tensor, record: Record | None, backend: str | None) -> Tensor:
        """``out`` with the sinks of the prompt scaled, those of ``record`` or of this thread's last full forward."""
        calibration = self.calibration
        if calibration is None or calibration.beta == 1.0:
            return out
        record = self._forwards.mine.current if record is None else record
        if record is None and self._forwards.any_yet:
            raise RuntimeError("calibrate: the prompt ran in another thread, which knows its sinks")
        if record is None or record.calibration is not calibration or index not in record.calm:
            return out  # switched on after the prompt
        sinks = record.calm[index]
        if sinks.shape[0] != call.q.shape[0]:
            raise ValueError(f"calibrate: the prompt had {sinks.shape[0]} rows, this step has {call.q.shape[0]}")
        sinks = nn.functional.pad(sinks, (0, call.k.shape[2] - sinks.shape[2]))
        return call.calibrated(backend, sinks, calibration.beta)
