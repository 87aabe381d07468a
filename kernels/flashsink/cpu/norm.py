"""RMSNorm with the decorrelation loss and the largest activations in the same visit of every row (csrc/norm.cpp).

Dimensions: B rows, S tokens, C features, N sequences (N = B in dense layout).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsink import reference
from flashsink.cpu.library import DTYPES, call, refuse, rows
from flashsink.types import Layout, Normed


def rms_norm(h: Tensor, weight: Tensor, eps: float, layout: Layout, spans: Tensor | None, margin: float) -> Normed:
    """:func:`flashsink.reference.rms_norm`, differentiable once w.r.t. ``h`` and ``weight``.

    One pass forward and one backward; the loss's gradient is added to the norm's in float32 and rounded once. For
    the backward h, weight and four numbers a token are kept. All tokens are normalised; a token with no gradient
    coming back sends none, whatever it holds.

    Args:
        h: (B, S, C) CPU tensor of any strides; copied where the features are not adjacent in memory.
        weight: (C,). Where it is not of h's dtype, or that is neither float32 nor bfloat16, the reference computes.
        eps: added to the mean square.
        layout: dense rows, or one packed row.
        spans: (N,) int64, within the layout's lengths, or None for no loss.
        margin: 0 <= margin < 1.
    """
    if h.dtype not in DTYPES or weight.dtype != h.dtype:
        return reference.rms_norm(h, weight, eps, layout, spans, margin)
    h, weight = rows(h), weight.contiguous()
    out, total, max_abs, feature, *_ = torch.ops.flashsink.rms_norm(
        h, weight, eps, layout.starts, layout.lengths, spans, layout.packed, margin
    )
    return Normed(out, None if spans is None else total, max_abs, feature)


torch.library.define(
    "flashsink::rms_norm",
    "(Tensor h, Tensor weight, float eps, Tensor starts, Tensor lengths, Tensor? spans, bool packed, float margin)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "flashsink::rms_norm_backward",
    "(Tensor grad, Tensor upstream, Tensor h, Tensor weight, Tensor starts, Tensor? spans, bool packed, Tensor rstd,"
    " Tensor scalars, Tensor bos_gradient, bool need_weight) -> (Tensor, Tensor)",
)


def _check(h: Tensor, weight: Tensor, starts: Tensor, spans: Tensor | None) -> None:
    if weight.dtype != h.dtype or weight.shape != h.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"weight: expected {h.dtype} {tuple(h.shape[-1:])}, got {weight.dtype} {tuple(weight.shape)}")
    if spans is not None and (spans.dtype != torch.int64 or spans.shape != starts.shape):
        raise ValueError(f"spans: expected int64 {tuple(starts.shape)}, got {spans.dtype} {tuple(spans.shape)}")


@torch.library.register_fake("flashsink::rms_norm")
def _norm_like(
    h: Tensor,
    weight: Tensor,
    eps: float,
    starts: Tensor,
    lengths: Tensor,
    spans: Tensor | None,
    packed: bool,
    margin: float,
) -> tuple[Tensor, ...]:
    tokens, wide = h.shape[:2], torch.float32
    loss = spans is not None
    return (
        h.new_empty(h.shape),
        h.new_zeros((), dtype=wide),
        h.new_zeros(tokens, dtype=wide),
        h.new_full(tokens, -1, dtype=torch.int32),
        h.new_empty(tokens, dtype=wide),
        h.new_zeros((*tokens, 2) if loss else (0,), dtype=torch.float64),
        h.new_empty((starts.shape[0], h.shape[-1]) if loss else (0,), dtype=wide),
    )


@torch.library.impl("flashsink::rms_norm", "CPU")
def _norm(
    h: Tensor,
    weight: Tensor,
    eps: float,
    starts: Tensor,
    lengths: Tensor,
    spans: Tensor | None,
    packed: bool,
    margin: float,
) -> tuple[Tensor, ...]:
    """(out (B, S, C), the loss's sum, max |h| (B, S), its feature (B, S), 1 / RMS (B, S), what the loss's backward
    needs of every token (B, S, 2) float64, its gradient at BOS (N, C) float32)."""
    _check(h, weight, starts, spans)
    results = _norm_like(h, weight, eps, starts, lengths, spans, packed, margin)
    spans = None if spans is None else spans.contiguous()
    inner = (None if spans is None else spans.data_ptr(), weight.data_ptr(), eps, margin)
    call("rms_norm_forward", h, starts, lengths, packed, *inner, *(x.data_ptr() for x in results))
    return results


@torch.library.register_fake("flashsink::rms_norm_backward")
def _backward_like(
    grad: Tensor,
    upstream: Tensor,
    h: Tensor,
    weight: Tensor,
    starts: Tensor,
    spans: Tensor | None,
    packed: bool,
    rstd: Tensor,
    scalars: Tensor,
    bos_gradient: Tensor,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape if need_weight else (0,))


@torch.library.impl("flashsink::rms_norm_backward", "CPU")
def _backward(
    grad: Tensor,
    upstream: Tensor,
    h: Tensor,
    weight: Tensor,
    starts: Tensor,
    spans: Tensor | None,
    packed: bool,
    rstd: Tensor,
    scalars: Tensor,
    bos_gradient: Tensor,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of h (B, S, C), gradient of weight (C,), or nothing (0,)), in the dtype of ``h``."""
    _check(h, weight, starts, spans)
    dh = h.new_empty(h.shape)
    dweight = weight.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
    upstream, grad, rstd, scalars, bos_gradient = (
        x.contiguous() for x in (upstream.float(), grad, rstd, scalars, bos_gradient)
    )
    loss = (None, None) if spans is None else (scalars.data_ptr(), bos_gradient.data_ptr())
    inner = (upstream.data_ptr(), weight.data_ptr(), grad.data_ptr(), rstd.data_ptr(), *loss, dh.data_ptr())
    ends = starts if spans is None else spans
    call("rms_norm_backward", h, starts, ends, packed, *inner, dweight.data_ptr() if need_weight else None)
    return dh, dweight.to(weight.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, weight, _, starts, _, spans, ctx.packed, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(h, weight, starts, spans, *output[4:])


def _derive(ctx: Any, grad: Tensor, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    h, weight, starts, spans, rstd, scalars, bos_gradient = ctx.saved_tensors
    need_h, need_weight = ctx.needs_input_grad[:2]
    dh, dweight = torch.ops.flashsink.rms_norm_backward(
        grad, upstream, h, weight, starts, spans, ctx.packed, rstd, scalars, bos_gradient, need_weight
    )
    return dh if need_h else None, dweight if need_weight else None, None, None, None, None, None, None


torch.library.register_autograd("flashsink::rms_norm", _derive, setup_context=_save)
torch.library.register_autograd("flashsink::rms_norm_backward", refuse)
