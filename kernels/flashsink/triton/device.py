"""What the attention kernels share: which tile a program computes, and how it loads, masks and stores rows.

Names follow FlashAttention's: offs_m and offs_n are indices of queries and keys in their tensors, pos_m the positions
of queries among the keys, offs_m + seqlen_k - seqlen_q; [start, end) are the valid positions of a row or packed
sequence. A *slot* is a program's number along the first grid axis.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flashsink.triton.launch import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_WHERE = tl.constexpr(INTERPRETED)  # the interpreter knows no assembly
LOWEST = tl.constexpr(-1.0e38)  # finite, so that a row without a visible key so far makes no inf - inf


def slots(seqlen: int, sequences: int, group: int, block: int, packed: bool) -> int:
    """Number of programs along the first axis for ``seqlen`` positions of a row (of all sequences when packed)."""
    if packed:
        return max(seqlen * group - 1, 0) // block + sequences + 1
    return triton.cdiv(seqlen * group, block)


def mean_length(seqlen: int, sequences: int, packed: bool) -> int:
    """Tokens of a row, or of a packed sequence on average: what the host knows of lengths."""
    return seqlen // max(sequences, 1) if packed else seqlen


def precision(head_dim: int) -> str:
    """How float32 products are made. Exactly, without tensor cores, for small head dims; for larger ones that spills
    hundreds of registers, so there each is the sum of three tf32 products, which keeps 21 bits of 24."""
    return "ieee" if head_dim <= 64 else "tf32x3"


def head_dims(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """Kernel arguments D of q and k, DV of v, and the powers of two that hold them."""
    block = {name: max(16, triton.next_power_of_2(x.shape[3])) for name, x in (("BLOCK_D", q), ("BLOCK_DV", v))}
    return {"D": q.shape[3], "DV": v.shape[3], **block}


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
def _earliest(position, start, window, chunk):
    """The first key that window and chunk leave a query at ``position``; without order also the first query that
    sees a key there."""
    low = start
    if chunk is not None:
        low = start + (position - start) // chunk * chunk
    if window is not None:
        low = tl.maximum(low, position - window + 1)
    return low


@triton.jit
def _latest(position, start, end, window, chunk):
    """The position after the last query that sees a key at ``position`` through window and chunk; without order also
    after the last key that a query there sees."""
    high = end
    if chunk is not None:
        high = tl.minimum(high, start + ((position - start) // chunk + 1) * chunk)
    if window is not None:
        high = tl.minimum(high, position + window)
    return high


@triton.jit
def _block_range(positions, valid, begin, stop, block_starts, block_ends):
    """[begin, stop) with all tokens of the blocks that the valid ``positions`` are in."""
    low = tl.load(block_starts + positions, mask=valid, other=-1)
    high = tl.load(block_ends + positions, mask=valid, other=0)
    return tl.minimum(begin, tl.min(tl.where(low >= 0, low, begin))), tl.maximum(stop, tl.max(high))


@triton.jit
def key_range(start, end, first, last, pos_m, valid, pattern, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(begin, full, stop) for a tile of queries at pos_m, first..last of which are valid: they see no key outside
    [begin, stop), and whole blocks of keys in [begin, full), so that only those in [full, stop) need a mask. All
    three are the same where the tile has no valid query. ``pattern`` as in :func:`visible`."""
    window, chunk, until, block_starts, block_ends, mask, _ = pattern
    begin = start
    if CAUSAL:
        whole, stop = first + 1 - start, last + 1
    else:
        whole, stop = end - start, end
    if window is not None or chunk is not None:
        begin, whole = _earliest(first, start, window, chunk), 0
        if not CAUSAL:
            stop = _latest(last, start, end, window, chunk)
    if mask is not None:
        whole, stop = 0, end
    if until is not None:
        begin = tl.where(first < until, start, begin)
        stop = tl.where(first < until, tl.maximum(stop, until), stop)
    if block_starts is not None:
        begin, stop = _block_range(pos_m, valid, begin, stop, block_starts, block_ends)
    stop = tl.where(first > last, begin, stop)
    whole = tl.where(first > last, 0, whole)
    return begin, begin + whole // BLOCK_N * BLOCK_N, stop


@triton.jit
def query_range(
    start, end, first, last, offset, offs_n, valid, pattern, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """(begin, full, stop) for a tile of keys offs_n, first..last of which are valid: no query outside [begin, stop)
    sees one; blocks of queries in [begin, full) need a mask, those in [full, stop) see all its keys. All three are
    the same where the tile has no valid key. ``pattern`` as in :func:`visible`."""
    window, chunk, until, block_starts, block_ends, mask, _ = pattern
    begin, stop = tl.maximum(start, offset), end
    if CAUSAL and mask is None:
        begin = tl.maximum(first, offset)
    if window is not None or chunk is not None:
        stop = _latest(last, start, end, window, chunk)
        if not CAUSAL:
            begin = tl.maximum(_earliest(first, start, window, chunk), offset)
    if until is not None:
        begin = tl.where(first < until, tl.maximum(start, offset), begin)
        stop = tl.where(first < until, tl.maximum(stop, until), stop)
    if block_starts is not None:
        begin, stop = _block_range(offs_n, valid, begin, stop, block_starts, block_ends)
        begin = tl.maximum(begin, offset)
    if window is not None or chunk is not None or mask is not None:
        full = stop
    elif CAUSAL:
        full = tl.minimum(begin + tl.cdiv(tl.maximum(last - begin, 0), BLOCK_M) * BLOCK_M, end)
    else:
        full = begin
    begin = tl.where(first > last, stop, begin)
    return begin, tl.maximum(full, begin), stop


@triton.jit
def visible(pos_m, offs_n, start, end, pattern, CAUSAL: tl.constexpr):
    """Whether queries at the positions pos_m see keys at offs_n, which broadcast against each other: bool.

    ``pattern`` is (window, chunk, until, block_starts, block_ends, mask, its stride), None where there is none: the
    first two as in :class:`flashsink.types.Pattern`, ``until`` the end of the prefix, and pointers of the row: to the
    first token of every token's block, -1 outside of blocks, to the one after the block's last, 0 outside, and to the
    mask of a query at position 0, whether or not there is one.
    """
    window, chunk, until, block_starts, _, mask, stride_maskm = pattern
    valid_m, valid_n = (pos_m >= start) & (pos_m < end), (offs_n >= start) & (offs_n < end)
    if mask is not None:
        return tl.load(mask + pos_m.to(tl.int64) * stride_maskm + offs_n, mask=valid_m & valid_n, other=0) != 0
    seen = offs_n <= pos_m if CAUSAL else (offs_n < end) & (pos_m >= 0)
    if window is not None:
        seen = seen & (pos_m - offs_n < window)
        if not CAUSAL:
            seen = seen & (offs_n - pos_m < window)
    if chunk is not None:
        seen = seen & ((pos_m - start) // chunk == (offs_n - start) // chunk)
    if until is not None:
        seen = seen | ((pos_m < until) & (offs_n < until))
    if block_starts is not None:
        of_m = tl.load(block_starts + pos_m, mask=valid_m, other=-1)
        of_n = tl.load(block_starts + offs_n, mask=valid_n, other=-1)
        seen = seen | ((of_m == of_n) & (of_n >= 0))
    return seen


@triton.jit
def kept(x, low, high, fill):
    """``x`` where low <= high, else ``fill``, whatever x holds there.

    As ``tl.where``, of which LLVM makes integers with a bit for every element of a large tile, which costs more than
    the comparisons.
    """
    if _WHERE:
        return tl.where(low <= high, x, fill)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, $4, p; }",
            "=f,f,r,r,f",
            [x, low, high, fill],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def hide(x, pos_m, offs_n, start, end, fill, pattern, CAUSAL: tl.constexpr):
    """``x`` where queries at the positions pos_m see keys at offs_n, as :func:`visible` has it, else ``fill``."""
    window, chunk, until, block_starts, block_ends, mask, stride_maskm = pattern
    if (window is None and chunk is None) and ((until is None and block_starts is None) and mask is None):
        if CAUSAL:
            return kept(x, offs_n, pos_m, fill)
        else:
            return kept(x, offs_n, tl.where(pos_m >= 0, end - 1, -1), fill)
    else:
        return tl.where(visible(pos_m, offs_n, start, end, pattern, CAUSAL), x, fill)


@triton.jit
def capped(scores, cap):
    """(cap tanh(scores / cap), its derivative by the scores), both to a few units in the last place of float32: near 0
    by the polynomial of Cephes' tanhf, elsewhere by an exponential, where 1 - tanh^2 would have no digits left."""
    x = scores * (1.0 / cap)
    z = x * x
    near = x + x * z * (
        -3.33332819422e-1
        + z * (1.33314422036e-1 + z * (-5.37397155531e-2 + z * (2.06390887954e-2 - z * 5.70498872745e-3)))
    )
    rest = 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)  # 1 - |tanh|
    far = tl.where(x < 0.0, rest - 1.0, 1.0 - rest)
    small = tl.abs(x) < 0.625
    return cap * tl.where(small, near, far), tl.where(small, 1.0 - near * near, rest * (2.0 - rest))
