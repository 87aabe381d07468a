"""Torch's flash attention for CPU with a backward of our own (csrc/attention.cpp); short sequences have a kernel of
their own, :mod:`flashsink.cpu.short`.

The backward makes its five matrix products in torch's BLAS on small reused tiles, those of all query heads of a key
head at once, and what lies between them in one pass in C++; padding is skipped. Everything is float32.
Dimensions: B rows, H query and Hk key heads, Sq queries, Sk keys, D head dim, N sequences (N = B in dense layout).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsink.cpu import short
from flashsink.cpu.library import library, refuse, rows
from flashsink.cpu.packed import groups, like
from flashsink.cpu.received import TILE, Part, bounds_of, check, parts
from flashsink.types import Layout

LEAST = torch.finfo(torch.float32).min


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), lse (B, H, Sq)) of torch's kernel, which wants as many key heads as query heads. Its causal
    mask begins at the first key, so ``causal`` serves only as many queries as keys."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    q, k, v = (rows(x) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def mask_of(layout: Layout, queries: int, causal: bool) -> Tensor | None:
    """What is added to the scores of dense rows, beside the causal mask where there are as many queries as keys; None
    if nothing.

    The least finite number and not -inf: a padded query then gets finite nonsense, which is zeroed, and not NaN.
    """
    keys, padding = layout.tokens, ~layout.valid()
    # no valid query of a causal row comes after padding but behind its start
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


torch.library.define(
    "flashsink::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor lengths, bool packed, bool causal, float scale)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "flashsink::attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, Tensor lengths, bool packed,"
    " bool causal, float scale) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("flashsink::attention")
def _forward_like(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, packed: bool, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return (like(q), like(q[..., 0])) if packed else (q.new_empty(q.shape), q.new_empty(q.shape[:3]))


@torch.library.impl("flashsink::attention", "CPU")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, packed: bool, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), lse (B, H, Sq)), finite and of no meaning at padding, where dense q, k and v must be 0."""
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
    for group in groups(starts, lengths, k.shape[2]):
        found = _dense_forward(group.spread(q), group.spread(k), group.spread(v), *group.rows, causal, scale)
        for whole, own in zip((out, lse), found, strict=True):
            group.collect(own, whole)
    return out, lse


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    layout = Layout(starts, lengths, q.shape[0], k.shape[2], False)
    queries = q.shape[2]
    out, lse = flash(q, k, v, causal and queries == k.shape[2], mask_of(layout, queries, causal), scale)
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("flashsink::attention_backward")
def _backward_like(
    grad: Tensor,
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
    return (like(q), like(k), like(v)) if packed else (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))


@torch.library.impl("flashsink::attention_backward", "CPU")
def _backward(
    grad: Tensor,
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
    """Gradients of q, k and v, 0 at padding, which must be finite in all arguments.

    With P = exp(scale q k^T - lse) and dS = scale P (grad v^T - <grad, out>): dv = P^T grad, dk = dS^T q, dq = dS k.
    """
    check(q, k, lse, starts, lengths, packed)
    inputs = (grad, q, k, v, out, lse)
    if short.serves(q, k, lengths):
        given = (q, k, v, out, lse, grad)
        results = _zeros(q, packed), _zeros(k, packed), _zeros(v, packed)
        bounds = bounds_of(q, k, starts, lengths, None)
        short.backward(given, results, bounds, packed, short.How(causal, scale))
        return results
    if not packed:
        return _dense_backward(inputs, starts, lengths, causal, scale)
    results = like(q), like(k), like(v)
    for group in groups(starts, lengths, k.shape[2]):
        spread = tuple(group.spread(x) for x in inputs)
        for whole, own in zip(results, _dense_backward(spread, *group.rows, causal, scale), strict=True):
            group.collect(own, whole)
    return results


def _dense_backward(
    inputs: tuple[Tensor, ...], starts: Tensor, lengths: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out, lse = inputs
    results = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    bounds = bounds_of(q, k, starts, lengths, None)
    given = (grad, q, k, v, lse.contiguous(), (grad * out).sum(dim=-1).contiguous())
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
    grad, q, k, v, lse, delta = inputs
    batch, heads = part
    groups, unseen = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    own = bounds[:, batch].contiguous()
    start, end, first = int(own[0].min()), int(own[1].max()), int(own[2].min())
    if first >= end:
        return buffers
    keys, values = (x[batch, heads, start:end].flatten(0, 1) for x in (k, v))
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    queries, upstream, dq = (x.unflatten(1, (-1, groups))[batch, heads] for x in (q, grad, results[0]))
    b, g, *_, d = queries.shape
    head = heads.start * groups
    for low in range(first, end, TILE):
        high = min(low + TILE, end)
        where, seen = slice(low - unseen, high - unseen), (high if causal else end) - start
        count = (high - low) * groups
        size = b * g * count * seen
        if buffers[0].numel() < size:
            buffers = (q.new_empty(size), q.new_empty(size))
        p, ds = (x[:size].view(b * g, count, seen) for x in buffers)
        own_q, own_grad = (x[:, :, :, where].reshape(b * g, count, d) for x in (queries, upstream))
        torch.bmm(own_q, keys[:, :seen].mT, out=p)
        torch.bmm(own_grad, values[:, :seen].mT, out=ds)
        library().flashsink_attention_tile(
            *(p.data_ptr(), ds.data_ptr()),
            *(x[batch.start, head, where.start :].data_ptr() for x in (lse, delta)),
            *(b, g * groups, high - low, seen, low, start, lse.stride(0), lse.stride(1)),
            *(own[0].data_ptr(), own[1].data_ptr(), int(causal), scale, torch.get_num_threads()),
        )
        dv[:, :seen].baddbmm_(p.mT, own_grad)
        dk[:, :seen].baddbmm_(ds.mT, own_q)
        dq[:, :, :, where] = torch.bmm(ds, keys[:, :seen]).view(b, g, groups, high - low, d)
    for result, x in zip(results[1:], (dk, dv), strict=True):
        result[batch, heads, start:end] = x.view(b, g, end - start, d)
    return buffers


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, lengths, ctx.packed, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, starts, lengths)


def _derive(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    run = torch.ops.flashsink.attention_backward
    gradients = run(grad, *ctx.saved_tensors, ctx.packed, ctx.causal, ctx.scale)
    return *gradients, None, None, None, None, None


torch.library.register_autograd("flashsink::attention", _derive, setup_context=_save)
torch.library.register_autograd("flashsink::attention_backward", refuse)
