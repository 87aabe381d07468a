"""The forward kernel of attention: online softmax over key blocks, GQA groups packed into the rows of a tile.

One program: BLOCK_M rows, which are the GROUP query heads of neighbouring queries, against one key head. A group
of short sequences then fills a tile, and keys and values are loaded once for the whole group. Blocks of keys that
every row sees whole run without a mask. Strides are called ``<tensor>_<dimension>``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink.triton import tiles
from flashsink.triton.device import (
    LN2,
    LOG2E,
    LOWEST,
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
from flashsink.triton.launch import adjacent, launch


@triton.jit
def _step(
    acc, total, top, q_tile, k, v, k_token, v_token, n, high, position, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: rescales the sums by the new maximum and adds."""
    key = n + tl.arange(0, BLOCK_N)
    near = tl.minimum(key, high - 1) if MASKED else key
    k_tile = load_all(k, near, k_token, D, BLOCK_D)
    s = product(q_tile, tl.trans(k_tile), PRECISION) * scale
    if MASKED:
        s = tl.where(visible(key, position, high, CAUSAL), s, -float("inf"))
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(top - new)
    v_tile = load_all(v, near, v_token, D, BLOCK_D)
    acc = acc * shrink[:, None] + product(p.to(v_tile.dtype), v_tile, PRECISION)
    return acc, total * shrink + tl.sum(p, 1), new


@triton.jit
def forward_kernel(
    q,  # (B, H, queries, D)
    k,  # (B, Hk, tokens, D)
    v,  # (B, Hk, tokens, D)
    sink_logits,  # (H,) or None
    out,  # (B, H, queries, D)
    lse,  # (B, H, queries) float32, contiguous
    starts,  # (N,) int64
    lengths,  # (N,) int64
    sequences, queries, tokens, scale,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_head, out_token,
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
    # with a causal mask the last tile is the longest: it begins first
    index, member, position, inside, valid, first, last = query_tile(
        tiles_here - 1 - tile, origin, count, tokens - queries, low, high, GROUP, BLOCK_M
    )
    row64, member = row.to(tl.int64), head * GROUP + member
    q_tile = load_rows(q + row64 * q_row + member.to(tl.int64)[:, None] * q_head, index, q_token, valid, D, BLOCK_D)
    k += row64 * k_row + head.to(tl.int64) * k_head
    v += row64 * v_row + head.to(tl.int64) * v_head
    full, end = key_range(low, high, first, last, BLOCK_N, CAUSAL)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + LOWEST
    for n in range(low, full, BLOCK_N):
        acc, total, top = _step(
            acc, total, top, q_tile, k, v, k_token, v_token, n, high, position, scale * LOG2E,
            D, BLOCK_D, BLOCK_N, CAUSAL, False, PRECISION,
        )  # fmt: skip
    for n in range(full, end, BLOCK_N):
        acc, total, top = _step(
            acc, total, top, q_tile, k, v, k_token, v_token, n, high, position, scale * LOG2E,
            D, BLOCK_D, BLOCK_N, CAUSAL, True, PRECISION,
        )  # fmt: skip
    if sink_logits is not None:
        sink = tl.load(sink_logits + member).to(tl.float32) * LOG2E
        new = tl.maximum(top, sink)
        shrink = tl.exp2(top - new)
        acc, total, top = acc * shrink[:, None], total * shrink + tl.exp2(sink - new), new
    total = tl.where(valid, total, 1.0)
    acc = tl.where(valid[:, None], acc / total[:, None], 0.0)
    store_rows(
        out + row64 * out_row + member.to(tl.int64)[:, None] * out_head, index, out_token, acc, inside, D, BLOCK_D
    )
    heads = tl.num_programs(1) * GROUP
    place = (row64 * heads + member) * queries + index
    tl.store(lse + place, tl.where(valid, (top + tl.log2(total)) * LN2, 0.0), mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    *,
    packed: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D) in q's dtype, lse (B, H, Sq) float32): both 0 at padded queries.

    ``out`` lies in memory as (B, Sq, H, D), which is what a projection behind it wants.
    """
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    # the kernels count entries, not strides: a mask that carries them has strides, a column of a table too
    starts, lengths = starts.contiguous(), lengths.contiguous()
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    b, h, queries, d = q.shape
    out = torch.empty((b, queries, h, d), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((b, h, queries), dtype=torch.float32, device=q.device)
    tile = tiles.choose("forward", d, q.element_size(), q.device)
    heads, tokens = k.shape[1], k.shape[2]
    group = h // heads
    launch(
        forward_kernel,
        (slots(queries, len(starts), group, tile.blocks["BLOCK_M"], packed), heads, b),
        tile,
        q=q, k=k, v=v, sink_logits=sink_logits, out=out, lse=lse, starts=starts, lengths=lengths,
        sequences=len(starts), queries=queries, tokens=tokens, scale=scale,
        q_row=q.stride(0), q_head=q.stride(1), q_token=q.stride(2),
        k_row=k.stride(0), k_head=k.stride(1), k_token=k.stride(2),
        v_row=v.stride(0), v_head=v.stride(1), v_token=v.stride(2),
        out_row=out.stride(0), out_head=out.stride(1), out_token=out.stride(2),
        GROUP=group, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), PACKED=packed, CAUSAL=causal,
        PRECISION=precision(d),
    )  # fmt: skip
    return out, lse
