"""What the attention kernels share: where a program's tile lies, and the scores of one tile.

Names: *index* counts positions in a tensor's token dimension, *position* those of the keys; a query's position is
its index plus ``offset`` = keys - queries. A *slot* is a program's number along the first grid axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e38)  # finite, so that a row without a visible key so far makes no inf - inf


def slots(tokens: int, sequences: int, group: int, block: int, packed: bool) -> int:
    """Number of programs along the first axis for ``tokens`` positions of a row (all rows of one when packed)."""
    if packed:
        return tokens * group // block + sequences + 1
    return triton.cdiv(tokens * group, block)


def precision(head_dim: int) -> str:
    """How float32 products are made. Exactly, without tensor cores, for small head dims; for larger ones that spills
    hundreds of registers, so there each is the sum of three tf32 products, which keeps 21 bits of 24."""
    return "ieee" if head_dim <= 64 else "tf32x3"


@triton.jit
def _bounds(starts, lengths, n, tokens):
    """[low, high) of sequence n, cut to the tokens there are: values on a GPU are not checked on the host."""
    low = tl.minimum(tl.maximum(tl.load(starts + n).to(tl.int32), 0), tokens)
    high = low + tl.maximum(tl.load(lengths + n).to(tl.int32), 0)
    return low, tl.minimum(high, tokens)


@triton.jit
def locate(
    slot, row, starts, lengths, sequences, size, tokens, GROUP: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr
):
    """Where slot ``slot`` of row ``row`` lies: (row, origin, count, low, high, n, tile).

    The tile is the ``tile``-th of the ``count`` indices that begin at ``origin``, GROUP rows each; positions
    [low, high) are valid; n is the sequence. Dense rows: all ``size`` indices of the row, valid or not. Packed: the
    slots of sequence n begin at starts[n] * GROUP // BLOCK + n. That is enough room for its tiles and needs no
    table of tiles; what lies behind the last sequence counts as one more, without a valid position.
    """
    if PACKED:
        last_low, last_high = _bounds(starts, lengths, sequences - 1, tokens)
        before = 0
        for first in range(0, sequences + 1, 128):
            n = first + tl.arange(0, 128)
            start = tl.load(starts + n, mask=n < sequences, other=0).to(tl.int32)
            start = tl.where(n == sequences, last_high, start)
            begins = start * GROUP // BLOCK + n
            before += tl.sum(((n <= sequences) & (begins <= slot)).to(tl.int32))
        index = before - 1
        low, high = _bounds(starts, lengths, tl.minimum(index, sequences - 1), tokens)
        tail = index == sequences
        origin = tl.where(tail, high, low)
        count = tl.where(tail, tokens, high) - origin
        low = tl.where(tail, high, low)
        return row, origin, count, low, high, tl.minimum(index, sequences - 1), slot - (origin * GROUP // BLOCK + index)
    else:
        low, high = _bounds(starts, lengths, row, tokens)
        return row, 0, size, low, high, row, slot


@triton.jit
def load_rows(base, index, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) at 64-bit offsets ``index * stride``; 0 where masked and beyond D."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    if D == BLOCK_D:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_all(base, index, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """:func:`load_rows` without a mask over rows. For the inner loops, which repeat the last valid row instead:
    its probability is 0."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, index, stride, value, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b with float32 sums; ``PRECISION`` says how float32 inputs are multiplied."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def query_tile(tile, origin, count, offset, low, high, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The queries of a tile, with the GROUP heads that share a key head as neighbouring rows.

    Returns per row the index, the head within the group, its position, whether it lies in the tensor and whether it
    is valid; and of the valid ones the first and the last position.
    """
    local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = origin + local // GROUP
    position = index + offset
    inside = local < count * GROUP
    valid = inside & (position >= low) & (position < high)
    first = tl.maximum(origin + offset + tile * BLOCK_M // GROUP, low)
    last = tl.minimum(origin + offset + (tile * BLOCK_M + BLOCK_M - 1) // GROUP, high - 1)
    return index, local % GROUP, position, inside, valid, first, last


@triton.jit
def key_range(low, high, first, last, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(full, end): blocks of keys that begin in [low, full) are seen whole by all valid queries, those in
    [full, end) need a mask. Both are low where the tile has no valid query."""
    if CAUSAL:
        whole, end = first + 1 - low, last + 1
    else:
        whole, end = high - low, high
    end = tl.where(first > last, low, end)
    whole = tl.where(first > last, 0, whole)
    return low + whole // BLOCK_N * BLOCK_N, end


@triton.jit
def visible(key, position, high, CAUSAL: tl.constexpr):
    """(rows, keys) bool."""
    if CAUSAL:
        return key[None, :] <= position[:, None]
    else:
        return (key[None, :] < high) & (position[:, None] >= 0)
