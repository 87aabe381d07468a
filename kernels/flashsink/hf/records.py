"""What a probe keeps: the record of a full forward, and what each thread that runs the model has for itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashsink.hf import masks
from flashsink.types import ActivationStats, Layout, SinkStats


@dataclass(frozen=True)
class Calibration:
    heads: dict[int, list[int]]
    beta: float
    threshold: float


@dataclass
class Record:
    """What one full forward has left behind."""

    layout: Layout
    spans: Tensor
    mask: Tensor  # the layout as every attention call gets it
    recorded: bool  # whether sinks and activations are
    trained: bool  # whether a backward may follow
    fused: bool  # whether the norms are to do their part
    given: Tensor | None  # the spans that were set
    behind: Tensor | None  # the first positions behind them, one a row or packed sequence
    calibration: Calibration | None
    calm: dict[int, Tensor] = field(default_factory=dict)  # the sinks that ACT scales, by layer
    sinks: dict[int, SinkStats] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    activations: dict[int, ActivationStats] = field(default_factory=dict)


class Mine(threading.local):
    """What every thread that runs the model has for itself. A copy of the model begins without."""

    def __init__(self) -> None:
        self.spans: Tensor | None = None
        self.current: Record | None = None  # its last full forward
        self.before: Record | None = None  # what that is again once a checkpoint's recomputation has ended
        self.again = False  # whether such a one is under way
        self.states: dict[int, Tensor] = {}
        self.inside = False
        self.full = False
        self.locked = False
        self.outer: masks.Forward | None = None  # of the decoder around this one

    def __reduce__(self) -> tuple[Any, ...]:
        return Mine, ()


class Shared:
    """What the threads have in common."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held by the thread that is inside a forward
        self.latest: Record | None = None
        self.mixed = False  # whether forwards of several threads may have a backward to come

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, ()
