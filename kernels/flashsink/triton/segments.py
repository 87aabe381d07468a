"""The packed sequence of every token, once a batch for all layers and kernels: how a program finds its tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink.triton.device import bounds
from flashsink.triton.launch import VARYING, Tile, launch

TILE = Tile({"BLOCK": 4096}, 4, 1)


@triton.jit(do_not_specialize=VARYING)
def segments_kernel(
    starts, lengths,  # (N,) int64
    segments,  # (tokens,) int64
    sequences, tokens,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N + 1, blocks): writes a block of the tokens of a sequence; -1 to those after the last."""
    n = tl.program_id(0)
    start, end = bounds(starts, lengths, tl.minimum(n, sequences - 1), tokens)
    tail = n == sequences
    start, end, number = tl.where(tail, end, start), tl.where(tail, tokens, end), tl.where(tail, -1, n)
    token = start + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(segments + token, tl.zeros([BLOCK], tl.int64) + number, mask=token < end)


def forward(starts: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """(tokens,) int64: index of the packed sequence, -1 after the last. The sequences of ``starts`` and ``lengths``
    (N,) int64 follow each other without a gap."""
    result = forward_like(starts, lengths, tokens)
    launch(
        segments_kernel, (len(starts) + 1, triton.cdiv(tokens, TILE.blocks["BLOCK"])), TILE,
        starts=starts.contiguous(), lengths=lengths.contiguous(), segments=result, sequences=len(starts), tokens=tokens,
    )  # fmt: skip
    return result


def forward_like(starts: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    return torch.empty(tokens, dtype=torch.int64, device=starts.device)
