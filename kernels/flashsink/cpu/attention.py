"""Torch's flash attention for CPU with a backward of our own (csrc/attention.cpp); short sequences have a kernel of
their own, :mod:`flashsink.cpu.short`.

The backward makes its five matrix products in torch's BLAS on small reused tiles, those of all query heads of a key
head at once, and the element-wise part in one pass in C++; padding is skipped. Everything is float32.
Dimensions: B rows, H query and Hk key heads, Sq queries, Sk keys, D head dim, N sequences (N = B in dense layout).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsink.checks import positive_scale
from flashsink.cpu import short
from flashsink.cpu.library import library
from flashsink.cpu.packed import buckets, like
from flashsink.cpu.received import TILE, Part, bounds_of, check, parts
from flashsink.operators import adjacent
from flashsink.types import Layout

LEAST = torch.finfo(torch.float32).min


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), lse (B, H, Sq)) of torch's kernel, which needs as many key heads as query heads. Its causal
    mask begins at the first key, so ``causal`` serves only as many queries as keys."""
    q, scale = positive_scale(q, scale)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    q, k, v = (adjacent(x) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def mask_of(layout: Layout, queries: int, causal: bool) -> Tensor | None:
    """What is added to the scores of dense rows, or None. Where there are as many queries as keys the causal mask is
    not part of it.

    The least finite number and not -inf: a padded query then gets a finite value, which is zeroed, and not NaN.
    """
    keys, padding = layout.tokens, ~layout.valid()
    # where all rows start at 0 no valid query of a causal row sees padding
    seen = causal and queries > 1 and not bool((layout.starts > 0).any())
    mask = None
    if causal and 1 < queries < keys:
        later = torch.ones(queries, keys, dtype=torch.bool).triu_(keys - queries + 1)
        mask = torch.zeros(later.shape).masked_fill_(later, LEAST)
    if not seen and bool(padding.any()):
        own = torch.zeros(padding.shape).masked_fill_(padding, LEAST)[:, None, None, :]
        mask = own if mask is None else torch.minimum(mask, own)
    return None if mask is None else mask.expand(layout.rows, 1, queries, keys)


def _zeros(x: Tensor, packed: bool) -> Tensor:
    return like(x) if packed else x.new_zeros(x.shape)


def forward_like(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, packed: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    return (like(q), like(q[..., 0])) if packed else (q.new_empty(q.shape), q.new_empty(q.shape[:3]))


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, packed: bool, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), lse (B, H, Sq)), finite and without meaning at padding, where dense q, k and v must be 0."""
    if short.serves(q, k, lengths):
        found = _zeros(q, packed), _zeros(q[..., 0], packed)
        check(q, k, found[1], starts, lengths, packed)
        if v.shape != k.shape:
            raise ValueError(f"v: expected the shape {tuple(k.shape)} of k, got {tuple(v.shape)}")
        bounds = bounds_of(q, k, starts, lengths, None)
        short.forward(q, k, v, found, bounds, packed, short.How(causal, scale))
        return found
    if not packed:
        return _dense_forward(q, k, v, starts, lengths, causal, scale)
    out, lse = like(q), like(q[..., 0])
    for bucket in buckets(starts, lengths, k.shape[2]):
        found = _dense_forward(bucket.spread(q), bucket.spread(k), bucket.spread(v), *bucket.rows, causal, scale)
        for whole, own in zip((out, lse), found, strict=True):
            bucket.collect(own, whole)
    return out, lse


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    layout = Layout(starts, lengths, q.shape[0], k.shape[2], False)
    queries = q.shape[2]
    out, lse = flash(q, k, v, causal and queries == k.shape[2], mask_of(layout, queries, causal), scale)
    return out.contiguous(), lse.contiguous()


def backward_like(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    packed: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (like(q), like(k), like(v)) if packed else (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    packed: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), 0 at padding, which must be finite in all arguments.

    With P = exp(scale q k^T - lse), delta = rowsum(dO * O) and dS = scale P * (dO v^T - delta):
    dv = P^T dO, dk = dS^T q, dq = dS k.
    """
    check(q, k, lse, starts, lengths, packed)
    inputs = (do, q, k, v, out, lse)
    if short.serves(q, k, lengths):
        results = _zeros(q, packed), _zeros(k, packed), _zeros(v, packed)
        bounds = bounds_of(q, k, starts, lengths, None)
        short.backward((q, k, v, out, lse, do), results, bounds, packed, short.How(causal, scale))
        return results
    if not packed:
        return _dense_backward(inputs, starts, lengths, causal, scale)
    results = like(q), like(k), like(v)
    for bucket in buckets(starts, lengths, k.shape[2]):
        spread = tuple(bucket.spread(x) for x in inputs)
        for whole, own in zip(results, _dense_backward(spread, *bucket.rows, causal, scale), strict=True):
            bucket.collect(own, whole)
    return results


def _dense_backward(
    inputs: tuple[Tensor, ...], starts: Tensor, lengths: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v, out, lse = inputs
    results = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    bounds = bounds_of(q, k, starts, lengths, None)
    given = (do, q, k, v, lse.contiguous(), (do * out).sum(dim=-1).contiguous())
    buffers = (q.new_empty(0), q.new_empty(0))
    for part in parts(q, k, bounds):
        buffers = _part(given, results, bounds, part, causal, scale, buffers)
    return results


def _part(
    inputs: tuple[Tensor, ...],
    results: tuple[Tensor, Tensor, Tensor],
    bounds: Tensor,
    part: Part,
    causal: bool,
    scale: float,
    buffers: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """One part of the gradients; returns the buffers for the next."""
    do, q, k, v, lse, delta = inputs
    batch, heads = part
    group, unseen = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    own = bounds[:, batch].contiguous()
    start, end, query_start = int(own[0].min()), int(own[1].max()), int(own[2].min())
    if query_start >= end:
        return buffers
    keys, values = (x[batch, heads, start:end].flatten(0, 1) for x in (k, v))
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    queries, outputs, dq = (x.unflatten(1, (-1, group))[batch, heads] for x in (q, do, results[0]))
    b, g, *_, d = queries.shape
    head = heads.start * group
    for low in range(query_start, end, TILE):
        high = min(low + TILE, end)
        where, seen = slice(low - unseen, high - unseen), (high if causal else end) - start
        count = (high - low) * group
        size = b * g * count * seen
        if buffers[0].numel() < size:
            buffers = (q.new_empty(size), q.new_empty(size))
        p, ds = (x[:size].view(b * g, count, seen) for x in buffers)
        own_q, own_do = (x[:, :, :, where].reshape(b * g, count, d) for x in (queries, outputs))
        torch.bmm(own_q, keys[:, :seen].mT, out=p)
        torch.bmm(own_do, values[:, :seen].mT, out=ds)
        library().flashsink_attention_tile(
            *(p.data_ptr(), ds.data_ptr()),
            *(x[batch.start, head, where.start :].data_ptr() for x in (lse, delta)),
            *(b, g * group, high - low, seen, low, start, lse.stride(0), lse.stride(1)),
            *(own[0].data_ptr(), own[1].data_ptr(), int(causal), scale, torch.get_num_threads()),
        )
        dv[:, :seen].baddbmm_(p.mT, own_do)
        dk[:, :seen].baddbmm_(ds.mT, own_q)
        dq[:, :, :, where] = torch.bmm(ds, keys[:, :seen]).view(b, g, group, high - low, d)
    for result, x in zip(results[1:], (dk, dv), strict=True):
        result[batch, heads, start:end] = x.view(b, g, end - start, d)
    return buffers
