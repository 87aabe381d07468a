"""The ``triton`` backend's attention, its statistics and ACT, over the operators of :mod:`flashsink.triton.operators`.

The statistics leave the backward through ``capture``, a float32 input of shape (B, H, Sk) whose values are not read
and whose "gradient" is the attention received per key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashsink import checks, reference
from flashsink.operators import adjacent
from flashsink.triton import tiles
from flashsink.triton.patterns import PLAIN, Operands, operands
from flashsink.types import BySegment, Layout, Pattern, Segments, SinkStats, narrowed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(q: Tensor, v: Tensor | None = None, pattern: Pattern | None = None, softcap: float | None = None) -> str:
    """Why the kernels do not take these, or ""."""
    if q.dtype not in DTYPES:
        return f"its attention takes float16, bfloat16 and float32, not {q.dtype}"
    largest, wide = tiles.LARGEST_HEAD_DIM[q.element_size()], q.shape[-1] if v is None else tiles.widest(q, v)
    if wide > largest:
        return f"its attention takes head dims up to {largest} in {q.dtype}, not {wide}"
    return ""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    counted: Sequence[Tensor | None] = (),
    sink_logits: Tensor | None = None,
    pattern: Pattern | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, list[SinkStats]]:
    """:func:`flashsink.reference.attention`, differentiable once.

    Where a gradient is needed and ``counted`` has one entry, ``received`` is what the backward captures for free or,
    when it is read before, the result of the statistics pass. Otherwise the pass runs at once.
    """
    checks.require("triton", refusal(q, v, pattern, softcap))
    pattern = narrowed(pattern, layout.tokens)
    given = operands(pattern, softcap, layout)
    q, k, v = (adjacent(x) for x in (q, k, v))  # once here, else in every kernel's launcher
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink_logits))
    # a compiled graph cannot return a leaf that it creates, so there the pass runs
    shared = layout._replace(segment=known_segments(layout))  # between the kernels of this call
    pending, capture = None, None
    if trained and len(counted) == 1 and segments is None and not torch.compiler.is_compiling():
        pending = Pending(q, k, shared, causal, scale, counted[0], given)
        capture = pending.leaf()
    out, lse = torch.ops.flashsink.triton_attention(
        *(q, k, v, sink_logits, capture, layout.starts, layout.lengths, shared.segment),
        *(counted[0] if counted else None, layout.packed, causal, scale, *given),
    )
    lse = lse.detach()
    if pending is not None:
        pending.lse = lse
        return out, [SinkStats(pending, layout.queries_later(q.shape[2], causal, counted[0], pattern), lse)]
    stats = []
    options: dict[str, Any] = {"causal": causal, "scale": scale, "given": given}
    for query_starts in counted:
        seen = layout.queries_later(q.shape[2], causal, query_starts, pattern)
        if segments is None:
            received, more = run_received(q, k, lse, shared, query_starts=query_starts, **options), None
        else:
            received, more = _by_segment(q, k, lse, sink_logits, shared, segments, query_starts=query_starts, **options)
        stats.append(SinkStats(received, seen, lse, more))
    return out, stats


def _by_segment(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    sink_logits: Tensor | None,
    layout: Layout,
    segments: Segments,
    *,
    causal: bool,
    scale: float,
    query_starts: Tensor | None,
    given: Operands,
) -> tuple[Tensor, BySegment]:
    """``received`` (B, H, Sk) and the statistics by segment, in one pass."""
    n, own = segments.number, segments.of_queries(layout, q.shape[2], query_starts)
    sums, entropy = torch.ops.flashsink.triton_by_segment(
        *(q.detach(), k.detach(), lse, None if sink_logits is None else sink_logits.detach()),
        *(torch.where(own < 0, n, own), n, layout.starts, layout.lengths, layout.segment, query_starts),
        *(layout.packed, causal, scale, *given),
    )
    return sums.sum(dim=2), segments.sums(sums[:, :, :n], entropy, layout, own)


def run_received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    query_starts: Tensor | None = None,
    given: Operands = PLAIN,
) -> Tensor:
    """(B, H, Sk) float32: the statistics pass over any attention with the log-sum-exp ``lse`` (B, H, Sq)."""
    return torch.ops.flashsink.triton_received(
        *(q.detach(), k.detach(), lse.float(), layout.starts, layout.lengths, known_segments(layout), query_starts),
        *(layout.packed, causal, scale, *given),
    )


def known_segments(layout: Layout) -> Tensor | None:
    """(Sk,) int64: the packed sequence of every token, which the kernels look up; None of dense rows."""
    if not layout.packed or layout.segment is not None:
        return layout.segment
    return torch.ops.flashsink.triton_segments(layout.starts, layout.lengths, layout.tokens)


def calibrated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    layout: Layout,
    *,
    beta: float,
    scale: float,
    causal: bool = True,
    pattern: Pattern | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """:func:`flashsink.reference.calibrated_attention`: attention and its correction. ACT is a method of inference:
    where a gradient is asked for, and in packed rows, the reference runs."""
    checks.require("triton", refusal(q, v, pattern, softcap))
    leaves = (q, k, v) if sink_logits is None else (q, k, v, sink_logits)
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    if layout.packed or learning:
        options: dict[str, Any] = {"pattern": pattern, "softcap": softcap, "sink_logits": sink_logits}
        return reference.calibrated_attention(q, k, v, sinks, layout, beta=beta, scale=scale, causal=causal, **options)
    given = operands(narrowed(pattern, layout.tokens), softcap, layout)
    q, k, v = (adjacent(x) for x in (q, k, v))
    starts, lengths = layout.starts, layout.lengths
    out, lse = torch.ops.flashsink.triton_attention(
        q, k, v, sink_logits, None, starts, lengths, None, None, layout.packed, causal, scale, *given
    )
    return torch.ops.flashsink.triton_calibrate(
        q, k, v, out, lse, sink_logits, sinks, starts, lengths, causal, beta, scale, *given
    )


class Pending:
    """Received attention that is not known yet: the backward captures it, or the statistics pass computes it.

    Holds q and k until either has happened or :meth:`release` is called.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        layout: Layout,
        causal: bool,
        scale: float,
        query_starts: Tensor | None,
        given: Operands,
    ) -> None:
        self._inputs: tuple[Tensor, Tensor, Layout, bool, float, Tensor | None, Operands] | None
        self._inputs = (q.detach(), k.detach(), layout, causal, scale, query_starts, given)
        self._captured: Tensor | None = None
        self.lse: Tensor | None = None

    def leaf(self) -> Tensor:
        """(B, H, Sk) float32, the input of attention whose gradient the backward returns. Only the graph holds it,
        so nothing here outlives the graph."""
        assert self._inputs is not None
        q, k = self._inputs[:2]
        shape = (q.shape[0], q.shape[1], k.shape[2])
        capture = torch.empty(shape, dtype=torch.float32, device=q.device, requires_grad=True)
        capture.register_post_accumulate_grad_hook(self._catch)
        return capture

    def _catch(self, leaf: Tensor) -> None:
        # removed, so a second backward of the same graph does not add to it
        self._captured, leaf.grad = leaf.grad, None
        self._inputs = None

    def release(self) -> None:
        """Forgets q and k: what the backward will capture is then the only source."""
        self._inputs = None

    def __call__(self) -> Tensor:
        if self._captured is not None:
            return self._captured
        if self._inputs is None or self.lse is None:
            raise RuntimeError("received: under activation checkpointing it is known after the backward")
        q, k, layout, causal, scale, query_starts, given = self._inputs
        self._inputs = None
        options: dict[str, Any] = {"causal": causal, "scale": scale, "query_starts": query_starts, "given": given}
        return run_received(q, k, self.lse, layout, **options)
