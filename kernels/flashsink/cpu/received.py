"""How much attention every key received, from q, k and the log-sum-exp of any attention (csrc/received.cpp).

A second, light pass: the products of a tile of queries with the keys they may see come from torch's BLAS into one
reused buffer; exponentials and column sums are C++. Dimensions: B rows, H query and Hk key heads, Sq queries,
Sk keys, D head dim, N sequences (N = B in dense layout).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashsink.cpu import short
from flashsink.cpu.library import library
from flashsink.cpu.packed import buckets
from flashsink.operators import adjacent

TILE = 64  # queries of a tile
PRODUCTS = 1 << 19  # products held at once (2 MB: two cores' caches), more only where one head's tile is larger
SLACK = 64  # floats that csrc/received.cpp may read past a tile


def forward_like(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return q.new_zeros((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32)


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    query_starts: Tensor | None,
    packed: bool,
    causal: bool,
    scale: float,
) -> Tensor:
    """(B, H, Sk) float32: sum over the queries from ``query_starts`` on that see a key of exp(scale q k - lse).

    Args:
        q: (B, H, Sq, D), the last Sq positions, and k: (B, Hk, Sk, D), of any strides and floating dtype; the
            products are float32. Padding may hold anything.
        lse: (B, H, Sq) float32.
        starts, lengths: (N,) int64, and query_starts: (N,) int64 or None for all, as in
            :class:`flashsink.types.Layout`.
    """
    check(q, k, lse, starts, lengths, packed)
    out = forward_like(q, k)
    if short.serves(q, k, lengths):
        bounds = bounds_of(q, k, starts, lengths, query_starts)
        short.received(q, k, lse, out, bounds, packed, short.How(causal, scale))
        return out
    if not packed:
        return _dense(q, k, lse, out, bounds_of(q, k, starts, lengths, query_starts), causal, scale)
    for bucket in buckets(starts, lengths, k.shape[2]):
        own = None if query_starts is None else query_starts[bucket.which] - bucket.starts
        queries, keys = bucket.spread(q), bucket.spread(k)
        sums = out.new_zeros(len(queries), out.shape[1], queries.shape[2])
        bounds = bounds_of(queries, keys, *bucket.rows, own)
        bucket.collect(_dense(queries, keys, bucket.spread(lse), sums, bounds, causal, scale), out)
    return out


def _dense(q: Tensor, k: Tensor, lse: Tensor, out: Tensor, bounds: Tensor, causal: bool, scale: float) -> Tensor:
    """``out``, to which the sums are added."""
    lse = lse.contiguous()
    buffer = q.new_empty(0, dtype=torch.float32)
    for part in parts(q, k, bounds):
        buffer = _part(q, k, lse, out, bounds, part, causal, scale, buffer)
    return out


def check(q: Tensor, k: Tensor, lse: Tensor, starts: Tensor, lengths: Tensor, packed: bool) -> None:
    b, h, queries, d = q.shape
    if k.shape[0] != b or k.shape[3] != d or h % k.shape[1] or k.shape[2] < queries:
        raise ValueError(f"k: expected keys for queries {tuple(q.shape)}, got {tuple(k.shape)}")
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(f"lse: expected float32 {tuple(q.shape[:3])}, got {lse.dtype} {tuple(lse.shape)}")
    for name, vector in (("starts", starts), ("lengths", lengths)):
        if vector.dtype != torch.int64 or vector.dim() != 1 or len(vector) != len(starts):
            raise ValueError(f"{name}: expected int64 (N,), got {vector.dtype} {tuple(vector.shape)}")
    if b != (1 if packed else len(starts)):
        raise ValueError(f"starts: expected one entry a row, or one packed row, got {len(starts)}")


def bounds_of(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor, query_starts: Tensor | None) -> Tensor:
    """(3, N) int64: start, end and first counted query of every row or sequence, clamped to the tensors."""
    keys = k.shape[2]
    starts = starts.clamp(0, keys)
    ends = torch.minimum(starts + lengths.clamp(min=0), starts.new_tensor(keys))
    first = starts.clamp(min=keys - q.shape[2])
    return torch.stack([starts, ends, first if query_starts is None else torch.maximum(first, query_starts)])


Part = tuple[slice, slice]  # rows of the batch, key heads


def parts(q: Tensor, k: Tensor, bounds: Tensor) -> Iterator[Part]:
    """What is computed together: several rows where they are short, else several or one key head of one row."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    starts, ends, _ = bounds.tolist()
    longest = max((end - start for start, end in zip(starts, ends, strict=True)), default=0)
    head = group * min(TILE, longest) * longest  # products of one key head's largest tile
    some = max(1, PRODUCTS // max(head, 1))
    step = max(1, some // heads)
    for n in range(0, len(starts), step):
        last = min(n + step, len(starts))
        for g in range(0, heads, some):
            yield slice(n, last), slice(g, min(g + some, heads))


def _part(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    out: Tensor,
    bounds: Tensor,
    part: Part,
    causal: bool,
    scale: float,
    buffer: Tensor,
) -> Tensor:
    """Adds one part to ``out``; returns the buffer for the next."""
    batch, heads = part
    group, unseen = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    own = bounds[:, batch].contiguous()
    start, end, query_start = int(own[0].min()), int(own[1].max()), int(own[2].min())
    keys = adjacent(k[batch, heads, start:end].float()).flatten(0, 1)
    queries = q.unflatten(1, (-1, group))[batch, heads]
    b, g, *_, d = queries.shape
    head = heads.start * group
    for low in range(query_start, end, TILE):
        high = min(low + TILE, end)
        seen = (high if causal else end) - start
        count = (high - low) * group
        size = b * g * count * seen
        if buffer.numel() < size + SLACK:
            buffer = buffer.new_empty(size + SLACK)
        folded = queries[:, :, :, low - unseen : high - unseen].float().reshape(b * g, count, d)
        torch.bmm(folded, keys[:, :seen].mT, out=buffer[:size].view(b * g, count, seen))
        library().flashsink_column_sums(
            *(buffer.data_ptr(), lse[batch.start, head, low - unseen :].data_ptr()),
            out[batch.start, head, start:].data_ptr(),
            *(b, g * group, high - low, seen, low, start),
            *(lse.stride(0), lse.stride(1), out.stride(0), out.stride(1)),
            *(own[0].data_ptr(), own[1].data_ptr(), own[2].data_ptr(), int(causal), scale, torch.get_num_threads()),
        )
    return buffer
