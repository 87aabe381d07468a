"""Attention, backward (FlashAttention-2, Dao 2023), with the attention that every key received on the way.

With P = exp(S - lse), S = scale Q K^T, dP = dO V^T and delta = rowsum(dO * O):

    dV = P^T dO      dS = P * (dP - delta)      dK = scale dS^T Q      dQ = scale dS K      received = colsum(P)

A sink logit z has no value, so dz = -sum over rows of exp(z - lse) delta. One kernel owns keys and another queries: the
same bits every time. The first recomputes P exactly with a block of keys resident, so its column sums cost one addition
an element. Dimensions: B rows, H query and Hk key heads, GROUP = H / Hk, N sequences (N = B in dense layout).
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
    LOG2E,
    capped,
    head_dims,
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
    store_rows,
)
from flashsink.triton.launch import VARYING, launch, strides
from flashsink.triton.received import forward as statistics_pass
from flashsink.types import Layout

CAPTURED_HEAD_DIM = 128  # beyond it dK and dV fill the registers, and the statistics pass runs instead


@triton.jit
def _kv_step(
    dk, dv, received, k_tile, v_tile, offs_n, q, do, lse, delta, start_m, offset, start, end, query_start, pattern,
    stride_qm, stride_dom, qk_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAPTURE: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: the new dk, dv and received. A query at or after ``end`` has lse = inf, so its
    probabilities are 0 without a mask."""
    pos_m = start_m + tl.arange(0, BLOCK_M)
    offs_m = tl.minimum(pos_m, end - 1) - offset
    q_tile = load_all(q, offs_m, stride_qm, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do_tile = load_all(do, offs_m, stride_dom, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    lse_i = tl.where(pos_m < end, tl.load(lse + offs_m) * LOG2E, float("inf"))  # [BLOCK_M]
    delta_i = tl.load(delta + offs_m)  # [BLOCK_M]
    qk_t = product(k_tile, tl.trans(q_tile), PRECISION) * qk_scale  # [BLOCK_N, BLOCK_M]
    if cap is not None:
        qk_t, slope = capped(qk_t, cap)
    p_t = tl.exp2(qk_t - lse_i[None, :])
    if MASKED:
        p_t = hide(p_t, pos_m[None, :], offs_n[:, None], start, end, 0.0, pattern, CAUSAL)
    if CAPTURE:
        if COUNTED:
            received += tl.sum(tl.where((pos_m >= query_start)[None, :], p_t, 0.0), 1)
        else:
            received += tl.sum(p_t, 1)
    dv += product(p_t.to(do_tile.dtype), do_tile, PRECISION)
    ds_t = p_t * (product(v_tile, tl.trans(do_tile), PRECISION) - delta_i[None, :])  # [BLOCK_N, BLOCK_M]
    if cap is not None:
        ds_t *= slope
    dk += product(ds_t.to(q_tile.dtype), q_tile, PRECISION)
    return dk, dv, received


@triton.jit
def _kv_blocks(
    dk, dv, k_tile, v_tile, offs_n, valid, start_m, blocks, q, do, lse, delta, received, offset, start, end,
    query_start, pattern, seqlen_q, seqlen_k, stride_qh, stride_qm, stride_doh, stride_dom, qk_scale, cap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``blocks`` blocks of queries from position ``start_m`` on, of all heads of the group in one loop: with a loop in
    a loop dk and dv spill. After a head's last block its column sums are added to ``received``."""
    col_sum = tl.zeros([BLOCK_N], tl.float32)
    pos, stop, head = start_m, start_m + blocks * BLOCK_M, tl.full((), 0, tl.int32)
    for _ in range(0, blocks * GROUP):
        member = head.to(tl.int64)  # a number takes fewer registers than the five pointers of a head
        dk, dv, col_sum = _kv_step(
            dk, dv, col_sum, k_tile, v_tile, offs_n, q + member * stride_qh, do + member * stride_doh,
            lse + member * seqlen_q, delta + member * seqlen_q, pos, offset, start, end, query_start, pattern,
            stride_qm, stride_dom, qk_scale, cap, D, BLOCK_D, DV, BLOCK_DV, BLOCK_M, CAUSAL, MASKED,
            received is not None, COUNTED, PRECISION,
        )  # fmt: skip
        pos += BLOCK_M
        over = pos == stop
        if received is not None:
            columns = received + member * seqlen_k + offs_n
            if over:
                # threads may hold copies of a column: an atomic adds one of them. The program owns its columns and adds
                # twice at most to what it has cleared, so the order of the sums does not matter
                tl.atomic_add(columns, col_sum, mask=valid, sem="relaxed", scope="cta")
                col_sum = tl.zeros([BLOCK_N], tl.float32)
        pos = tl.where(over, start_m, pos)
        head += over.to(tl.int32)
    return dk, dv


@triton.jit
def _clear(received, offs_n, inside, seqlen_k, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros the sums of a tile of keys in all heads of the group."""
    columns = received + offs_n
    for _ in range(GROUP):
        tl.store(columns, tl.zeros([BLOCK_N], tl.float32), mask=inside)
        columns += seqlen_k
    tl.debug_barrier()


@triton.jit(do_not_specialize=VARYING)
def gradient_kv_kernel(
    q, k,  # (B, H, seqlen_q, D) and (B, Hk, seqlen_k, D)
    v, do,  # (B, Hk, seqlen_k, DV) and (B, H, seqlen_q, DV)
    lse, delta,  # (B, H, seqlen_q) float32, contiguous
    dk, dv,  # (B, Hk, seqlen_k, D or DV)
    received,  # (B, H, seqlen_k) float32, contiguous; or None
    starts, lengths,  # (N,) int64
    segments,  # (seqlen_k,) int64 where packed
    query_starts,  # (N,) int64, position of the first query that counts in received; or None
    window, chunk, prefix, block_starts, block_ends, mask, stride_maskb, stride_maskm, cap,  # flashsink.triton.patterns
    sequences, seqlen_q, seqlen_k, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hk, B). A program computes dk, dv and received of BLOCK_N keys, walking over the queries."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, UNIT)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, UNIT)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, UNIT)
    stride_dob, stride_doh, stride_dom = multiples(stride_dob, stride_doh, stride_dom, UNIT)
    stride_dkb, stride_dkh, stride_dkn = multiples(stride_dkb, stride_dkh, stride_dkn, UNIT)
    stride_dvb, stride_dvh, stride_dvn = multiples(stride_dvb, stride_dvh, stride_dvn, UNIT)
    off_hk = tl.program_id(1)
    batch, origin, count, start, end, n, tile = locate(
        tl.program_id(0), tl.program_id(2), starts, lengths, segments, sequences, seqlen_k, seqlen_k, 1, BLOCK_N, PACKED
    )
    if tile * BLOCK_N >= count:
        return
    offs_n, inside, valid, first, last = key_tile(tile, origin, count, start, end, BLOCK_N)
    offset = seqlen_k - seqlen_q
    off_b, head64 = batch.to(tl.int64), off_hk.to(tl.int64)
    if prefix is not None:
        prefix = tl.load(prefix + n).to(tl.int32)  # where it ends
    if block_starts is not None:
        block_starts, block_ends = block_starts + off_b * seqlen_k, block_ends + off_b * seqlen_k
    if mask is not None:
        mask += off_b * stride_maskb - (seqlen_k - seqlen_q).to(tl.int64) * stride_maskm
    pattern = (window, chunk, prefix, block_starts, block_ends, mask, stride_maskm)
    begin, full, stop = query_range(start, end, first, last, offset, offs_n, valid, pattern, BLOCK_M, CAUSAL)
    rows = tl.minimum(offs_n, seqlen_k - 1)  # what a row that is not valid holds stays in that row
    k_tile = load_all(k + off_b * stride_kb + head64 * stride_kh, rows, stride_kn, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_tile = load_all(v + off_b * stride_vb + head64 * stride_vh, rows, stride_vn, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    query_start = 0
    if query_starts is not None:
        query_start = tl.load(query_starts + n).to(tl.int32)
    off_h = head64 * GROUP
    heads = off_b * tl.num_programs(1) * GROUP + off_h
    q, do = q + (off_b * stride_qb + off_h * stride_qh), do + (off_b * stride_dob + off_h * stride_doh)
    lse, delta = lse + heads * seqlen_q, delta + heads * seqlen_q
    if received is not None:
        received += heads * seqlen_k
        _clear(received, offs_n, inside, seqlen_k, GROUP, BLOCK_N)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    LOCAL: tl.constexpr = window is not None or chunk is not None or mask is not None
    if CAUSAL or LOCAL:
        if BLOCK_D > 128 or BLOCK_DV > 128:
            full = stop  # a mask for all: a second loop would spill, and such rows are bound by products anyway
        dk_acc, dv_acc = _kv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, offs_n, valid, begin, tl.cdiv(full - begin, BLOCK_M), q, do, lse, delta,
            received, offset, start, end, query_start, pattern, seqlen_q, seqlen_k, stride_qh, stride_qm, stride_doh,
            stride_dom, scale * LOG2E, cap, GROUP, D, BLOCK_D, DV, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, True,
            query_starts is not None, PRECISION,
        )  # fmt: skip
    if not LOCAL and ((BLOCK_D <= 128 and BLOCK_DV <= 128) or not CAUSAL):
        dk_acc, dv_acc = _kv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, offs_n, valid, full, tl.cdiv(tl.maximum(stop - full, 0), BLOCK_M), q, do,
            lse, delta, received, offset, start, end, query_start, pattern, seqlen_q, seqlen_k, stride_qh, stride_qm,
            stride_doh, stride_dom, scale * LOG2E, cap, GROUP, D, BLOCK_D, DV, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL,
            False, query_starts is not None, PRECISION,
        )  # fmt: skip
    dk_acc = tl.where(valid[:, None], dk_acc * scale, 0.0)
    dv_acc = tl.where(valid[:, None], dv_acc, 0.0)
    store_rows(dk + off_b * stride_dkb + head64 * stride_dkh, offs_n, stride_dkn, dk_acc, inside, D, BLOCK_D)
    store_rows(dv + off_b * stride_dvb + head64 * stride_dvh, offs_n, stride_dvn, dv_acc, inside, DV, BLOCK_DV)


@triton.jit
def _q_step(
    dq, q_tile, do_tile, lse_i, delta_i, k, v, stride_kn, stride_vn, start_n, start, end, pos_m, pattern, qk_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the new dq."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, end - 1) if MASKED else offs_n
    k_tile = load_all(k, rows, stride_kn, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_tile = load_all(v, rows, stride_vn, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    qk = product(q_tile, tl.trans(k_tile), PRECISION) * qk_scale  # [BLOCK_M, BLOCK_N]
    if cap is not None:
        qk, slope = capped(qk, cap)
    p = tl.exp2(qk - lse_i[:, None])
    if MASKED:
        p = hide(p, pos_m[:, None], offs_n[None, :], start, end, 0.0, pattern, CAUSAL)
    ds = p * (product(do_tile, tl.trans(v_tile), PRECISION) - delta_i[:, None])  # [BLOCK_M, BLOCK_N]
    if cap is not None:
        ds *= slope
    return dq + product(ds.to(k_tile.dtype), k_tile, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def gradient_q_kernel(
    q, k,  # (B, H, seqlen_q, D) and (B, Hk, seqlen_k, D)
    v, do, out,  # (B, Hk, seqlen_k, DV) and (B, H, seqlen_q, DV)
    lse, delta,  # (B, H, seqlen_q) float32, contiguous
    dq,  # (B, H, seqlen_q, D)
    starts, lengths,  # (N,) int64
    segments,  # (seqlen_k,) int64 where packed
    window, chunk, prefix, block_starts, block_ends, mask, stride_maskb, stride_maskm, cap,  # flashsink.triton.patterns
    sequences, seqlen_q, seqlen_k, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom, stride_ob, stride_oh, stride_om, stride_dqb, stride_dqh, stride_dqm,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hk, B), as in the forward: a program computes dq of BLOCK_M rows, walking over the keys, and writes
    their delta first, for the other kernel."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, UNIT)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, UNIT)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, UNIT)
    stride_dob, stride_doh, stride_dom = multiples(stride_dob, stride_doh, stride_dom, UNIT)
    stride_ob, stride_oh, stride_om = multiples(stride_ob, stride_oh, stride_om, UNIT)
    stride_dqb, stride_dqh, stride_dqm = multiples(stride_dqb, stride_dqh, stride_dqm, UNIT)
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
    off_b = batch.to(tl.int64)
    off_h = (off_hk * GROUP + member).to(tl.int64)[:, None]
    q_tile = load_rows(q + off_b * stride_qb + off_h * stride_qh, offs_m, stride_qm, valid, D, BLOCK_D)
    do_tile = load_rows(do + off_b * stride_dob + off_h * stride_doh, offs_m, stride_dom, valid, DV, BLOCK_DV)
    rows = (off_b * tl.num_programs(1) * GROUP + off_hk * GROUP + member) * seqlen_q + offs_m
    lse_i = tl.load(lse + rows, mask=valid, other=float("inf")) * LOG2E  # [BLOCK_M]
    o_tile = load_rows(out + off_b * stride_ob + off_h * stride_oh, offs_m, stride_om, valid, DV, BLOCK_DV)
    delta_i = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)  # [BLOCK_M]
    tl.store(delta + rows, delta_i, mask=inside)
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
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(begin, full, BLOCK_N):
        acc = _q_step(
            acc, q_tile, do_tile, lse_i, delta_i, k, v, stride_kn, stride_vn, start_n, start, end, pos_m, pattern,
            scale * LOG2E, cap, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAUSAL, False, PRECISION,
        )  # fmt: skip
    for start_n in range(full, stop, BLOCK_N):
        acc = _q_step(
            acc, q_tile, do_tile, lse_i, delta_i, k, v, stride_kn, stride_vn, start_n, start, end, pos_m, pattern,
            scale * LOG2E, cap, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAUSAL, True, PRECISION,
        )  # fmt: skip
    acc = tl.where(valid[:, None], acc * scale, 0.0)
    store_rows(dq + off_b * stride_dqb + off_h * stride_dqh, offs_m, stride_dqm, acc, inside, D, BLOCK_D)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_logits: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    segments: Tensor | None,
    query_starts: Tensor | None,
    packed: bool,
    causal: bool,
    scale: float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, gradient of the sink logits (H,) or empty, received (B, H, Sk) or empty).

    Padded positions get 0 and send nothing, whatever ``do`` (B, H, Sq, Dv) holds there. ``rest`` are the fields of a
    :class:`flashsink.triton.patterns.Operands`, and whether ``received`` is asked for.
    """
    *operands, capture = rest
    pattern = tuple(operands)
    do, q, k, v, out = (adjacent(x) for x in (do, q, k, v, out))
    # the kernels take vectors as contiguous: those that a mask carries are not
    lse, starts, lengths = lse.contiguous(), starts.contiguous(), lengths.contiguous()
    query_starts = None if query_starts is None else query_starts.contiguous()
    b, h, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1], k.shape[2]
    group, d = h // heads_k, tiles.widest(q, v)
    in_pass = capture and d > CAPTURED_HEAD_DIM
    dq, dk, dv, _, received = backward_like(do, q, k, v, out, lse, None, capture and not in_pass)
    delta = torch.empty_like(lse)
    length, seen = mean_length(seqlen_k, len(starts), packed), patterns.kind(pattern)
    common: dict[str, Any] = {
        "q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta, "starts": starts, "lengths": lengths,
        "segments": segments,
        "sequences": len(starts), "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "scale": scale,
        **patterns.arguments(pattern), **head_dims(q, v), "GROUP": group, "PACKED": packed, "CAUSAL": causal,
        "PRECISION": precision(d),
    }  # fmt: skip
    # delta comes from the first
    tile = tiles.choose("gradient_q", d, q.element_size(), q.device, group, length, seen)
    launch(
        gradient_q_kernel, (slots(seqlen_q, len(starts), group, tile.blocks["BLOCK_M"], packed), heads_k, b),
        tile, **common, out=out, dq=dq,
        **strides({"bhm": {"q": q, "do": do, "o": out, "dq": dq}, "bhn": {"k": k, "v": v}}),
    )  # fmt: skip
    tile = tiles.choose("gradient_kv", d, q.element_size(), q.device, group, length, seen)
    launch(
        gradient_kv_kernel, (slots(seqlen_k, len(starts), 1, tile.blocks["BLOCK_N"], packed), heads_k, b), tile,
        **common, dk=dk, dv=dv, received=received if capture and not in_pass else None,
        query_starts=query_starts if capture and not in_pass else None,
        **strides({"bhm": {"q": q, "do": do}, "bhn": {"k": k, "v": v, "dk": dk, "dv": dv}}),
    )  # fmt: skip
    if in_pass:
        received = statistics_pass(q, k, lse, starts, lengths, segments, query_starts, packed, causal, scale, *pattern)
    dsink = lse.new_empty(0)
    if sink_logits is not None:
        dsink = _dsink(sink_logits, lse, delta, Layout(starts, lengths, b, seqlen_k, packed))
    return dq, dk, dv, dsink, received


def _dsink(sink_logits: Tensor, lse: Tensor, delta: Tensor, layout: Layout) -> Tensor:
    """(H,): -sum over the valid rows of exp(z - lse) delta."""
    valid = layout.valid()[:, None, layout.tokens - lse.shape[2] :]
    share = (sink_logits.float()[:, None] - lse).clamp(max=0.0).exp()  # lse is 0 where a mask hides all keys
    return torch.where(valid, -share * delta, 0.0).sum(dim=(0, 2)).to(sink_logits.dtype)


def backward_like(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink_logits: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(adjacent(x)) for x in (q, k, v))
    dsink = lse.new_empty(0) if sink_logits is None else torch.empty_like(sink_logits)
    captured = (q.shape[0], q.shape[1], k.shape[2]) if rest[-1] else (0,)
    return dq, dk, dv, dsink, torch.empty(captured, dtype=torch.float32, device=q.device)
