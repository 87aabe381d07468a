"""The statistics pass: the attention that every key received, from q, k and the log-sum-exp of any attention.

received[j] = sum over the queries i that see key j of exp(scale q_i k_j - lse_i): one product and one exponential an
element, no values, no running maximum, no output. Dimensions: B rows, H query and Hk key heads, GROUP = H / Hk, N
sequences (N = B in dense layout).
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
    key_tile,
    load_all,
    load_rows,
    locate,
    mean_length,
    multiples,
    precision,
    product,
    query_range,
    slots,
    visible,
)
from flashsink.triton.launch import VARYING, launch, strides


@triton.jit
def _received_step(
    received, k_tile, offs_n, q, lse, start_m, offset, start, end, pattern, stride_qm, qk_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: the new received [BLOCK_N]."""
    pos_m = start_m + tl.arange(0, BLOCK_M)
    seen = pos_m < end
    offs_m = tl.minimum(pos_m, end - 1) - offset
    q_tile = load_all(q, offs_m, stride_qm, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lse_i = tl.load(lse + offs_m, mask=seen, other=float("inf")) * LOG2E  # [BLOCK_M]
    qk_t = product(k_tile, tl.trans(q_tile), PRECISION) * qk_scale  # [BLOCK_N, BLOCK_M]
    if cap is not None:
        qk_t, _ = capped(qk_t, cap)
    p_t = tl.exp2(qk_t - lse_i[None, :])
    if MASKED:
        p_t = tl.where(visible(pos_m[None, :], offs_n[:, None], start, end, pattern, CAUSAL), p_t, 0.0)
    return received + tl.sum(p_t, 1)


@triton.jit(do_not_specialize=VARYING)
def received_kernel(
    q,  # (B, H, seqlen_q, D)
    k,  # (B, Hk, seqlen_k, D)
    lse,  # (B, H, seqlen_q) float32, contiguous
    received,  # (B, H, seqlen_k) float32, contiguous
    starts, lengths,  # (N,) int64
    segments,  # (seqlen_k,) int64 where packed
    query_starts,  # (N,) int64, position of the first query that counts; or None
    window, chunk, prefix, block_starts, block_ends, mask, stride_maskb, stride_maskm, cap,  # flashsink.triton.patterns
    sequences, seqlen_q, seqlen_k, scale, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    for member in range(GROUP):
        off_h = head64 * GROUP + member
        acc = tl.zeros([BLOCK_N], tl.float32)
        q_rows, lse_rows = q + off_b * stride_qb + off_h * stride_qh, lse + (off_b * heads + off_h) * seqlen_q
        for start_m in range(begin, full, BLOCK_M):
            acc = _received_step(
                acc, k_tile, offs_n, q_rows, lse_rows, start_m, offset, start, end, pattern, stride_qm, scale * LOG2E,
                cap, D, BLOCK_D, BLOCK_M, CAUSAL, True, PRECISION,
            )  # fmt: skip
        for start_m in range(full, stop, BLOCK_M):
            acc = _received_step(
                acc, k_tile, offs_n, q_rows, lse_rows, start_m, offset, start, end, pattern, stride_qm, scale * LOG2E,
                cap, D, BLOCK_D, BLOCK_M, CAUSAL, False, PRECISION,
            )  # fmt: skip
        columns = (off_b * heads + off_h) * seqlen_k + offs_n
        tl.store(received + columns, tl.where(valid, acc, 0.0), mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    segments: Tensor | None,
    query_starts: Tensor | None,
    packed: bool,
    causal: bool,
    scale: float,
    *pattern: Any,
) -> Tensor:
    """(B, H, Sk) float32: column sums of exp(scale q k^T - lse) over the queries from ``query_starts`` on; 0 at
    padding.

    ``lse`` (B, H, Sq) is float32; what it holds at padded queries is not looked at. ``pattern`` is a
    :class:`flashsink.triton.patterns.Operands`.
    """
    q, k, lse = adjacent(q), adjacent(k), lse.contiguous()
    # the kernel takes vectors as contiguous: those that a mask carries are not
    starts, lengths = starts.contiguous(), lengths.contiguous()
    query_starts = None if query_starts is None else query_starts.contiguous()
    b, h, seqlen_q, d = q.shape
    heads_k, seqlen_k = k.shape[1], k.shape[2]
    result, group = forward_like(q, k), h // heads_k
    length = mean_length(seqlen_k, len(starts), packed)
    tile = tiles.choose("received", d, q.element_size(), q.device, group, length, patterns.kind(pattern))
    launch(
        received_kernel,
        (slots(seqlen_k, len(starts), 1, tile.blocks["BLOCK_N"], packed), heads_k, b),
        tile,
        q=q, k=k, lse=lse, received=result, starts=starts, lengths=lengths, segments=segments,
        query_starts=query_starts, sequences=len(starts), seqlen_q=seqlen_q, seqlen_k=seqlen_k, scale=scale,
        **patterns.arguments(pattern), **strides({"bhm": {"q": q}, "bhn": {"k": k}}),
        GROUP=group, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), PACKED=packed, CAUSAL=causal,
        PRECISION=precision(d),
    )  # fmt: skip
    return result


def forward_like(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return torch.empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32, device=q.device)
