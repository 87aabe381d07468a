"""Attention that the other CPU kernels do not take, in tiles of query rows: patterns of visible keys, capped scores,
values of another head dim than the keys', sink logits that learn.

A tile's products are torch's BLAS over the keys between the lowest and the highest that one of its queries sees, for
as many rows and heads at once as fit into the cache; what a query does not see is -3.4e38 in a small tensor that all
heads add to their scores. The backward computes the tiles again from the log-sum-exp. Everything is float32, and memory
is linear in the number of tokens.
Dimensions: B rows, H query and Hk key heads, G = H / Hk, Sq queries, Sk keys, D head dim, Dv that of v, N sequences
(N = B in dense layout); in a tile b rows, g key heads, T queries, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink.types import Layout, Pattern

TILE = 64  # queries of a tile
PRODUCTS = 1 << 19  # products held at once (2 MB), more only where one key head's tile is larger
LEAST = torch.finfo(torch.float32).min


class Tile(NamedTuple):
    """What is computed at once, and hidden (b, 1, 1, T, K): 0 where a query sees a key, else ``LEAST``."""

    rows: slice
    heads: slice  # key heads
    queries: slice
    keys: slice
    hidden: Tensor

    def of_queries(self, x: Tensor, group: int) -> Tensor:
        """(b, g, G, T, ...) of x (B, H, Sq, ...), a view."""
        return x.unflatten(1, (-1, group))[self.rows, self.heads, :, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """(b, g, K, ...) of x (B, Hk, Sk, ...), a view."""
        return x[self.rows, self.heads, self.keys]


def forward_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    targets: Tensor | None,
    sums: int,
    spread: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    received = q.new_zeros(sums, q.shape[0], q.shape[1], k.shape[2])
    return out, lse, received, q.new_zeros(q.shape[:3] if spread else (0,))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    targets: Tensor | None,
    sums: int,
    spread: bool,
    starts: Tensor,
    lengths: Tensor,
    packed: bool,
    causal: bool,
    scale: float,
    softcap: float | None,
    *pattern: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out (B, H, Sq, Dv), lse (B, H, Sq), received (sums, B, H, Sk), entropy (B, H, Sq)), 0 at queries that see
    nothing. With P = e / l, e = exp(x - m) of a row's scores x: entropy = sum of P (m - x) + log(l) sum of P, two terms
    of one sign.

    Args:
        q, k, v: (B, H, Sq, D), (B, Hk, Sk, D) and (B, Hk, Sk, Dv) float32, finite at padding.
        sink_logits: (H,) float32 or None.
        targets: (n, B, Sq) int32, n times the number of the sum in ``received`` that a query adds to, -1 for none; or
            None.
        sums: their number.
        spread: whether the entropy is computed; else it is empty.
        starts, lengths: (N,) int64, as in :class:`flashsink.types.Layout`.
        pattern: the fields of :class:`flashsink.types.Pattern`.
    """
    layout, group = Layout(starts, lengths, q.shape[0], k.shape[2], packed), q.shape[1] // k.shape[1]
    out, lse, received, entropy = forward_like(q, k, v, sink_logits, targets, sums, spread)
    q = q * (scale / (softcap or 1.0))
    counts = None
    if targets is not None:
        counts = (targets.unsqueeze(1) == torch.arange(sums)[:, None, None]).sum(dim=0).float()  # (sums, B, Sq)
    for tile in _tiles(q, k, layout, causal, Pattern(*pattern)):
        scores = _scores(tile, q, k, softcap)
        scores = (scores if softcap is None else scores.mul_(softcap)).add_(tile.hidden)
        top = scores.amax(dim=-1)
        sink = None if sink_logits is None else sink_logits.unflatten(0, (-1, group))[tile.heads].unsqueeze(-1)
        top = top if sink is None else torch.maximum(top, sink)
        scores.sub_(top.unsqueeze(-1))
        below = scores.clone() if spread else scores
        own = scores.exp_().sum(dim=-1)
        total = own if sink is None else own + (sink - top).exp_()
        seen = (tile.hidden == 0.0).any(dim=-1)
        tile.of_queries(lse, group).copy_(top.add_(total.log()).mul_(seen))
        share = seen / total  # (b, g, G, T)
        if spread:
            apart = below.mul_(scores).sum(dim=-1)
            torch.mul(own.mul(total.log()).sub_(apart), share, out=tile.of_queries(entropy, group))
        values = torch.bmm(scores.flatten(2, 3).flatten(0, 1), tile.of_keys(v).flatten(0, 1))
        torch.mul(values.view(*share.shape, -1), share.unsqueeze(-1), out=tile.of_queries(out, group))
        if counts is not None:
            weights = counts[:, tile.rows, None, None, tile.queries] * share
            columns = torch.bmm(weights.flatten(1, 3).transpose(0, 1), scores.flatten(0, 2))  # (b g G, sums, K)
            for given, column in zip(received, columns.unbind(1), strict=True):
                target = given.unflatten(1, (-1, group))[tile.rows, tile.heads, :, tile.keys]
                target += column.view(target.shape)
    return out, lse, received, entropy


def backward_like(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sink = q.new_zeros(0) if sink_logits is None else q.new_zeros(sink_logits.shape)
    return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), sink


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    packed: bool,
    causal: bool,
    scale: float,
    softcap: float | None,
    *pattern: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, gradient of sink_logits (H,) or nothing (0,)); ``grad`` is finite at padding.

    With x = scale q k^T, P = exp(x - lse), delta = rowsum(grad * out) and dX = P * (grad v^T - delta):
    dv = P^T grad, dq = scale dX k, dk = scale dX^T q. With the cap c, t = tanh(x / c) and P = exp(c t - lse):
    dX gets the factor 1 - t^2. The sink z: dz = -sum over rows of exp(z - lse) delta.
    """
    layout, group = Layout(starts, lengths, q.shape[0], k.shape[2], packed), q.shape[1] // k.shape[1]
    dq, dk, dv, dsink = backward_like(grad, q, k, v, sink_logits)
    factor = scale / (softcap or 1.0)
    q = q * factor
    delta = (grad * out).sum(dim=-1)
    if sink_logits is not None:
        # at most 0 where a query sees something; elsewhere delta is 0
        dsink = ((sink_logits[:, None] - lse).clamp_(max=0.0).exp_() * delta).sum(dim=(0, 2)).neg_()
    for tile in _tiles(q, k, layout, causal, Pattern(*pattern)):
        scores = _scores(tile, q, k, softcap)
        p = scores if softcap is None else scores * softcap
        p.add_(tile.hidden).sub_(tile.of_queries(lse, group).unsqueeze(-1)).exp_()
        own_grad = tile.of_queries(grad, group).flatten(2, 3).flatten(0, 1)
        keys, values = (tile.of_keys(x).flatten(0, 1) for x in (k, v))
        folded = p.flatten(2, 3).flatten(0, 1)
        tile.of_keys(dv).add_(torch.bmm(folded.mT, own_grad).view(tile.of_keys(dv).shape))
        dx = torch.bmm(own_grad, values.mT).view(p.shape)
        dx.sub_(tile.of_queries(delta, group).unsqueeze(-1)).mul_(p)
        if softcap is not None:
            dx.mul_(scores.square_().neg_().add_(1.0).mul_(softcap))
        folded = dx.flatten(2, 3).flatten(0, 1)
        tile.of_keys(dk).add_(torch.bmm(folded.mT, _folded(tile, q, group)).view(tile.of_keys(dk).shape))
        own = tile.of_queries(dq, group)
        torch.mul(torch.bmm(folded, keys).view(own.shape), factor, out=own)
    return dq, dk, dv, dsink


def _folded(tile: Tile, x: Tensor, group: int) -> Tensor:
    """(b g, G T, D) of x (B, H, Sq, D): the query heads of a key head are neighboring rows."""
    return tile.of_queries(x, group).flatten(2, 3).flatten(0, 1)


def _scores(tile: Tile, q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
    """(b, g, G, T, K): products of q, which holds scale / softcap, and their tanh where there is a cap."""
    group = q.shape[1] // k.shape[1]
    products = torch.bmm(_folded(tile, q, group), tile.of_keys(k).flatten(0, 1).mT)
    b, g, _, queries, _ = tile.of_queries(q, group).shape
    products = products.view(b, g, group, queries, -1)
    return products if softcap is None else products.tanh_()


def _tiles(q: Tensor, k: Tensor, layout: Layout, causal: bool, pattern: Pattern) -> Iterator[Tile]:
    """All tiles that see something."""
    (b, heads, queries, _), key_heads = q.shape, k.shape[1]
    low, high = _bounds(layout, queries, causal, pattern)
    size = min(TILE, queries)
    longest = min(int((high - low).max()) + size, layout.tokens)  # a tile's keys, about
    step = max(1, PRODUCTS // max(1, heads * size * longest))
    for n in range(0, b, step):
        rows = slice(n, min(n + step, b))
        own, own_pattern = _of_rows(layout, pattern, rows)
        for t in range(0, queries, TILE):
            where = slice(t, min(t + TILE, queries))
            first, end = int(low[rows, where].min()), int(high[rows, where].max())
            if first >= end:
                continue
            seen = own.visible(queries, causal, own_pattern, where, slice(first, end))
            if pattern.mask is not None:
                columns = seen.any(dim=2).flatten(0, 1).any(dim=0).nonzero()
                if not len(columns):
                    continue
                kept = slice(int(columns[0]), int(columns[-1]) + 1)
                seen, first, end = seen[..., kept], first + kept.start, first + kept.stop
            hidden = torch.zeros(seen.shape).masked_fill_(~seen, LEAST).unsqueeze(1)
            some = max(1, PRODUCTS // (hidden.numel() * heads // key_heads))
            for g in range(0, key_heads, some):
                yield Tile(rows, slice(g, min(g + some, key_heads)), where, slice(first, end), hidden)


def _of_rows(layout: Layout, pattern: Pattern, rows: slice) -> tuple[Layout, Pattern]:
    if layout.packed:
        return layout, pattern
    starts, lengths = layout.starts[rows], layout.lengths[rows]
    prefix, blocks = (None if x is None else x[rows] for x in (pattern.prefix, pattern.blocks))
    mask = pattern.mask if pattern.mask is None or len(pattern.mask) == 1 else pattern.mask[rows]
    own = layout._replace(starts=starts, lengths=lengths, rows=len(starts))
    return own, pattern._replace(prefix=prefix, blocks=blocks, mask=mask)


def _bounds(layout: Layout, queries: int, causal: bool, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(B, Sq) int64 each: the first key that a query sees and the one after the last, or with a mask its row's; Sk and
    0 where it is padding."""
    segment = layout.segments()
    index = segment.clamp(min=0)
    starts, ends = layout.starts[index], (layout.starts + layout.lengths)[index]
    low, high = (starts, ends) if pattern.mask is not None else layout.reach(True, not causal, pattern)
    if pattern.prefix is not None and pattern.mask is None:
        prefix = pattern.prefix[index]
        inside = layout.offsets() < prefix
        low = torch.where(inside, starts, low)
        high = torch.where(inside, torch.maximum(high, starts + prefix), high)
    if pattern.blocks is not None and pattern.mask is None:
        first, end = _block_bounds(pattern.blocks, segment)
        low = torch.where(pattern.blocks >= 0, torch.minimum(low, first), low)
        high = torch.where(pattern.blocks >= 0, torch.maximum(high, end), high)
    low, high = low.masked_fill(segment < 0, layout.tokens), high.masked_fill(segment < 0, 0)
    return low[:, layout.tokens - queries :], high[:, layout.tokens - queries :]


def _block_bounds(blocks: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Sk) int64 each: the first position with a token's number in its row or sequence, and the one after the
    last."""
    number = blocks.unique(return_inverse=True)[1]  # small numbers
    own, number = ((segment + 1) * blocks.numel() + number).unique(return_inverse=True)
    position = torch.arange(blocks.shape[1]).expand_as(blocks).flatten()
    first = torch.zeros_like(own).scatter_reduce_(0, number.flatten(), position, "amin", include_self=False)
    last = torch.zeros_like(own).scatter_reduce_(0, number.flatten(), position, "amax", include_self=False)
    return first[number], last[number] + 1
