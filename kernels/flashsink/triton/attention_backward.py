"""The backward kernels of attention: deterministic, without atomics, and with the sink statistics on the way.

``gradient_kv_kernel`` holds a block of keys and walks over the queries. It computes the exact probabilities anyway,
so that the attention a key receives costs one addition an element. ``gradient_q_kernel`` holds a block of queries
and walks over the keys. With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O):
    dV = P^T dO,   dS = P * (dP - delta),   dK = scale dS^T Q,   dQ = scale dS K
(Dao et al. 2022). A sink logit has no value, so its gradient is the sum over rows of -exp(logit - lse) delta.
"""

from __future__ import annotations

from typing import Any

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
    slots,
    store_rows,
    visible,
)
from flashsink.triton.launch import Tile, adjacent, launch

DELTA = Tile({"BLOCK_M": 16}, 4, 1)


@triton.jit
def delta_kernel(
    upstream, out,  # (B, H, queries, D)
    delta,  # (B, H, queries) float32, contiguous
    queries, up_row, up_head, up_token, out_row, out_head, out_token,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O). Padded rows may hold anything; nothing reads theirs."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < queries
    a = load_rows(upstream + row * up_row + head * up_head, index, up_token, inside, D, BLOCK_D).to(tl.float32)
    b = load_rows(out + row * out_row + head * out_head, index, out_token, inside, D, BLOCK_D).to(tl.float32)
    tl.store(delta + (row * tl.num_programs(1) + head) * queries + index, tl.sum(a * b, 1), mask=inside)


@triton.jit
def key_tile(tile, origin, count, low, high, BLOCK_N: tl.constexpr):
    """The keys of a tile: their index (= position), whether it lies in the tensor, is valid, and the first and last
    valid one."""
    begin = origin + tile * BLOCK_N
    key = begin + tl.arange(0, BLOCK_N)
    inside = key < origin + count
    valid = inside & (key >= low) & (key < high)
    return key, inside, valid, tl.maximum(begin, low), tl.minimum(begin + BLOCK_N, high) - 1


@triton.jit
def query_range(low, high, first, last, offset, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """(begin, full): blocks of queries that begin in [begin, full) need a causal mask, those in [full, high) see all
    keys of the tile."""
    begin = tl.maximum(low, offset)
    if CAUSAL:
        begin = tl.maximum(first, offset)
        full = tl.minimum(begin + tl.cdiv(tl.maximum(last - begin, 0), BLOCK_M) * BLOCK_M, high)
    else:
        full = begin
    # a tile of padding alone has nothing to do
    begin = tl.where(first > last, high, begin)
    return begin, tl.maximum(full, begin)


@triton.jit
def _kv_step(
    dk, dv, received, k_tile, v_tile, key, q, upstream, lse, delta, m, offset, high, counted, q_token, up_token, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, CAPTURE: tl.constexpr,
    COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries; a query behind ``high`` has lse = inf, so its probabilities are 0 without a mask."""
    position = m + tl.arange(0, BLOCK_M)
    seen = position < high
    index = tl.minimum(position, high - 1) - offset
    q_tile = load_all(q, index, q_token, D, BLOCK_D)
    up_tile = load_all(upstream, index, up_token, D, BLOCK_D)
    lse_row = tl.load(lse + index, mask=seen, other=float("inf")) * LOG2E
    delta_row = tl.load(delta + index, mask=seen, other=0.0)
    p = tl.exp2(product(k_tile, tl.trans(q_tile), PRECISION) * scale - lse_row[None, :])
    if MASKED:
        p = tl.where(position[None, :] >= key[:, None], p, 0.0)
    if CAPTURE:
        if COUNTED:
            received += tl.sum(tl.where((position >= counted)[None, :], p, 0.0), 1)
        else:
            received += tl.sum(p, 1)
    dv += product(p.to(up_tile.dtype), up_tile, PRECISION)
    ds = p * (product(v_tile, tl.trans(up_tile), PRECISION) - delta_row[None, :])
    dk += product(ds.to(q_tile.dtype), q_tile, PRECISION)
    return dk, dv, received


@triton.jit
def _kv_blocks(
    dk, dv, k_tile, v_tile, key, valid, first_block, blocks, q, upstream, lse, delta, received, offset, high, counted,
    queries, tokens, q_head, q_token, up_head, up_token, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``blocks`` blocks of queries from ``first_block`` on, of all heads of the group in one loop: with a loop in a
    loop the sums dk and dv spill. After a head's last block its column sums are added to ``received``."""
    mass = tl.zeros([BLOCK_N], tl.float32)
    for i in range(0, blocks * GROUP):
        member = (i // blocks).to(tl.int64)
        dk, dv, mass = _kv_step(
            dk, dv, mass, k_tile, v_tile, key, q + member * q_head, upstream + member * up_head,
            lse + member * queries, delta + member * queries, first_block + i % blocks * BLOCK_M, offset, high,
            counted, q_token, up_token, scale, D, BLOCK_D, BLOCK_M, MASKED, received is not None, COUNTED, PRECISION,
        )  # fmt: skip
        if received is not None:  # noqa: SIM102  known when the kernel is compiled, the next is not
            if (i + 1) % blocks == 0:
                place = received + member * tokens + key
                tl.store(place, tl.load(place, mask=valid, other=0.0) + mass, mask=valid)
                mass = tl.zeros([BLOCK_N], tl.float32)
    return dk, dv


@triton.jit
def gradient_kv_kernel(
    q, k, v, upstream,  # (B, H or Hk, queries or tokens, D)
    lse, delta,  # (B, H, queries) float32, contiguous
    dk, dv,  # (B, Hk, tokens, D)
    received,  # (B, H, tokens) float32, contiguous; or None
    starts, lengths,  # (N,) int64
    counted,  # (N,) int64, position of the first query that counts; or None
    sequences, queries, tokens, scale,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, up_row, up_head, up_token,
    dk_row, dk_head, dk_token, dv_row, dv_head, dv_token,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row, origin, count, low, high, n, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, sequences, tokens, tokens, 1, BLOCK_N, PACKED
    )
    if tile * BLOCK_N >= count:
        return
    key, inside, valid, first, last = key_tile(tile, origin, count, low, high, BLOCK_N)
    offset = tokens - queries
    begin, full = query_range(low, high, first, last, offset, BLOCK_M, CAUSAL)
    row64, head64 = row.to(tl.int64), head.to(tl.int64)
    near = tl.minimum(key, tokens - 1)  # what a row that is not valid holds stays in that row
    k_tile = load_all(k + row64 * k_row + head64 * k_head, near, k_token, D, BLOCK_D)
    v_tile = load_all(v + row64 * v_row + head64 * v_head, near, v_token, D, BLOCK_D)
    since = 0
    if counted is not None:
        since = tl.load(counted + n).to(tl.int32)
    own = head64 * GROUP
    heads = row64 * tl.num_programs(1) * GROUP + own
    q += row64 * q_row + own * q_head
    upstream += row64 * up_row + own * up_head
    lse += heads * queries
    delta += heads * queries
    if received is not None:
        received += heads * tokens
        place = received + key
        for _ in range(GROUP):
            tl.store(place, tl.zeros([BLOCK_N], tl.float32), mask=inside)
            place += tokens
        tl.debug_barrier()
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if CAUSAL:
        if BLOCK_D > 128:
            full = high  # a mask for all: a second loop would spill, and such rows are bound by products anyway
        dk_acc, dv_acc = _kv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, key, valid, begin, tl.cdiv(full - begin, BLOCK_M), q, upstream, lse, delta,
            received, offset, high, since, queries, tokens, q_head, q_token, up_head, up_token, scale * LOG2E,
            GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, True, counted is not None, PRECISION,
        )  # fmt: skip
        if received is not None:
            tl.debug_barrier()  # the second half adds to what the first has stored
    if BLOCK_D <= 128 or not CAUSAL:
        dk_acc, dv_acc = _kv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, key, valid, full, tl.cdiv(tl.maximum(high - full, 0), BLOCK_M), q,
            upstream, lse, delta, received, offset, high, since, queries, tokens, q_head, q_token, up_head, up_token,
            scale * LOG2E, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, False, counted is not None, PRECISION,
        )  # fmt: skip
    dk_acc = tl.where(valid[:, None], dk_acc * scale, 0.0)
    dv_acc = tl.where(valid[:, None], dv_acc, 0.0)
    store_rows(dk + row64 * dk_row + head64 * dk_head, key, dk_token, dk_acc, inside, D, BLOCK_D)
    store_rows(dv + row64 * dv_row + head64 * dv_head, key, dv_token, dv_acc, inside, D, BLOCK_D)


@triton.jit
def _q_step(
    dq, q_tile, up_tile, lse_row, delta_row, k, v, k_token, v_token, n, high, position, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    key = n + tl.arange(0, BLOCK_N)
    near = tl.minimum(key, high - 1) if MASKED else key
    k_tile = load_all(k, near, k_token, D, BLOCK_D)
    v_tile = load_all(v, near, v_token, D, BLOCK_D)
    p = tl.exp2(product(q_tile, tl.trans(k_tile), PRECISION) * scale - lse_row[:, None])
    if MASKED:
        p = tl.where(visible(key, position, high, CAUSAL), p, 0.0)
    ds = p * (product(up_tile, tl.trans(v_tile), PRECISION) - delta_row[:, None])
    return dq + product(ds.to(k_tile.dtype), k_tile, PRECISION)


@triton.jit
def gradient_q_kernel(
    q, k, v, upstream,  # (B, H or Hk, queries or tokens, D)
    lse, delta,  # (B, H, queries) float32, contiguous
    dq,  # (B, H, queries, D)
    starts, lengths,  # (N,) int64
    sequences, queries, tokens, scale,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, up_row, up_head, up_token,
    dq_row, dq_head, dq_token,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row, origin, count, low, high, _, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, sequences, queries, tokens, GROUP, BLOCK_M, PACKED
    )
    tiles_here = tl.cdiv(count * GROUP, BLOCK_M)
    if tile >= tiles_here:
        return
    index, member, position, inside, valid, first, last = query_tile(
        tiles_here - 1 - tile, origin, count, tokens - queries, low, high, GROUP, BLOCK_M
    )
    row64 = row.to(tl.int64)
    own = (head * GROUP + member).to(tl.int64)[:, None]
    q_tile = load_rows(q + row64 * q_row + own * q_head, index, q_token, valid, D, BLOCK_D)
    up_tile = load_rows(upstream + row64 * up_row + own * up_head, index, up_token, valid, D, BLOCK_D)
    place = (row64 * tl.num_programs(1) * GROUP + head * GROUP + member) * queries + index
    lse_row = tl.load(lse + place, mask=valid, other=float("inf")) * LOG2E
    delta_row = tl.load(delta + place, mask=valid, other=0.0)
    k += row64 * k_row + head.to(tl.int64) * k_head
    v += row64 * v_row + head.to(tl.int64) * v_head
    full, end = key_range(low, high, first, last, BLOCK_N, CAUSAL)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(low, full, BLOCK_N):
        acc = _q_step(
            acc, q_tile, up_tile, lse_row, delta_row, k, v, k_token, v_token, n, high, position, scale * LOG2E,
            D, BLOCK_D, BLOCK_N, CAUSAL, False, PRECISION,
        )  # fmt: skip
    for n in range(full, end, BLOCK_N):
        acc = _q_step(
            acc, q_tile, up_tile, lse_row, delta_row, k, v, k_token, v_token, n, high, position, scale * LOG2E,
            D, BLOCK_D, BLOCK_N, CAUSAL, True, PRECISION,
        )  # fmt: skip
    acc = tl.where(valid[:, None], acc * scale, 0.0)
    store_rows(dq + row64 * dq_row + own * dq_head, index, dq_token, acc, inside, D, BLOCK_D)


def backward(
    upstream: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    starts: Tensor,
    lengths: Tensor,
    counted: Tensor | None,
    *,
    packed: bool,
    causal: bool,
    scale: float,
    capture: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, delta (B, H, Sq), received (B, H, Sk) or None) from ``saved`` = (q, k, v, out, lse).

    Padded positions get 0 and send nothing, whatever ``upstream`` (B, H, Sq, D) holds there.
    """
    upstream, q, k, v, out = (adjacent(x) for x in (upstream, *saved[:4]))
    lse = saved[4].contiguous()
    # the kernels count entries, not strides: a mask that carries them has strides
    starts, lengths = starts.contiguous(), lengths.contiguous()
    counted = None if counted is None else counted.contiguous()
    b, h, queries, d = q.shape
    heads, tokens = k.shape[1], k.shape[2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    received = torch.empty((b, h, tokens), dtype=torch.float32, device=q.device) if capture else None
    block_d = max(16, triton.next_power_of_2(d))
    up = {"up_row": upstream.stride(0), "up_head": upstream.stride(1), "up_token": upstream.stride(2)}
    launch(
        delta_kernel, (triton.cdiv(queries, DELTA.blocks["BLOCK_M"]), h, b), DELTA,
        upstream=upstream, out=out, delta=delta, queries=queries, **up,
        out_row=out.stride(0), out_head=out.stride(1), out_token=out.stride(2), D=d, BLOCK_D=block_d,
    )  # fmt: skip
    common: dict[str, Any] = {
        "q": q, "k": k, "v": v, "upstream": upstream, "lse": lse, "delta": delta, "starts": starts,
        "lengths": lengths, "sequences": len(starts), "queries": queries, "tokens": tokens, "scale": scale,
        "q_row": q.stride(0), "q_head": q.stride(1), "q_token": q.stride(2),
        "k_row": k.stride(0), "k_head": k.stride(1), "k_token": k.stride(2),
        "v_row": v.stride(0), "v_head": v.stride(1), "v_token": v.stride(2), **up,
        "GROUP": h // heads, "D": d, "BLOCK_D": block_d, "PACKED": packed, "CAUSAL": causal,
        "PRECISION": precision(d),
    }  # fmt: skip
    tile = tiles.choose("gradient_kv", d, q.element_size(), q.device)
    launch(
        gradient_kv_kernel, (slots(tokens, len(starts), 1, tile.blocks["BLOCK_N"], packed), heads, b), tile, **common,
        dk=dk, dv=dv, received=received, counted=counted if capture else None,
        dk_row=dk.stride(0), dk_head=dk.stride(1), dk_token=dk.stride(2),
        dv_row=dv.stride(0), dv_head=dv.stride(1), dv_token=dv.stride(2),
    )  # fmt: skip
    tile = tiles.choose("gradient_q", d, q.element_size(), q.device)
    launch(
        gradient_q_kernel, (slots(queries, len(starts), h // heads, tile.blocks["BLOCK_M"], packed), heads, b), tile,
        **common, dq=dq, dq_row=dq.stride(0), dq_head=dq.stride(1), dq_token=dq.stride(2),
    )  # fmt: skip
    return dq, dk, dv, delta, received
