"""Attention calibration (ACT, Yu et al. 2024) as a correction of ordinary attention, without the probabilities.

For a row of A with the sinks J (BOS excepted), m = sum of A_j over J and o_S = sum of A_j v_j over J:

    c = (1 - beta m) / (1 - m)      out = c o + (beta - c) o_S

Only blocks that hold a sink are computed. Where sinks take more than half of a row, 1 - m loses digits: the tile then
adds up the other columns directly. Dimensions: B rows, H query and Hk key heads, GROUP = H / Hk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink.operators import adjacent
from flashsink.triton import tiles
from flashsink.triton.attention_forward import out_like
from flashsink.triton.device import (
    LOG2E,
    key_range,
    load_all,
    load_rows,
    locate,
    multiples,
    precision,
    product,
    query_tile,
    store_rows,
)
from flashsink.triton.launch import VARYING, launch, strides


@triton.jit
def _columns(
    q_tile, k, v, sinks, stride_kn, stride_vn, start_n, start, end, pos_m, lse_i, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(mass [BLOCK_M], P V [BLOCK_M, BLOCK_D]) of the sink columns of a block, or of the others."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    # BOS is never calibrated
    chosen = (tl.load(sinks + offs_n, mask=offs_n < end, other=0) != 0) & (offs_n != start)
    if not SINKS:
        chosen = (chosen == 0) & (offs_n < end)
    rows = tl.minimum(offs_n, end - 1)
    k_tile = load_all(k, rows, stride_kn, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_tile = load_all(v, rows, stride_vn, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    p = tl.exp2(product(q_tile, tl.trans(k_tile), PRECISION) * qk_scale - lse_i[:, None])  # [BLOCK_M, BLOCK_N]
    p = tl.where(chosen[None, :] & (offs_n[None, :] <= pos_m[:, None]), p, 0.0)
    return tl.sum(p, 1), product(p.to(v_tile.dtype), v_tile, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def calibrate_kernel(
    q, k, v,  # (B, H or Hk, seqlen_q or seqlen_k, D)
    out,  # (B, H, seqlen_q, D), attention's
    result,  # (B, H, seqlen_q, D)
    lse,  # (B, H, seqlen_q) float32, contiguous
    sinks,  # (B, H, seqlen_k) uint8, contiguous
    starts, lengths,  # (B,) int64
    seqlen_q, seqlen_k, scale, beta, least,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_rb, stride_rh, stride_rm,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, H, B). A row with all its mass on sinks stays as it is."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, UNIT)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, UNIT)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, UNIT)
    stride_ob, stride_oh, stride_om = multiples(stride_ob, stride_oh, stride_om, UNIT)
    stride_rb, stride_rh, stride_rm = multiples(stride_rb, stride_rh, stride_rm, UNIT)
    off_h = tl.program_id(1).to(tl.int64)
    batch, origin, count, start, end, _, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, None, tl.num_programs(2), seqlen_q, seqlen_k, 1, BLOCK_M, False
    )
    offs_m, _, pos_m, inside, valid, first, last = query_tile(
        tile, origin, count, seqlen_k - seqlen_q, start, end, 1, BLOCK_M
    )
    off_b, row = batch.to(tl.int64), batch.to(tl.int64) * tl.num_programs(1) + off_h
    q_tile = load_rows(q + off_b * stride_qb + off_h * stride_qh, offs_m, stride_qm, valid, D, BLOCK_D)
    lse_i = tl.load(lse + row * seqlen_q + offs_m, mask=valid, other=float("inf")) * LOG2E  # [BLOCK_M]
    k += off_b * stride_kb + off_h // GROUP * stride_kh
    v += off_b * stride_vb + off_h // GROUP * stride_vh
    sinks += row * seqlen_k
    _, stop = key_range(start, end, first, last, BLOCK_N, True)
    mass = tl.zeros([BLOCK_M], tl.float32)
    of_sinks = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(start, stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        some = tl.load(sinks + offs_n, mask=(offs_n < end) & (offs_n != start), other=0)
        if tl.max(some.to(tl.int32)) > 0:
            m, pv = _columns(
                q_tile, k, v, sinks, stride_kn, stride_vn, start_n, start, end, pos_m, lse_i, scale * LOG2E,
                D, BLOCK_D, BLOCK_N, True, PRECISION,
            )  # fmt: skip
            mass += m
            of_sinks += pv
    o_tile = load_rows(out + off_b * stride_ob + off_h * stride_oh, offs_m, stride_om, valid, D, BLOCK_D)
    o_tile = o_tile.to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if tl.max(mass) > 0.5:
        rest = tl.zeros([BLOCK_M], tl.float32)
        of_others = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start_n in range(start, stop, BLOCK_N):
            m, pv = _columns(
                q_tile, k, v, sinks, stride_kn, stride_vn, start_n, start, end, pos_m, lse_i, scale * LOG2E,
                D, BLOCK_D, BLOCK_N, False, PRECISION,
            )  # fmt: skip
            rest += m
            of_others += pv
        c = (rest + (1.0 - beta) * mass) / tl.maximum(rest, least)
        value = tl.where((rest > least)[:, None], beta * of_sinks + c[:, None] * of_others, o_tile)
    else:
        c = (1.0 - beta * mass) / (1.0 - mass)
        value = c[:, None] * o_tile + (beta - c)[:, None] * of_sinks
    value = tl.where(valid[:, None], value, 0.0)
    store_rows(result + off_b * stride_rb + off_h * stride_rh, offs_m, stride_rm, value, inside, D, BLOCK_D)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor,
    starts: Tensor,
    lengths: Tensor,
    beta: float,
    scale: float,
) -> Tensor:
    """(B, H, Sq, D): causal attention with ACT from its ``out`` and ``lse``, with ``sinks`` (B, H, Sk) bool."""
    q, k, v, out = (adjacent(x) for x in (q, k, v, out))
    # the kernel takes vectors as contiguous: those that a mask carries are not
    lse, starts, lengths = lse.contiguous(), starts.contiguous(), lengths.contiguous()
    b, h, seqlen_q, d = q.shape
    result, group = out_like(q), h // k.shape[1]
    tile = tiles.choose("calibrate", d, q.element_size(), q.device, group)
    launch(
        calibrate_kernel,
        (triton.cdiv(seqlen_q, tile.blocks["BLOCK_M"]), h, b),
        tile,
        q=q, k=k, v=v, out=out, result=result, lse=lse, sinks=sinks.contiguous().view(torch.uint8),
        starts=starts, lengths=lengths, seqlen_q=seqlen_q, seqlen_k=k.shape[2], scale=scale, beta=beta,
        least=torch.finfo(torch.float32).tiny ** 0.5,
        **strides({"bhm": {"q": q, "o": out, "r": result}, "bhn": {"k": k, "v": v}}),
        GROUP=group, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), PRECISION=precision(d),
    )  # fmt: skip
    return result


def forward_like(q: Tensor, *_: Any) -> Tensor:
    return out_like(q)
