"""Attention calibration (ACT) as a correction of ordinary attention, without a matrix of probabilities.

With m = sum of A over a row's sinks and o_S = sum of A v over them, the corrected row is c o + (beta - c) o_S with
c = (1 - beta m) / (1 - m) (closed form of Yu et al. 2024). Only blocks that hold a sink are computed. Where sinks
take more than half of a row, 1 - m loses digits: the tile then adds up the other columns directly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink.triton import tiles
from flashsink.triton.device import (
    LOG2E,
    key_range,
    load_all,
    load_rows,
    locate,
    precision,
    product,
    query_tile,
    store_rows,
)
from flashsink.triton.launch import adjacent, launch


@triton.jit
def _column_block(
    q_tile, k, v, sinks, k_token, v_token, n, low, high, position, lse_row, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(mass (BLOCK_M,), P V (BLOCK_M, BLOCK_D)) of the sink columns of a block, or of the others."""
    key = n + tl.arange(0, BLOCK_N)
    # BOS is never a sink to be calmed
    chosen = (tl.load(sinks + key, mask=key < high, other=0) != 0) & (key != low)
    if not SINKS:
        chosen = (chosen == 0) & (key < high)
    near = tl.minimum(key, high - 1)
    k_tile = load_all(k, near, k_token, D, BLOCK_D)
    v_tile = load_all(v, near, v_token, D, BLOCK_D)
    p = tl.exp2(product(q_tile, tl.trans(k_tile), PRECISION) * scale - lse_row[:, None])
    p = tl.where(chosen[None, :] & (key[None, :] <= position[:, None]), p, 0.0)
    return tl.sum(p, 1), product(p.to(v_tile.dtype), v_tile, PRECISION)


@triton.jit
def calibrate_kernel(
    q, k, v,  # (B, H or Hk, queries or tokens, D)
    out,  # (B, H, queries, D), attention's
    result,  # (B, H, queries, D)
    lse,  # (B, H, queries) float32, contiguous
    sinks,  # (B, H, tokens) uint8, contiguous
    starts, lengths,  # (B,) int64
    queries, tokens, scale, beta, least,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_head, out_token,
    result_row, result_head, result_token,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row, origin, count, low, high, _, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, tl.num_programs(2), queries, tokens, 1, BLOCK_M, False
    )
    index, _, position, inside, valid, first, last = query_tile(
        tile, origin, count, tokens - queries, low, high, 1, BLOCK_M
    )
    row64, own = row.to(tl.int64), row.to(tl.int64) * tl.num_programs(1) + head
    q_tile = load_rows(q + row64 * q_row + head * q_head, index, q_token, valid, D, BLOCK_D)
    lse_row = tl.load(lse + own * queries + index, mask=valid, other=float("inf")) * LOG2E
    k += row64 * k_row + head // GROUP * k_head
    v += row64 * v_row + head // GROUP * v_head
    sinks += own * tokens
    _, end = key_range(low, high, first, last, BLOCK_N, True)
    mass = tl.zeros([BLOCK_M], tl.float32)
    sunk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(low, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        here = tl.load(sinks + key, mask=(key < high) & (key != low), other=0)
        if tl.max(here.to(tl.int32)) > 0:
            a, b = _column_block(
                q_tile, k, v, sinks, k_token, v_token, n, low, high, position, lse_row, scale * LOG2E,
                D, BLOCK_D, BLOCK_N, True, PRECISION,
            )  # fmt: skip
            mass += a
            sunk += b
    plain = load_rows(out + row64 * out_row + head * out_head, index, out_token, valid, D, BLOCK_D).to(tl.float32)
    if tl.max(mass) > 0.5:
        rest = tl.zeros([BLOCK_M], tl.float32)
        kept = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(low, end, BLOCK_N):
            a, b = _column_block(
                q_tile, k, v, sinks, k_token, v_token, n, low, high, position, lse_row, scale * LOG2E,
                D, BLOCK_D, BLOCK_N, False, PRECISION,
            )  # fmt: skip
            rest += a
            kept += b
        grown = (rest + (1.0 - beta) * mass) / tl.maximum(rest, least)
        # all the mass is on sinks: the row stays as it is
        value = tl.where((rest > least)[:, None], beta * sunk + grown[:, None] * kept, plain)
    else:
        grown = (1.0 - beta * mass) / (1.0 - mass)
        value = grown[:, None] * plain + (beta - grown)[:, None] * sunk
    value = tl.where(valid[:, None], value, 0.0)
    store_rows(result + row64 * result_row + head * result_head, index, result_token, value, inside, D, BLOCK_D)


def calibrate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: tuple[Tensor, Tensor],
    sinks: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    scale: float,
) -> Tensor:
    """(B, H, Sq, D): causal attention with ACT from ``attention`` = (out, lse) and ``sinks`` (B, H, Sk) bool."""
    q, k, v, out = (adjacent(x) for x in (q, k, v, attention[0]))
    lse = attention[1].contiguous()
    # the kernels count entries, not strides: a mask that carries them has strides
    starts, lengths = starts.contiguous(), lengths.contiguous()
    b, h, queries, d = q.shape
    result = torch.empty((b, queries, h, d), dtype=q.dtype, device=q.device).transpose(1, 2)
    tile = tiles.choose("calibrate", d, q.element_size(), q.device)
    launch(
        calibrate_kernel,
        (triton.cdiv(queries, tile.blocks["BLOCK_M"]), h, b),
        tile,
        q=q, k=k, v=v, out=out, result=result, lse=lse, sinks=sinks.contiguous().view(torch.uint8),
        starts=starts, lengths=lengths, queries=queries, tokens=k.shape[2], scale=scale, beta=beta,
        least=torch.finfo(torch.float32).tiny ** 0.5,
        q_row=q.stride(0), q_head=q.stride(1), q_token=q.stride(2),
        k_row=k.stride(0), k_head=k.stride(1), k_token=k.stride(2),
        v_row=v.stride(0), v_head=v.stride(1), v_token=v.stride(2),
        out_row=out.stride(0), out_head=out.stride(1), out_token=out.stride(2),
        result_row=result.stride(0), result_head=result.stride(1), result_token=result.stride(2),
        GROUP=h // k.shape[1], D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), PRECISION=precision(d),
    )  # fmt: skip
    return result
