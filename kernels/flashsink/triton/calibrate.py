"""Attention calibration (ACT, Yu et al. 2024) as a correction of ordinary attention, without the probabilities.

For a row of A with the sinks J (BOS excepted), m = sum of A_j over J and o_S = sum of A_j v_j over J:

    c = (1 - beta m) / (1 - m)      out = c o + (beta - c) o_S

Only blocks that hold a sink are computed. Where sinks take more than half of a row, 1 - m loses digits: the tile then
adds up the other columns directly. With a sink logit z the keys have 1 - exp(z - lse) together, which then stands in
place of 1. Dimensions: B rows, H query and Hk key heads, GROUP = H / Hk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink.operators import adjacent
from flashsink.triton import patterns, tiles
from flashsink.triton.attention_forward import out_like
from flashsink.triton.device import (
    LOG2E,
    capped,
    head_dims,
    key_range,
    load_all,
    load_rows,
    locate,
    multiples,
    precision,
    product,
    query_tile,
    store_rows,
    visible,
)
from flashsink.triton.launch import VARYING, launch, strides


@triton.jit
def _columns(
    q_tile, k, v, sinks, stride_kn, stride_vn, start_n, start, end, pos_m, lse_i, pattern, qk_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(mass [BLOCK_M], P V [BLOCK_M, BLOCK_DV]) of the sink columns of a block, or of the others."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    # BOS is never calibrated
    chosen = (tl.load(sinks + offs_n, mask=offs_n < end, other=0) != 0) & (offs_n != start)
    if not SINKS:
        chosen = (chosen == 0) & (offs_n < end)
    rows = tl.minimum(offs_n, end - 1)
    k_tile = load_all(k, rows, stride_kn, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_tile = load_all(v, rows, stride_vn, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    qk = product(q_tile, tl.trans(k_tile), PRECISION) * qk_scale  # [BLOCK_M, BLOCK_N]
    if cap is not None:
        qk, _ = capped(qk, cap)
    seen = visible(pos_m[:, None], offs_n[None, :], start, end, pattern, CAUSAL)
    p = tl.where(chosen[None, :] & seen, tl.exp2(qk - lse_i[:, None]), 0.0)
    return tl.sum(p, 1), product(p.to(v_tile.dtype), v_tile, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def calibrate_kernel(
    q, k, v,  # (B, H, seqlen_q, D), (B, Hk, seqlen_k, D) and (B, Hk, seqlen_k, DV)
    out,  # (B, H, seqlen_q, DV), attention's
    result,  # (B, H, seqlen_q, DV)
    lse,  # (B, H, seqlen_q) float32, contiguous
    sink_logits,  # (H,) or None
    sinks,  # (B, H, seqlen_k) uint8, contiguous
    starts, lengths,  # (B,) int64
    window, chunk, prefix, block_starts, block_ends, mask, stride_maskb, stride_maskm, cap,  # flashsink.triton.patterns
    seqlen_q, seqlen_k, scale, beta, least,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_rb, stride_rh, stride_rm,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, H, B). A row with all its mass on sinks stays as it is."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, UNIT)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, UNIT)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, UNIT)
    stride_ob, stride_oh, stride_om = multiples(stride_ob, stride_oh, stride_om, UNIT)
    stride_rb, stride_rh, stride_rm = multiples(stride_rb, stride_rh, stride_rm, UNIT)
    off_h = tl.program_id(1).to(tl.int64)
    batch, origin, count, start, end, n, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, None, tl.num_programs(2), seqlen_q, seqlen_k,
        1, BLOCK_M, False,
    )  # fmt: skip
    offs_m, _, pos_m, inside, valid, first, last = query_tile(
        tile, origin, count, seqlen_k - seqlen_q, start, end, 1, BLOCK_M
    )
    off_b, row = batch.to(tl.int64), batch.to(tl.int64) * tl.num_programs(1) + off_h
    q_tile = load_rows(q + off_b * stride_qb + off_h * stride_qh, offs_m, stride_qm, valid, D, BLOCK_D)
    lse_i = tl.load(lse + row * seqlen_q + offs_m, mask=valid, other=float("inf")) * LOG2E  # [BLOCK_M]
    k += off_b * stride_kb + off_h // GROUP * stride_kh
    v += off_b * stride_vb + off_h // GROUP * stride_vh
    sinks += row * seqlen_k
    if prefix is not None:
        prefix = tl.load(prefix + n).to(tl.int32)  # where it ends
    if block_starts is not None:
        block_starts, block_ends = block_starts + off_b * seqlen_k, block_ends + off_b * seqlen_k
    if mask is not None:
        mask += off_b * stride_maskb - (seqlen_k - seqlen_q).to(tl.int64) * stride_maskm
    pattern = (window, chunk, prefix, block_starts, block_ends, mask, stride_maskm)
    begin, _, stop = key_range(start, end, first, last, pos_m, valid, pattern, BLOCK_N, CAUSAL)
    mass = tl.zeros([BLOCK_M], tl.float32)
    of_sinks = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start_n in range(begin, stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        some = tl.load(sinks + offs_n, mask=(offs_n < end) & (offs_n != start), other=0)
        if tl.max(some.to(tl.int32)) > 0:
            m, pv = _columns(
                q_tile, k, v, sinks, stride_kn, stride_vn, start_n, start, end, pos_m, lse_i, pattern,
                scale * LOG2E, cap, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAUSAL, True, PRECISION,
            )  # fmt: skip
            mass += m
            of_sinks += pv
    o_tile = load_rows(out + off_b * stride_ob + off_h * stride_oh, offs_m, stride_om, valid, DV, BLOCK_DV)
    o_tile = o_tile.to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    whole = 1.0  # the mass of all keys
    if sink_logits is not None:
        whole -= tl.exp2(tl.load(sink_logits + off_h).to(tl.float32) * LOG2E - lse_i)
    if tl.min(whole - mass) < 0.5:
        rest = tl.zeros([BLOCK_M], tl.float32)
        of_others = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for start_n in range(begin, stop, BLOCK_N):
            m, pv = _columns(
                q_tile, k, v, sinks, stride_kn, stride_vn, start_n, start, end, pos_m, lse_i, pattern,
                scale * LOG2E, cap, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAUSAL, False, PRECISION,
            )  # fmt: skip
            rest += m
            of_others += pv
        c = (rest + (1.0 - beta) * mass) / tl.maximum(rest, least)
        value = tl.where((rest > least)[:, None], beta * of_sinks + c[:, None] * of_others, o_tile)
    else:
        c = (whole - beta * mass) / (whole - mass)
        value = c[:, None] * o_tile + (beta - c)[:, None] * of_sinks
    value = tl.where(valid[:, None], value, 0.0)
    store_rows(result + off_b * stride_rb + off_h * stride_rh, offs_m, stride_rm, value, inside, DV, BLOCK_DV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_logits: Tensor | None,
    sinks: Tensor,
    starts: Tensor,
    lengths: Tensor,
    causal: bool,
    beta: float,
    scale: float,
    *pattern: Any,
) -> Tensor:
    """(B, H, Sq, Dv): attention with ACT from its ``out`` and ``lse``, with ``sinks`` (B, H, Sk) bool. ``pattern`` is
    a :class:`flashsink.triton.patterns.Operands`."""
    q, k, v, out = (adjacent(x) for x in (q, k, v, out))
    # the kernel takes vectors as contiguous: those that a mask carries are not
    lse, starts, lengths = lse.contiguous(), starts.contiguous(), lengths.contiguous()
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    b, h, seqlen_q, _ = q.shape
    result, group, seen = out_like(q, v), h // k.shape[1], patterns.kind(pattern)
    tile = tiles.choose("calibrate", tiles.widest(q, v), q.element_size(), q.device, group, k.shape[2], seen)
    launch(
        calibrate_kernel,
        (triton.cdiv(seqlen_q, tile.blocks["BLOCK_M"]), h, b),
        tile,
        q=q, k=k, v=v, out=out, result=result, lse=lse, sink_logits=sink_logits,
        sinks=sinks.contiguous().view(torch.uint8), **patterns.arguments(pattern),
        starts=starts, lengths=lengths, seqlen_q=seqlen_q, seqlen_k=k.shape[2], scale=scale, beta=beta,
        least=torch.finfo(torch.float32).tiny ** 0.5,
        **strides({"bhm": {"q": q, "o": out, "r": result}, "bhn": {"k": k, "v": v}}),
        **head_dims(q, v), GROUP=group, CAUSAL=causal, PRECISION=precision(tiles.widest(q, v)),
    )  # fmt: skip
    return result


def forward_like(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return out_like(q, v)
