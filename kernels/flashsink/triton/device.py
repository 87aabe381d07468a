"""What the attention kernels share: which tile a program computes, and how it loads, masks and stores rows.

Names follow FlashAttention's: offs_m and offs_n are indices of queries and keys in their tensors, pos_m the positions
of queries among the keys, offs_m + seqlen_k - seqlen_q; [start, end) are the valid positions of a row or packed
sequence. A *slot* is a program's number along the first grid axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e38)  # finite, so that a row without a visible key so far makes no inf - inf


def slots(seqlen: int, sequences: int, group: int, block: int, packed: bool) -> int:
    """Number of programs along the first axis for ``seqlen`` positions of a row (of all sequences when packed)."""
    if packed:
        return max(seqlen * group - 1, 0) // block + sequences + 1
    return triton.cdiv(seqlen * group, block)


def precision(head_dim: int) -> str:
    """How float32 products are made. Exactly, without tensor cores, for small head dims; for larger ones that spills
    hundreds of registers, so there each is the sum of three tf32 products, which keeps 21 bits of 24."""
    return "ieee" if head_dim <= 64 else "tf32x3"


@triton.jit
def multiples(stride_b, stride_h, stride_s, UNIT: tl.constexpr):
    """A tensor's strides, known to the compiler to be multiples of UNIT; it knows those of 16 by itself."""
    if UNIT == 8:
        return stride_b // 8 * 8, stride_h // 8 * 8, stride_s // 8 * 8
    else:
        return stride_b, stride_h, stride_s


@triton.jit
def bounds(starts, lengths, n, seqlen):
    """[start, end) of sequence n, clamped to the tensor: values on a GPU are not checked on the host."""
    start = tl.minimum(tl.maximum(tl.load(starts + n).to(tl.int32), 0), seqlen)
    end = start + tl.maximum(tl.load(lengths + n).to(tl.int32), 0)
    return start, tl.minimum(end, seqlen)


@triton.jit
def locate(
    slot, batch, starts, lengths, segments, sequences, size, seqlen_k,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The tile of slot ``slot`` of row ``batch``: (batch, origin, count, start, end, n, tile).

    The tile is the ``tile``-th of the ``count`` indices that begin at ``origin``, GROUP rows each; positions
    [start, end) are valid; n is the sequence. Dense rows: all ``size`` indices of the row, valid or not. Packed: the
    tokens after the last sequence count as one more, without a valid position. Slot n <= sequences has the first tile
    of sequence n. Of the others slot sequences + i has the tile that begins in rows i BLOCK to (i + 1) BLOCK of the
    whole and is not its sequence's first: at most one does, in the sequence of row i BLOCK, which ``segments`` names.
    A slot without a tile has one beyond ``count``.
    """
    if PACKED:
        block = slot - sequences
        index = slot
        if block > 0:
            index = tl.load(segments + block * BLOCK // GROUP).to(tl.int32)
            index = tl.where(index < 0, sequences, tl.minimum(index, sequences))
        start, end = bounds(starts, lengths, tl.minimum(index, sequences - 1), seqlen_k)
        tail = index == sequences
        origin = tl.where(tail, end, start)
        count = tl.where(tail, seqlen_k, end) - origin
        start = tl.where(tail, end, start)
        tile = block - origin * GROUP // BLOCK
        tile = tl.where(block > 0, tl.where(tile > 0, tile, count * GROUP), 0)
        return batch, origin, count, start, end, tl.minimum(index, sequences - 1), tile
    else:
        start, end = bounds(starts, lengths, batch, seqlen_k)
        return batch, 0, size, start, end, batch, slot


@triton.jit
def load_rows(base, rows, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] at 64-bit offsets ``rows * stride``; 0 where masked and beyond D."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if D == BLOCK_D:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def load_all(base, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """:func:`load_rows` without a mask over rows, for the inner loops: they repeat the last valid row instead, whose
    probability there is 0."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, stride, value, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores ``value`` [rows, BLOCK_D] in the pointer's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask[:, None] & (offs_d < D)[None, :])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b with float32 sums; ``PRECISION`` says how float32 inputs are multiplied."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def query_tile(tile, origin, count, offset, start, end, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The queries of a tile, with the GROUP heads that share a key head as neighboring rows.

    Returns for every row offs_m, the head within the group, pos_m, whether it is in the tensor and whether it is
    valid, each [BLOCK_M]; and the first and the last valid position.
    """
    local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = origin + local // GROUP
    pos_m = offs_m + offset
    inside = local < count * GROUP
    valid = inside & (pos_m >= start) & (pos_m < end)
    first = tl.maximum(origin + offset + tile * BLOCK_M // GROUP, start)
    last = tl.minimum(origin + offset + (tile * BLOCK_M + BLOCK_M - 1) // GROUP, end - 1)
    return offs_m, local % GROUP, pos_m, inside, valid, first, last


@triton.jit
def key_tile(tile, origin, count, start, end, BLOCK_N: tl.constexpr):
    """The keys of a tile: offs_n (their positions too), whether each is in the tensor and whether it is valid, each
    [BLOCK_N]; and the first and the last valid position."""
    start_n = origin + tile * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    inside = offs_n < origin + count
    valid = inside & (offs_n >= start) & (offs_n < end)
    return offs_n, inside, valid, tl.maximum(start_n, start), tl.minimum(start_n + BLOCK_N, end) - 1


@triton.jit
def key_range(start, end, first, last, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(full, stop) for a tile of queries first..last: all its valid queries see whole blocks of keys in
    [start, full); those in [full, stop) need a mask. Both are ``start`` where the tile has no valid query."""
    if CAUSAL:
        whole, stop = first + 1 - start, last + 1
    else:
        whole, stop = end - start, end
    stop = tl.where(first > last, start, stop)
    whole = tl.where(first > last, 0, whole)
    return start + whole // BLOCK_N * BLOCK_N, stop


@triton.jit
def query_range(start, end, first, last, offset, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """(begin, full) for a tile of keys first..last: blocks of queries in [begin, full) need a causal mask, those in
    [full, end) see all its keys. Both are ``end`` where the tile has no valid key."""
    begin = tl.maximum(start, offset)
    if CAUSAL:
        begin = tl.maximum(first, offset)
        full = tl.minimum(begin + tl.cdiv(tl.maximum(last - begin, 0), BLOCK_M) * BLOCK_M, end)
    else:
        full = begin
    begin = tl.where(first > last, end, begin)
    return begin, tl.maximum(full, begin)


@triton.jit
def visible(offs_n, pos_m, end, CAUSAL: tl.constexpr):
    """[BLOCK_M, BLOCK_N] bool: whether a query sees a key."""
    if CAUSAL:
        return offs_n[None, :] <= pos_m[:, None]
    else:
        return (offs_n[None, :] < end) & (pos_m[:, None] >= 0)
