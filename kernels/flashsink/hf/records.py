"""What a probe keeps: the record of a full forward, and what each thread that runs the model keeps to itself."""

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
    """What one full forward recorded."""

    layout: Layout
    spans: Tensor
    mask: Tensor  # the layout as every attention call gets it
    recorded: bool  # whether sinks and activations are
    trained: bool  # whether a backward may follow
    fused: bool  # whether norms observe the layers' outputs
    given: Tensor | None  # the spans that were set
    span_ends: Tensor | None  # the first positions after them, one per row or packed sequence
    calibration: Calibration | None
    calm: dict[int, Tensor] = field(default_factory=dict)  # the sinks that ACT scales, by layer
    sinks: dict[int, SinkStats] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    activations: dict[int, ActivationStats] = field(default_factory=dict)


class Mine(threading.local):
    """What each thread that runs the model keeps to itself. A copy of the model starts without."""

    def __init__(self) -> None:
        self.spans: Tensor | None = None
        self.current: Record | None = None  # its last full forward
        self.before: Record | None = None  # what to restore when a checkpoint's recomputation ends
        self.again = False  # whether such a recomputation is running
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
        self.mixed = False  # whether forwards of several threads may still have a backward

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, ()
