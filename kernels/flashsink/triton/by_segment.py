"""The statistics pass by segment: what the queries of every segment give to every key, and the entropy of every query.

With P = exp(scale q k^T - lse), as in :mod:`flashsink.triton.received`:

    sums[a, j] = sum over the queries i of segment a of P_ij      entropy[i] = -sum over the keys j of P_ij ln P_ij

The first is a product of P^T with the queries' segments as columns of zeros and ones. Three bfloat16 hold all 24 bits
of a probability, so three such products with float32 sums are exact. One kernel owns keys and another queries: the same
bits every time. Dimensions: B rows, H query and Hk key heads, GROUP = H / Hk, N sequences (N = B in dense layout).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink.operators import adjacent
from flashsink.triton import patterns, tiles
from flashsink.triton.device import (
    LN2,
    LOG2E,
    LOWEST,
    capped,
    hide,
    key_range,
    key_tile,
    load_all,
    load_rows,
    locate,
    mean_length,
    multiples,
    precision,
    product,
    query_range,
    query_tile,
    slots,
)
from flashsink.triton.launch import VARYING, launch, strides


@triton.jit
def _segments_step(
    sums, k_tile, offs_n, q, lse, kinds, start_m, offset, start, end, pattern, stride_qm, qk_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: the new sums [BLOCK_N, BLOCK_S]."""
    pos_m = start_m + tl.arange(0, BLOCK_M)
    offs_m = tl.minimum(pos_m, end - 1) - offset
    q_tile = load_all(q, offs_m, stride_qm, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lse_i = tl.where(pos_m < end, tl.load(lse + offs_m) * LOG2E, float("inf"))  # [BLOCK_M]
    chosen = load_all(kinds, offs_m, BLOCK_S, BLOCK_S, BLOCK_S)  # [BLOCK_M, BLOCK_S]
    qk_t = product(k_tile, tl.trans(q_tile), PRECISION) * qk_scale  # [BLOCK_N, BLOCK_M]
    if cap is not None:
        qk_t, _ = capped(qk_t, cap)
    p_t = tl.exp2(qk_t - lse_i[None, :])
    if MASKED:
        p_t = hide(p_t, pos_m[None, :], offs_n[:, None], start, end, 0.0, pattern, CAUSAL)
    for _ in tl.static_range(3):
        part = p_t.to(tl.bfloat16)
        sums = tl.dot(part, chosen, sums)
        p_t -= part.to(tl.float32)
    return sums


@triton.jit(do_not_specialize=VARYING)
def segments_received_kernel(
    q,  # (B, H, seqlen_q, D)
    k,  # (B, Hk, seqlen_k, D)
    lse,  # (B, H, seqlen_q) float32, contiguous
    kinds,  # (B, seqlen_q, BLOCK_S) bfloat16, contiguous: 1 at the query's segment, at ``number`` where it has none
    sums,  # (B, H, number + 1, seqlen_k) float32, contiguous
    starts, lengths,  # (N,) int64
    segments,  # (seqlen_k,) int64 where packed
    query_starts,  # (N,) int64, position of the first query that counts; or None
    window, chunk, prefix, block_starts, block_ends, mask, stride_maskb, stride_maskm, cap,  # flashsink.triton.patterns
    sequences, number, seqlen_q, seqlen_k, scale, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hk, B). A program holds BLOCK_N keys and walks over the queries that see them, head by head."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, UNIT)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, UNIT)
    off_hk = tl.program_id(1)
    batch, origin, count, start, end, n, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, segments, sequences, seqlen_k, seqlen_k, 1, BLOCK_N, PACKED
    )
    if tile * BLOCK_N >= count:
        return
    offs_n, inside, valid, first, last = key_tile(tile, origin, count, start, end, BLOCK_N)
    offset = seqlen_k - seqlen_q
    query_start = offset
    if query_starts is not None:
        query_start = tl.maximum(offset, tl.load(query_starts + n).to(tl.int32))
    off_b, head64, heads = batch.to(tl.int64), off_hk.to(tl.int64), tl.num_programs(1) * GROUP
    if prefix is not None:
        prefix = tl.load(prefix + n).to(tl.int32)  # where it ends
    if block_starts is not None:
        block_starts, block_ends = block_starts + off_b * seqlen_k, block_ends + off_b * seqlen_k
    if mask is not None:
        mask += off_b * stride_maskb - (seqlen_k - seqlen_q).to(tl.int64) * stride_maskm
    pattern = (window, chunk, prefix, block_starts, block_ends, mask, stride_maskm)
    begin, full, stop = query_range(start, end, first, last, query_start, offs_n, valid, pattern, BLOCK_M, CAUSAL)
    k_rows = k + off_b * stride_kb + head64 * stride_kh
    k_tile = load_rows(k_rows, offs_n, stride_kn, valid, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    kind = tl.arange(0, BLOCK_S)[None, :]
    kinds += off_b * seqlen_q * BLOCK_S
    for member in range(GROUP):
        off_h = head64 * GROUP + member
        acc = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
        q_rows, lse_rows = q + off_b * stride_qb + off_h * stride_qh, lse + (off_b * heads + off_h) * seqlen_q
        for start_m in range(begin, full, BLOCK_M):
            acc = _segments_step(
                acc, k_tile, offs_n, q_rows, lse_rows, kinds, start_m, offset, start, end, pattern, stride_qm,
                scale * LOG2E, cap, D, BLOCK_D, BLOCK_M, BLOCK_S, CAUSAL, True, PRECISION,
            )  # fmt: skip
        for start_m in range(full, stop, BLOCK_M):
            acc = _segments_step(
                acc, k_tile, offs_n, q_rows, lse_rows, kinds, start_m, offset, start, end, pattern, stride_qm,
                scale * LOG2E, cap, D, BLOCK_D, BLOCK_M, BLOCK_S, CAUSAL, False, PRECISION,
            )  # fmt: skip
        columns = ((off_b * heads + off_h) * (number + 1) + kind) * seqlen_k + offs_n.to(tl.int64)[:, None]
        tl.store(sums + columns, tl.where(valid[:, None], acc, 0.0), mask=inside[:, None] & (kind <= number))


@triton.jit
def _rescaled(weighted, l_i, shift):
    """The sums of e x and of e, with e = exp2(x), for a maximum from which it is ``shift`` to the one of before."""
    shift = tl.maximum(shift, LOWEST)
    alpha = tl.exp2(shift)
    return alpha * (weighted + shift * l_i), alpha * l_i


@triton.jit
def _entropy_step(
    weighted, l_i, m_i, q_tile, k, stride_kn, start_n, start, end, pos_m, pattern, qk_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    POSITIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the new sums of e x and of e, and the maximum, each [BLOCK_M]. Products are scaled after the
    maximum is taken off them, which is exact where they are large and close. POSITIVE: as in the forward."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, end - 1) if MASKED else offs_n
    qk = product(q_tile, tl.trans(load_all(k, rows, stride_kn, D, BLOCK_D)), PRECISION)  # [BLOCK_M, BLOCK_N]
    if cap is not None or not POSITIVE:
        qk *= qk_scale
        qk_scale = 1.0
    if cap is not None:
        qk, _ = capped(qk, cap)
    if MASKED:
        qk = hide(qk, pos_m[:, None], offs_n[None, :], start, end, -float("inf"), pattern, CAUSAL)
    m_ij = tl.maximum(m_i, tl.max(qk, 1))
    weighted, l_i = _rescaled(weighted, l_i, (m_i - m_ij) * qk_scale)
    x = (qk - m_ij[:, None]) * qk_scale
    e = tl.exp2(x)
    return weighted + tl.sum(tl.where(e == 0.0, 0.0, e * x), 1), l_i + tl.sum(e, 1), m_ij


@triton.jit(do_not_specialize=VARYING)
def entropy_kernel(
    q,  # (B, H, seqlen_q, D)
    k,  # (B, Hk, seqlen_k, D)
    lse, entropy,  # (B, H, seqlen_q) float32, contiguous
    sink_logits,  # (H,) or None
    starts, lengths,  # (N,) int64
    segments,  # (seqlen_q,) int64 where packed
    window, chunk, prefix, block_starts, block_ends, mask, stride_maskb, stride_maskm, cap,  # flashsink.triton.patterns
    sequences, seqlen_q, seqlen_k, scale, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, POSITIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hk, B), as in the forward: the entropy of BLOCK_M rows. From their maxima, since a probability from
    ``lse`` has the rounding error of the scores, which may be large."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, UNIT)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, UNIT)
    off_hk = tl.program_id(1)
    batch, origin, count, start, end, n, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, segments, sequences, seqlen_q, seqlen_k,
        GROUP, BLOCK_M, PACKED,
    )  # fmt: skip
    num_tiles = tl.cdiv(count * GROUP, BLOCK_M)
    if tile >= num_tiles:
        return
    offs_m, member, pos_m, inside, valid, first, last = query_tile(
        num_tiles - 1 - tile, origin, count, seqlen_k - seqlen_q, start, end, GROUP, BLOCK_M
    )
    off_b, off_h = batch.to(tl.int64), off_hk * GROUP + member
    q_rows = q + off_b * stride_qb + off_h.to(tl.int64)[:, None] * stride_qh
    q_tile = load_rows(q_rows, offs_m, stride_qm, valid, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    rows = (off_b * tl.num_programs(1) * GROUP + off_h) * seqlen_q + offs_m
    k += off_b * stride_kb + off_hk.to(tl.int64) * stride_kh
    if prefix is not None:
        prefix = tl.load(prefix + n).to(tl.int32)  # where it ends
    if block_starts is not None:
        block_starts, block_ends = block_starts + off_b * seqlen_k, block_ends + off_b * seqlen_k
    if mask is not None:
        mask += off_b * stride_maskb - (seqlen_k - seqlen_q).to(tl.int64) * stride_maskm
    pattern = (window, chunk, prefix, block_starts, block_ends, mask, stride_maskm)
    begin, full, stop = key_range(start, end, first, last, pos_m, valid, pattern, BLOCK_N, CAUSAL)
    weighted, l_i = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.zeros([BLOCK_M], tl.float32) + LOWEST
    for start_n in range(begin, full, BLOCK_N):
        weighted, l_i, m_i = _entropy_step(
            weighted, l_i, m_i, q_tile, k, stride_kn, start_n, start, end, pos_m, pattern, scale * LOG2E, cap, D,
            BLOCK_D, BLOCK_N, CAUSAL, False, POSITIVE, PRECISION,
        )  # fmt: skip
    for start_n in range(full, stop, BLOCK_N):
        weighted, l_i, m_i = _entropy_step(
            weighted, l_i, m_i, q_tile, k, stride_kn, start_n, start, end, pos_m, pattern, scale * LOG2E, cap, D,
            BLOCK_D, BLOCK_N, CAUSAL, True, POSITIVE, PRECISION,
        )  # fmt: skip
    total = l_i
    if mask is not None:
        valid &= (l_i != 0.0) | (tl.load(lse + rows, mask=inside, other=0.0) != 0.0)  # where it hides all keys
    if sink_logits is not None:
        z = tl.load(sink_logits + off_h).to(tl.float32) * LOG2E  # [BLOCK_M]
        if cap is None and POSITIVE:
            m_i *= scale * LOG2E
        m_ij = tl.maximum(m_i, z)
        weighted, l_i = _rescaled(weighted, l_i, m_i - m_ij)
        total = l_i + tl.exp2(z - m_ij)
    value = (l_i * tl.log2(total) - weighted) / total * LN2
    tl.store(entropy + rows, tl.where(valid, value, 0.0), mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    sink_logits: Tensor | None,
    kinds: Tensor,
    number: int,
    starts: Tensor,
    lengths: Tensor,
    segments: Tensor | None,
    query_starts: Tensor | None,
    packed: bool,
    causal: bool,
    scale: float,
    *pattern: Any,
) -> tuple[Tensor, Tensor]:
    """(sums (B, H, number + 1, Sk), entropy (B, H, Sq)), both float32 and 0 at padding.

    ``kinds`` (B, Sq) int64 is the segment of every query, below ``number``; those of no segment have ``number``. The
    queries before ``query_starts`` are in no sum. ``pattern`` is a :class:`flashsink.triton.patterns.Operands`.
    """
    q, k, lse = adjacent(q), adjacent(k), lse.contiguous()
    # the kernels take vectors as contiguous: those that a mask carries are not
    starts, lengths = starts.contiguous(), lengths.contiguous()
    query_starts = None if query_starts is None else query_starts.contiguous()
    b, h, seqlen_q, d = q.shape
    heads_k, seqlen_k = k.shape[1], k.shape[2]
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    sums, entropy = forward_like(q, k, lse, sink_logits, kinds, number)
    places = torch.arange(max(16, triton.next_power_of_2(number + 1)), device=q.device)
    chosen = (kinds[..., None] == places).bfloat16()
    group, length = h // heads_k, mean_length(seqlen_k, len(starts), packed)
    common: dict[str, Any] = {
        "q": q, "k": k, "lse": lse, "starts": starts, "lengths": lengths, "segments": segments,
        "sequences": len(starts), "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "scale": scale,
        **patterns.arguments(pattern), **strides({"bhm": {"q": q}, "bhn": {"k": k}}),
        "GROUP": group, "D": d, "BLOCK_D": max(16, triton.next_power_of_2(d)), "PACKED": packed, "CAUSAL": causal,
        "PRECISION": precision(d),
    }  # fmt: skip
    tile = tiles.choose("by_segment", d, q.element_size(), q.device, group, length, patterns.kind(pattern))
    launch(
        segments_received_kernel, (slots(seqlen_k, len(starts), 1, tile.blocks["BLOCK_N"], packed), heads_k, b), tile,
        **common, kinds=chosen, sums=sums, number=number, query_starts=query_starts, BLOCK_S=len(places),
    )  # fmt: skip
    launch(
        entropy_kernel, (slots(seqlen_q, len(starts), group, tile.blocks["BLOCK_M"], packed), heads_k, b), tile,
        **common, entropy=entropy, sink_logits=sink_logits, POSITIVE=scale > 0.0,
    )  # fmt: skip
    return sums, entropy


def forward_like(
    q: Tensor, k: Tensor, lse: Tensor, sink_logits: Tensor | None, kinds: Tensor, number: int, *_: Any
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    sums = torch.empty((q.shape[0], q.shape[1], number + 1, k.shape[2]), **options)
    return sums, torch.empty(q.shape[:3], **options)
