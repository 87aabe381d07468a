"""What a probe keeps: one record a full forward, and which thread is inside a forward.

Threads may take turns with a model. Each reads what its own last forward left; a backward that runs layers again
(checkpointing) finds the record of its forward in whatever thread autograd chose.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashsink import reference
from flashsink.hf.nonfinite import Finiteness
from flashsink.hf.spans import Choice, Given
from flashsink.types import ActivationStats, Layout, Pairs, Segments, SinkStats


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`flashsink.attach`."""

    attention: bool
    decorrelation: bool
    activations: bool
    margin: float
    stats_every: int
    median: bool
    queries: str
    validate: bool
    backend: str | None
    learned_sinks: bool
    cosines: bool
    nonfinite: bool
    segment_mass: bool


@dataclass(frozen=True)
class Calibration:
    heads: dict[int, list[int]]
    beta: float
    threshold: float


@dataclass
class Record:
    """What one full forward recorded. Its layout is known when the first mask is made, or the first layer runs."""

    recorded: bool  # whether sinks and activations are
    trained: bool  # whether a backward may follow
    fused: bool  # whether norms may observe the layers' outputs
    given: Given | None  # the spans and anchors that were set
    calibration: Calibration | None
    layers: int
    finiteness: Finiteness
    layout: Layout | None = None
    spans: Tensor | None = None
    pairs: Pairs | None = None  # of the loss, where it counts other tokens or anchors than lengths and BOS say
    calm: dict[int, Tensor] = field(default_factory=dict)  # the sinks that ACT scales, by layer
    sinks: dict[int, SinkStats] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    activations: dict[int, ActivationStats] = field(default_factory=dict)
    cosines: dict[int, Tensor] = field(default_factory=dict)
    read_by: dict[int, int] = field(default_factory=dict)  # norm -> the layer whose output it observed
    ran: set[int] = field(default_factory=set)  # layers
    padding: Tensor | None = None  # the 2-D mask of the call
    positions: Tensor | None = None  # the position ids of the call, and
    bounds: tuple[Tensor, Tensor] | None = None  # of its packed sequences, and the positions, where no other mask is
    cached: bool = False  # whether it has a cache
    packs: bool = True  # whether the model may pack rows by them
    attended: bool = False  # whether a layer has called attention
    ended: bool = False
    _kinds: Segments | None = None
    anchored: bool = True  # whether the first token of a row is its BOS: attention is causal
    doubts: list[tuple[Tensor, str]] = field(default_factory=list)  # (bool: this must not be, why), read when read

    def settle(self, layout: Layout, validate: bool) -> None:
        """Makes the layout known.

        Raises:
            ValueError: the spans that were set do not fit.
        """
        if self.layout is not None:
            return
        self.spans = layout.lengths
        if self.given is not None:
            self.spans, self.pairs = self.given.settle(layout, self.layers, validate)
        self.layout = layout

    def pack(self, bounds: Any, inputs: Tensor) -> bool:
        """Whether ``bounds`` (N + 1,) of packed sequences are known for the row ``inputs``, beside its positions."""
        positions = self.positions
        if not isinstance(bounds, Tensor) or positions is None or positions.shape != inputs.shape[:2]:
            return False
        if len(inputs) != 1 or self.cached:
            return False
        self.bounds = (bounds, positions)
        return True

    @property
    def places(self) -> tuple[Layout, Tensor]:
        """(layout, spans), which every layer of the forward finds settled."""
        if self.layout is None or self.spans is None:
            raise RuntimeError("model: a layer ran before the decoder said which tokens are valid")
        return self.layout, self.spans

    @property
    def count(self) -> Tensor:
        """int64 scalar: what the loss is a mean over."""
        return reference.decorrelation_count(self.places[1]) if self.pairs is None else self.pairs.counts.sum()

    def loss(self, generates: bool) -> Tensor:
        """The decorrelation loss; ``generates``: whether the model has a BOS however it attends.

        Raises:
            RuntimeError: no layer counts, or no anchor is known.
        """
        if not self.losses:
            raise RuntimeError("decorrelation_loss: expected a model of two layers or more that run, got one")
        self._require_anchor("decorrelation_loss", generates)
        parts = [self.losses[i].to(torch.float32) for i in sorted(self.losses)]
        total = torch.stack([part.to(parts[0].device) for part in parts]).mean()
        return self.poison(total / self.count.to(total.device).clamp(min=1))

    def stacked_cosines(self, generates: bool) -> Tensor:
        """(L-1, B, S) float32; errors as :meth:`loss` and :meth:`check` have them."""
        self.check()
        self._require_anchor("cosines", generates)
        parts = [self.cosines[i] for i in sorted(self.cosines)]
        if not parts or len(parts) < self.layers - 1:
            raise RuntimeError("cosines: expected two layers or more that run, in a forward that stats_every records")
        return torch.stack([part.to(parts[0].device) for part in parts])

    def _require_anchor(self, name: str, generates: bool) -> None:
        named = self.given is not None and self.given.names_anchors
        if not named and not self.anchored and not generates:
            raise RuntimeError(f"{name}: attention is not causal, so the first token is no BOS; expected anchors=")

    @property
    def segment_masks(self) -> dict[str, Tensor]:
        """(B, S) bool of the valid tokens of every segment."""
        valid = self.places[0].valid()
        masks = {} if self.given is None else self.given.masks
        return {name: mask.to(valid.device) & valid for name, mask in masks.items()}

    @property
    def kinds(self) -> Segments | None:
        """The segments of the statistics."""
        if self._kinds is None and self.given is not None:
            self._kinds = self.given.kinds(self.places[0])
        return self._kinds

    def query_starts(self, queries: str) -> Tensor | None:
        """The positions from which queries count, or None for all."""
        layout, spans = self.places
        return layout.starts + spans if queries == "after_span" else None

    @property
    def span_ends(self) -> Tensor | None:
        """The first positions after the spans that were set, one a row or packed sequence."""
        if self.given is None or self.given.spans is None:
            return None
        layout, spans = self.places
        return layout.starts + spans

    def poison(self, x: Tensor) -> Tensor:
        """``x``, or NaN where a doubt turns out to be right. A sum, which keeps nothing for the backward: a layer that
        is checkpointed must keep as much when it runs again, and then nobody doubts."""
        if not self.doubts:
            return x
        wrong = torch.stack([wrong.to(x.device) for wrong, _ in self.doubts]).any()
        return x + torch.where(wrong, torch.nan, 0.0).to(x.dtype)

    def check(self) -> None:
        """Raises:
        ValueError: the forward was not one that flashsink computes.
        """
        for wrong, why in self.doubts:
            if bool(wrong):
                raise ValueError(why + ("; the outputs of that forward are NaN" if self.attended else ""))


class _Mine(threading.local):
    """What each thread that runs the model keeps to itself. A copy of the model starts without."""

    def __init__(self) -> None:
        self.spans: Choice | None = None
        self.ids: list[tuple[Any, Tensor | None]] = []  # of the modules around the decoder that run, outermost first
        self.current: Record | None = None  # its last full forward
        self.before: Record | None = None  # what to restore when a checkpoint's recomputation ends
        self.again = False  # whether such a recomputation is running
        self.inside = False
        self.full = False
        self.locked = False
        self.outer: Any = None  # who asked for masks before this forward
        self.waiting: Any = None  # the layer's output that a norm may read next
        self.states: dict[int, Tensor] = {}  # outputs that no norm has read, for the loss

    def __reduce__(self) -> tuple[Any, ...]:
        return _Mine, ()


class _Shared:
    """What the threads have in common."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held by the thread that is inside a forward
        self.latest: Record | None = None
        self.mixed = False  # whether forwards of several threads may still have a backward

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shared, ()


class Forwards:
    """The forwards of one attached model."""

    def __init__(self) -> None:
        self.mine, self._shared = _Mine(), _Shared()

    @property
    def live(self) -> Record | None:
        """The record of the full forward that this thread is inside."""
        return self.mine.current if self.mine.inside and self.mine.full else None

    @property
    def any_yet(self) -> bool:
        """Whether any thread has had a full forward."""
        return self._shared.latest is not None

    def enter(self) -> None:
        """Raises:
        RuntimeError: another thread is inside a forward.
        """
        mine = self.mine
        if not mine.inside:  # else an interrupt has left the forward before
            # nothing of a compiled forward is seen by other threads before its end, and then only what is its own
            if not torch.compiler.is_compiling():
                if not self._shared.lock.acquire(blocking=False):
                    raise RuntimeError(
                        "model: another thread is inside a forward of this attached model; expected one at a time, "
                        "or a copy of the model for every thread"
                    )
                mine.locked = True
            mine.inside = True
        mine.waiting, mine.states = None, {}

    def keep(self, record: Record) -> None:
        """Makes ``record`` this thread's last full forward; for the length of a recomputation only where it is one."""
        mine, shared = self.mine, self._shared
        if in_backward():
            mine.before, mine.again = mine.current, True
        else:
            last = shared.latest
            another = last is not None and last is not mine.current and last.trained and record.trained
            shared.mixed = shared.mixed or another
            shared.latest = record
        mine.current = record

    def leave(self) -> Record | None:
        """The record of the full forward that ends here; None for a step of decoding."""
        mine = self.mine
        record = mine.current if mine.full else None
        mine.inside, mine.waiting, mine.states = False, None, {}
        if mine.locked:
            mine.locked = False
            self._shared.lock.release()
        if mine.again:
            mine.current, mine.before, mine.again = mine.before, None, False
        return record

    def recalled(self) -> Record | None:
        """The forward whose layers are recomputed: the last one, whatever thread autograd does it in.

        Raises:
            RuntimeError: several threads have trained the model, and this is none of them.
        """
        if not self._shared.mixed:
            return self._shared.latest
        if self.mine.current is None:
            raise RuntimeError(
                "model: a thread of autograd recomputes its layers and cannot tell for which forward, since several "
                "threads have trained it; expected one, or a copy of the model for every thread"
            )
        return self.mine.current


def in_backward() -> bool:
    """Whether this is computed again for a checkpoint; a compiler computes nothing now."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
