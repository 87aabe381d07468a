"""Attention, forward (FlashAttention-2, Dao 2023): online softmax over blocks of keys, GQA groups packed into tiles.

With S = scale Q K^T masked, for every row and block of keys j (m_i and l_i start at -inf and 0):

    m_ij  = max(m_i, rowmax(S_j))      P_j = exp(S_j - m_ij)      alpha = exp(m_i - m_ij)
    l_i   = alpha l_i + rowsum(P_j)    acc = alpha acc + P_j V_j  m_i   = m_ij

and at the end out = acc / l_i, lse = m_i + log(l_i). A sink logit z is one more score without a value. Exponentials
are base 2, of scores times log2(e). Dimensions: B rows, H query and Hk key heads, GROUP = H / Hk, N sequences
(N = B in dense layout).
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
    head_dims,
    hide,
    key_range,
    load_all,
    load_rows,
    locate,
    mean_length,
    multiples,
    precision,
    product,
    query_tile,
    slots,
    store_rows,
    visible,
)
from flashsink.triton.launch import VARYING, launch, strides


@triton.jit
def _forward_step(
    acc, l_i, m_i, q_tile, k, v, stride_kn, stride_vn, start_n, start, end, pos_m, pattern, qk_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, POSITIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the new acc, l_i and m_i. POSITIVE: ``qk_scale`` is, so that the largest product gives the
    largest score, and a masked one stays -inf."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, end - 1) if MASKED else offs_n
    k_tile = load_all(k, rows, stride_kn, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    qk = product(q_tile, tl.trans(k_tile), PRECISION)  # [BLOCK_M, BLOCK_N]
    if cap is not None or not POSITIVE:
        qk *= qk_scale
        qk_scale = 1.0
    if cap is not None:
        qk, _ = capped(qk, cap)
    if MASKED:
        qk = hide(qk, pos_m[:, None], offs_n[None, :], start, end, -float("inf"), pattern, CAUSAL)
    m_ij = tl.maximum(m_i, tl.max(qk, 1) * qk_scale)
    p = tl.exp2(qk * qk_scale - m_ij[:, None])
    alpha = tl.exp2(m_i - m_ij)
    v_tile = load_all(v, rows, stride_vn, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    acc = acc * alpha[:, None] + product(p.to(v_tile.dtype), v_tile, PRECISION)
    return acc, l_i * alpha + tl.sum(p, 1), m_ij


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q,  # (B, H, seqlen_q, D)
    k,  # (B, Hk, seqlen_k, D)
    v,  # (B, Hk, seqlen_k, DV)
    sink_logits,  # (H,) or None
    out,  # (B, H, seqlen_q, DV)
    lse,  # (B, H, seqlen_q) float32, contiguous
    starts, lengths,  # (N,) int64
    segments,  # (seqlen_q,) int64 where packed
    window, chunk, prefix, block_starts, block_ends, mask, stride_maskb, stride_maskm, cap,  # flashsink.triton.patterns
    sequences, seqlen_q, seqlen_k, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, POSITIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hk, B). A program computes BLOCK_M rows, the GROUP query heads of neighboring queries, against one
    key head: a group of short sequences fills a tile, and keys and values are loaded once for the group. Blocks of
    keys that all rows see whole run without a mask. POSITIVE: ``scale`` is."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, UNIT)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, UNIT)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, UNIT)
    stride_ob, stride_oh, stride_om = multiples(stride_ob, stride_oh, stride_om, UNIT)
    off_hk = tl.program_id(1)
    batch, origin, count, start, end, n, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, segments, sequences, seqlen_q, seqlen_k,
        GROUP, BLOCK_M, PACKED,
    )  # fmt: skip
    num_tiles = tl.cdiv(count * GROUP, BLOCK_M)
    if tile >= num_tiles:
        return
    # with a causal mask the last tile is the longest: it begins first
    offs_m, member, pos_m, inside, valid, first, last = query_tile(
        num_tiles - 1 - tile, origin, count, seqlen_k - seqlen_q, start, end, GROUP, BLOCK_M
    )
    off_b, off_h = batch.to(tl.int64), off_hk * GROUP + member
    q_rows = q + off_b * stride_qb + off_h.to(tl.int64)[:, None] * stride_qh
    q_tile = load_rows(q_rows, offs_m, stride_qm, valid, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    k += off_b * stride_kb + off_hk.to(tl.int64) * stride_kh
    v += off_b * stride_vb + off_hk.to(tl.int64) * stride_vh
    if prefix is not None:
        prefix = tl.load(prefix + n).to(tl.int32)  # where it ends
    if block_starts is not None:
        block_starts, block_ends = block_starts + off_b * seqlen_k, block_ends + off_b * seqlen_k
    if mask is not None:
        mask += off_b * stride_maskb - (seqlen_k - seqlen_q).to(tl.int64) * stride_maskm
    pattern = (window, chunk, prefix, block_starts, block_ends, mask, stride_maskm)
    begin, full, stop = key_range(start, end, first, last, pos_m, valid, pattern, BLOCK_N, CAUSAL)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.zeros([BLOCK_M], tl.float32) + LOWEST
    for start_n in range(begin, full, BLOCK_N):
        acc, l_i, m_i = _forward_step(
            acc, l_i, m_i, q_tile, k, v, stride_kn, stride_vn, start_n, start, end, pos_m, pattern, scale * LOG2E, cap,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAUSAL, False, POSITIVE, PRECISION,
        )  # fmt: skip
    for start_n in range(full, stop, BLOCK_N):
        acc, l_i, m_i = _forward_step(
            acc, l_i, m_i, q_tile, k, v, stride_kn, stride_vn, start_n, start, end, pos_m, pattern, scale * LOG2E, cap,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAUSAL, True, POSITIVE, PRECISION,
        )  # fmt: skip
    if mask is not None:
        empty = valid & (l_i == 0.0)
        if tl.sum(empty.to(tl.int32)) > 0:
            # all that they see is -inf, which makes them NaN as without a mask, or it hides all keys
            seen = tl.zeros([BLOCK_M], tl.int32)
            for start_n in range(begin, stop, BLOCK_N):
                offs_n = start_n + tl.arange(0, BLOCK_N)
                sees = visible(pos_m[:, None], offs_n[None, :], start, end, pattern, CAUSAL)
                seen = tl.maximum(seen, tl.max(sees.to(tl.int32), 1))
            valid &= (l_i != 0.0) | (seen > 0)
    if sink_logits is not None:
        z = tl.load(sink_logits + off_h).to(tl.float32) * LOG2E  # [BLOCK_M]
        m_ij = tl.maximum(m_i, z)
        alpha = tl.exp2(m_i - m_ij)
        acc, l_i, m_i = acc * alpha[:, None], l_i * alpha + tl.exp2(z - m_ij), m_ij
    l_i = tl.where(valid, l_i, 1.0)
    acc = tl.where(valid[:, None], acc / l_i[:, None], 0.0)
    out_rows = out + off_b * stride_ob + off_h.to(tl.int64)[:, None] * stride_oh
    store_rows(out_rows, offs_m, stride_om, acc, inside, DV, BLOCK_DV)
    lse += (off_b * tl.num_programs(1) + off_hk) * GROUP * seqlen_q
    tl.store(lse + member * seqlen_q + offs_m, tl.where(valid, (m_i + tl.log2(l_i)) * LN2, 0.0), mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    capture: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    segments: Tensor | None,
    query_starts: Tensor | None,
    packed: bool,
    causal: bool,
    scale: float,
    *pattern: Any,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, Dv) in q's dtype, lse (B, H, Sq) float32): both 0 at padded queries.

    ``out`` is (B, Sq, H, Dv) in memory, as the next projection reads it. ``segments`` (Sk,), needed where packed, is
    what :func:`flashsink.triton.segments.forward` makes. ``capture`` and ``query_starts`` are for the backward alone;
    ``pattern`` is a :class:`flashsink.triton.patterns.Operands`.
    """
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    # the kernels take vectors as contiguous: those that a mask carries, or a column of a table, are not
    starts, lengths = starts.contiguous(), lengths.contiguous()
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    b, h, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1], k.shape[2]
    out, lse = forward_like(q, k, v)
    group = h // heads_k
    length, seen = mean_length(seqlen_k, len(starts), packed), patterns.kind(pattern)
    tile = tiles.choose("forward", tiles.widest(q, v), q.element_size(), q.device, group, length, seen)
    launch(
        forward_kernel,
        (slots(seqlen_q, len(starts), group, tile.blocks["BLOCK_M"], packed), heads_k, b),
        tile,
        q=q, k=k, v=v, sink_logits=sink_logits, out=out, lse=lse, starts=starts, lengths=lengths,
        segments=segments,
        sequences=len(starts), seqlen_q=seqlen_q, seqlen_k=seqlen_k, scale=scale,
        **patterns.arguments(pattern), **strides({"bhm": {"q": q, "o": out}, "bhn": {"k": k, "v": v}}),
        **head_dims(q, v), GROUP=group, PACKED=packed, CAUSAL=causal, PRECISION=precision(tiles.widest(q, v)),
        POSITIVE=scale > 0.0,
    )  # fmt: skip
    return out, lse


def out_like(q: Tensor, v: Tensor) -> Tensor:
    b, h, seqlen_q, _ = q.shape
    return torch.empty((b, seqlen_q, h, v.shape[3]), dtype=q.dtype, device=q.device).transpose(1, 2)


def forward_like(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return out_like(q, v), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
