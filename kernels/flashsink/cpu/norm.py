"""RMSNorm with the decorrelation loss and the largest activations in the same visit of every row (csrc/norm.cpp).

Dimensions: B rows, S tokens, C features, N sequences (N = B in dense layout).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsink import reference
from flashsink.cpu.library import DTYPES, call
from flashsink.operators import adjacent
from flashsink.types import Layout, Normed


def rms_norm(h: Tensor, weight: Tensor, eps: float, layout: Layout, spans: Tensor | None, margin: float) -> Normed:
    """:func:`flashsink.reference.rms_norm`, differentiable once w.r.t. ``h`` and ``weight``.

    One pass forward and one backward; the loss's gradient is added to the norm's in float32 and rounded once. For
    the backward h, weight and four numbers a token are kept. All tokens are normalized; a token with no gradient
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
    h, weight = adjacent(h), weight.contiguous()
    out, total, max_abs, feature, *_ = torch.ops.flashsink.rms_norm(
        h, weight, eps, layout.starts, layout.lengths, spans, layout.packed, margin
    )
    return Normed(out, None if spans is None else total, max_abs, feature)


def _check(h: Tensor, weight: Tensor, starts: Tensor, spans: Tensor | None) -> None:
    if weight.dtype != h.dtype or weight.shape != h.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"weight: expected {h.dtype} {tuple(h.shape[-1:])}, got {weight.dtype} {tuple(weight.shape)}")
    if spans is not None and (spans.dtype != torch.int64 or spans.shape != starts.shape):
        raise ValueError(f"spans: expected int64 {tuple(starts.shape)}, got {spans.dtype} {tuple(spans.shape)}")


def forward_like(
    h: Tensor, weight: Tensor, eps: float, starts: Tensor, lengths: Tensor, spans: Tensor | None, *_: Any
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


def forward(
    h: Tensor,
    weight: Tensor,
    eps: float,
    starts: Tensor,
    lengths: Tensor,
    spans: Tensor | None,
    packed: bool,
    margin: float,
) -> tuple[Tensor, ...]:
    """(out (B, S, C), the loss's sum, max |h| (B, S), its feature (B, S), rstd (B, S), w and p of every token for the
    loss's backward (B, S, 2) float64, gradient of BOS (N, C) float32)."""
    _check(h, weight, starts, spans)
    results = forward_like(h, weight, eps, starts, lengths, spans)
    spans = None if spans is None else spans.contiguous()
    inner = (None if spans is None else spans.data_ptr(), weight.data_ptr(), eps, margin)
    call("rms_norm_forward", h, starts, lengths, packed, *inner, *(x.data_ptr() for x in results))
    return results


def backward_like(
    dout: Tensor | None, dtotal: Tensor | None, h: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape if rest[-1] else (0,))


def backward(
    dout: Tensor | None,
    dtotal: Tensor | None,
    h: Tensor,
    weight: Tensor,
    starts: Tensor,
    spans: Tensor | None,
    packed: bool,
    rstd: Tensor,
    scalars: Tensor,
    dbos: Tensor,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of h (B, S, C), of weight (C,) or, where it is not needed, (0,)), in the dtype of ``h``.

    ``dout`` and ``dtotal`` are None where nothing depends on that output.
    """
    _check(h, weight, starts, spans)
    spans = None if dtotal is None else spans
    dout = torch.zeros_like(h) if dout is None else dout
    dtotal = h.new_zeros(()) if dtotal is None else dtotal
    dh = h.new_empty(h.shape)
    dweight = weight.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
    dtotal, dout, rstd, scalars, dbos = (x.contiguous() for x in (dtotal.float(), dout, rstd, scalars, dbos))
    loss = (None, None) if spans is None else (scalars.data_ptr(), dbos.data_ptr())
    inner = (dtotal.data_ptr(), weight.data_ptr(), dout.data_ptr(), rstd.data_ptr(), *loss, dh.data_ptr())
    ends = starts if spans is None else spans
    call("rms_norm_backward", h, starts, ends, packed, *inner, dweight.data_ptr() if need_weight else None)
    return dh, dweight.to(weight.dtype)
