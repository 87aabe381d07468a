"""The statistics pass: attention received per key, from q, k and the log-sum-exp of any attention.

Q K^T and one exponential an element: no values, no running maximum, no output. One program holds a block of keys and
walks over the queries that may see it, head by head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink.triton import tiles
from flashsink.triton.attention_backward import key_tile, query_range
from flashsink.triton.device import LOG2E, load_all, load_rows, locate, precision, product, slots
from flashsink.triton.launch import adjacent, launch


@triton.jit
def _step(
    mass, k_tile, key, q, lse, m, offset, high, q_token, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    position = m + tl.arange(0, BLOCK_M)
    seen = position < high
    index = tl.minimum(position, high - 1) - offset
    q_tile = load_all(q, index, q_token, D, BLOCK_D)
    lse_row = tl.load(lse + index, mask=seen, other=float("inf")) * LOG2E
    p = tl.exp2(product(k_tile, tl.trans(q_tile), PRECISION) * scale - lse_row[None, :])
    if MASKED:
        p = tl.where(position[None, :] >= key[:, None], p, 0.0)
    return mass + tl.sum(p, 1)


@triton.jit
def received_kernel(
    q,  # (B, H, queries, D)
    k,  # (B, Hk, tokens, D)
    lse,  # (B, H, queries) float32, contiguous
    received,  # (B, H, tokens) float32, contiguous
    starts, lengths,  # (N,) int64
    counted,  # (N,) int64, position of the first query that counts; or None
    sequences, queries, tokens, scale, q_row, q_head, q_token, k_row, k_head, k_token,
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
    since = offset
    if counted is not None:
        since = tl.maximum(offset, tl.load(counted + n).to(tl.int32))
    begin, full = query_range(low, high, first, last, since, BLOCK_M, CAUSAL)
    row64, head64, heads = row.to(tl.int64), head.to(tl.int64), tl.num_programs(1) * GROUP
    k_tile = load_rows(k + row64 * k_row + head64 * k_head, key, k_token, valid, D, BLOCK_D)
    for member in range(GROUP):
        own = head64 * GROUP + member
        mass = tl.zeros([BLOCK_N], tl.float32)
        q_own, lse_own = q + row64 * q_row + own * q_head, lse + (row64 * heads + own) * queries
        for m in range(begin, full, BLOCK_M):
            mass = _step(
                mass, k_tile, key, q_own, lse_own, m, offset, high, q_token, scale * LOG2E,
                D, BLOCK_D, BLOCK_M, True, PRECISION,
            )  # fmt: skip
        for m in range(full, high, BLOCK_M):
            mass = _step(
                mass, k_tile, key, q_own, lse_own, m, offset, high, q_token, scale * LOG2E,
                D, BLOCK_D, BLOCK_M, False, PRECISION,
            )  # fmt: skip
        place = (row64 * heads + own) * tokens + key
        tl.store(received + place, tl.where(valid, mass, 0.0), mask=inside)


def received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    counted: Tensor | None,
    *,
    packed: bool,
    causal: bool,
    scale: float,
) -> Tensor:
    """(B, H, Sk) float32: column sums of exp(scale q k^T - lse) over the queries from ``counted`` on; 0 at padding.

    ``lse`` (B, H, Sq) is float32; what it holds at padded queries is not looked at.
    """
    q, k, lse = adjacent(q), adjacent(k), lse.contiguous()
    # the kernels count entries, not strides: a mask that carries them has strides
    starts, lengths = starts.contiguous(), lengths.contiguous()
    counted = None if counted is None else counted.contiguous()
    b, h, queries, d = q.shape
    heads, tokens = k.shape[1], k.shape[2]
    result = torch.empty((b, h, tokens), dtype=torch.float32, device=q.device)
    tile = tiles.choose("received", d, q.element_size(), q.device)
    launch(
        received_kernel,
        (slots(tokens, len(starts), 1, tile.blocks["BLOCK_N"], packed), heads, b),
        tile,
        q=q, k=k, lse=lse, received=result, starts=starts, lengths=lengths, counted=counted,
        sequences=len(starts), queries=queries, tokens=tokens, scale=scale,
        q_row=q.stride(0), q_head=q.stride(1), q_token=q.stride(2),
        k_row=k.stride(0), k_head=k.stride(1), k_token=k.stride(2),
        GROUP=h // heads, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), PACKED=packed, CAUSAL=causal,
        PRECISION=precision(d),
    )  # fmt: skip
    return result
