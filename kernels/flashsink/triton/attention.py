"""Attention, its statistics and ACT as ``torch.library`` operators over the Triton kernels, and their use.

Operators (the same code for CUDA tensors and, under TRITON_INTERPRET=1, for CPU tensors):
``triton_attention`` with its backward, ``triton_received`` and ``triton_calibrate``.

A way out of the backward for the sink statistics: ``capture``, a float32 input of shape (B, H, Sk) whose values
nobody reads and whose "gradient" is the attention received per key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashsink import reference
from flashsink.triton import tiles
from flashsink.triton.attention_backward import backward
from flashsink.triton.attention_forward import forward
from flashsink.triton.calibrate import calibrate
from flashsink.triton.launch import adjacent
from flashsink.triton.received import received as statistics_pass
from flashsink.types import Layout, SinkStats

CAPTURED_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(q: Tensor) -> str:
    """Why the kernels do not take q, or ""."""
    if q.dtype not in DTYPES:
        return f"its attention takes float16, bfloat16 and float32, not {q.dtype}"
    largest = tiles.LARGEST_HEAD_DIM[q.element_size()]
    if q.shape[-1] > largest:
        return f"its attention takes head dims up to {largest} in {q.dtype}, not {q.shape[-1]}"
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
) -> tuple[Tensor, list[SinkStats]]:
    """:func:`flashsink.reference.attention`, differentiable once.

    Where a gradient is on its way and one statistic is asked for, ``received`` is what the backward captures for
    free, or, when it is read before, the result of the statistics pass. Otherwise the pass runs at once.
    """
    q, k, v = (adjacent(x) for x in (q, k, v))  # once here, else in every kernel's launcher
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink_logits))
    # a compiled graph cannot hand over a leaf of its own making, so there the pass runs
    pending, capture = None, None
    if trained and len(counted) == 1 and not torch.compiler.is_compiling():
        pending = Pending(q, k, layout, causal, scale, counted[0])
        capture = pending.leaf()
    out, lse = torch.ops.flashsink.triton_attention(
        q,
        k,
        v,
        sink_logits,
        capture,
        layout.starts,
        layout.lengths,
        counted[0] if counted else None,
        layout.packed,
        causal,
        scale,
    )
    lse = lse.detach()
    if pending is not None:
        pending.lse = lse
        return out, [SinkStats(pending, layout.queries_later(q.shape[2], causal, counted[0]), lse)]
    stats = [
        SinkStats(
            run_received(q, k, lse, layout, causal=causal, scale=scale, first=first),
            layout.queries_later(q.shape[2], causal, first),
            lse,
        )
        for first in counted
    ]
    return out, stats


def run_received(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, *, causal: bool, scale: float, first: Tensor | None = None
) -> Tensor:
    """(B, H, Sk) float32: the statistics pass over any attention with the log-sum-exp ``lse`` (B, H, Sq)."""
    return torch.ops.flashsink.triton_received(
        q.detach(),
        k.detach(),
        lse.float(),
        layout.starts,
        layout.lengths,
        first,
        layout.packed,
        causal,
        scale,
    )


def calibrated_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, layout: Layout, *, beta: float, scale: float
) -> Tensor:
    """:func:`flashsink.reference.calibrated_attention`: attention and its correction. ACT is a method of inference:
    where a gradient is asked for, and in packed rows, the reference runs."""
    if layout.packed or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return reference.calibrated_attention(q, k, v, sinks, layout, beta=beta, scale=scale)
    q, k, v = (adjacent(x) for x in (q, k, v))
    starts, lengths = layout.starts, layout.lengths
    out, lse = torch.ops.flashsink.triton_attention(
        q, k, v, None, None, starts, lengths, None, layout.packed, True, scale
    )
    return torch.ops.flashsink.triton_calibrate(q, k, v, out, lse, sinks, starts, lengths, beta, scale)


class Pending:
    """Attention received that is not known yet: captured by the backward, or found out by the statistics pass.

    Holds q and k until one of the two has happened or :meth:`release` is called.
    """

    def __init__(self, q: Tensor, k: Tensor, layout: Layout, causal: bool, scale: float, first: Tensor | None) -> None:
        self._inputs: tuple[Tensor, Tensor, Layout, bool, float, Tensor | None] | None
        self._inputs = (q.detach(), k.detach(), layout, causal, scale, first)
        self._captured: Tensor | None = None
        self.lse: Tensor | None = None

    def leaf(self) -> Tensor:
        """(B, H, Sk) float32, the input of attention whose gradient the backward will hand over. Only the graph
        holds it, so that nothing here outlives the graph."""
        assert self._inputs is not None
        q, k = self._inputs[:2]
        shape = (q.shape[0], q.shape[1], k.shape[2])
        capture = torch.empty(shape, dtype=torch.float32, device=q.device, requires_grad=True)
        capture.register_post_accumulate_grad_hook(self._catch)
        return capture

    def _catch(self, leaf: Tensor) -> None:
        # taken away, so that a second backward of the same graph does not add to it
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
        q, k, layout, causal, scale, first = self._inputs
        self._inputs = None
        return run_received(q, k, self.lse, layout, causal=causal, scale=scale, first=first)


# ---- operators

torch.library.define(
    "flashsink::triton_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? capture, Tensor starts, Tensor lengths,"
    " Tensor? first, bool packed, bool causal, float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "flashsink::triton_attention_backward",
    "(Tensor upstream, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sink_logits, Tensor starts,"
    " Tensor lengths, Tensor? first, bool packed, bool causal, float scale, bool capture)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "flashsink::triton_received",
    "(Tensor q, Tensor k, Tensor lse, Tensor starts, Tensor lengths, Tensor? first, bool packed, bool causal,"
    " float scale) -> Tensor",
)
torch.library.define(
    "flashsink::triton_calibrate",
    "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor sinks, Tensor starts, Tensor lengths, float beta,"
    " float scale) -> Tensor",
)


def _implement(name: str) -> Any:
    def decorate(function: Any) -> Any:
        torch.library.impl(f"flashsink::{name}", ("CUDA", "CPU"))(function)
        return function

    return decorate


def _out_like(q: Tensor) -> Tensor:
    b, h, queries, d = q.shape
    return q.new_empty((b, queries, h, d)).transpose(1, 2)


@torch.library.register_fake("flashsink::triton_attention")
def _attention_like(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _out_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_implement("triton_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    capture: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    first: Tensor | None,
    packed: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, sink_logits, starts, lengths, packed=packed, causal=causal, scale=scale)


@torch.library.register_fake("flashsink::triton_attention_backward")
def _attention_backward_like(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink_logits: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    captured = (q.shape[0], q.shape[1], k.shape[2]) if rest[-1] else (0,)
    sink = q.new_empty(0, dtype=torch.float32) if sink_logits is None else torch.empty_like(sink_logits)
    return (
        torch.empty_like(adjacent(q)),
        torch.empty_like(adjacent(k)),
        torch.empty_like(adjacent(v)),
        sink,
        q.new_empty(captured, dtype=torch.float32),
    )


@_implement("triton_attention_backward")
def _attention_backward(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_logits: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    first: Tensor | None,
    packed: bool,
    causal: bool,
    scale: float,
    capture: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, gradient of the sink logits or empty, received or empty).

    Beyond ``CAPTURED_HEAD_DIM`` the sums of dK and dV fill the registers; the statistics pass runs here instead.
    """
    where: dict[str, Any] = {"packed": packed, "causal": causal, "scale": scale}
    apart = capture and q.shape[-1] > CAPTURED_HEAD_DIM
    dq, dk, dv, delta, received = backward(
        upstream,
        (q, k, v, out, lse),
        starts,
        lengths,
        first,
        **where,
        capture=capture and not apart,
    )
    if apart:
        received = statistics_pass(q, k, lse, starts, lengths, first, **where)
    empty = lse.new_empty(0)
    sink = empty
    if sink_logits is not None:
        layout = Layout(starts, lengths, q.shape[0], k.shape[2], packed)
        valid = layout.valid()[:, None, k.shape[2] - q.shape[2] :]
        share = (sink_logits.float()[:, None] - lse).exp()
        sink = torch.where(valid, -share * delta, 0.0).sum(dim=(0, 2)).to(sink_logits.dtype)
    return dq, dk, dv, sink, empty if received is None else received


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink_logits, capture, starts, lengths, first, ctx.packed, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, output[0], output[1], sink_logits, starts, lengths, first)


def _derive(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, sink_logits, starts, lengths, first = ctx.saved_tensors
    capture = ctx.needs_input_grad[4]
    dq, dk, dv, sink, received = torch.ops.flashsink.triton_attention_backward(
        upstream, q, k, v, out, lse, sink_logits, starts, lengths, first, ctx.packed, ctx.causal, ctx.scale, capture
    )
    sink = None if sink_logits is None else sink
    return dq, dk, dv, sink, received if capture else None, None, None, None, None, None, None


def _refuse(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "the triton backend differentiates attention once; backend='reference' as often as you like"
    )


torch.library.register_autograd("flashsink::triton_attention", _derive, setup_context=_save)
torch.library.register_autograd("flashsink::triton_attention_backward", _refuse)


@torch.library.register_fake("flashsink::triton_received")
def _received_like(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32)


@_implement("triton_received")
def _received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    first: Tensor | None,
    packed: bool,
    causal: bool,
    scale: float,
) -> Tensor:
    return statistics_pass(q, k, lse, starts, lengths, first, packed=packed, causal=causal, scale=scale)


@torch.library.register_fake("flashsink::triton_calibrate")
def _calibrate_like(q: Tensor, *_: Any) -> Tensor:
    return _out_like(q)


@_implement("triton_calibrate")
def _calibrate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor,
    starts: Tensor,
    lengths: Tensor,
    beta: float,
    scale: float,
) -> Tensor:
    return calibrate(q, k, v, (out, lse), sinks, starts, lengths, beta=beta, scale=scale)
