"""What a pattern of visible keys and a cap on the scores are to the attention kernels.

Dimensions: B rows, Sk keys, N sequences (N = B in dense layout).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink.operators import adjacent
from flashsink.types import Layout, Pattern


class Operands(NamedTuple):
    """The last arguments of the attention operators, each None where it says nothing.

    Attributes:
        window, chunk, softcap: as in :func:`flashsink.attention`.
        prefix: (N,) int64, the position after a prefix.
        block_starts: (B, Sk) int32, the first position of the block that a token is in, -1 outside of blocks.
        block_ends: (B, Sk) int32, the position after the block's last token, 0 outside of blocks.
        mask: (B or 1, 1, Sq, Sk) bool; with it only softcap says anything.
    """

    window: int | None = None
    chunk: int | None = None
    prefix: Tensor | None = None
    block_starts: Tensor | None = None
    block_ends: Tensor | None = None
    mask: Tensor | None = None
    softcap: float | None = None


PLAIN = Operands()
SCHEMA = (
    "int? window, int? chunk, Tensor? prefix, Tensor? block_starts, Tensor? block_ends, Tensor? mask, float? softcap"
)
NAMES = " ".join(Operands._fields)


def operands(pattern: Pattern | None, softcap: float | None, layout: Layout) -> Operands:
    """``pattern`` and ``softcap`` for rows of ``layout``, without a synchronization."""
    pattern = pattern or Pattern()
    if pattern.mask is not None:
        return Operands(mask=pattern.mask, softcap=softcap)
    prefix, starts, ends = pattern.prefix, None, None
    if prefix is not None:
        prefix = layout.starts + torch.minimum(prefix, layout.lengths)
    if pattern.blocks is not None:
        starts, ends = block_bounds(pattern.blocks, layout)
    return Operands(pattern.window, pattern.chunk, prefix, starts, ends, softcap=softcap)


def kind(given: tuple[Any, ...]) -> str:
    """Whose tiles the operands ``given`` take."""
    if Operands(*given).mask is not None:
        return "masked"
    return "causal" if all(x is None for x in given) else "patterned"


def arguments(given: tuple[Any, ...]) -> dict[str, Any]:
    """What every attention kernel takes for the operands ``given``."""
    window, chunk, prefix, starts, ends, mask, softcap = given
    # base 2, and in float32: a cap beyond these bounds changes no probability
    cap = None if softcap is None else min(max(softcap, 1e-30), 1e30) * math.log2(math.e)
    prefix, starts, ends = (None if x is None else x.contiguous() for x in (prefix, starts, ends))
    mask = None if mask is None else adjacent(mask).view(torch.uint8)
    return {
        "window": window, "chunk": chunk, "prefix": prefix, "block_starts": starts, "block_ends": ends, "cap": cap,
        "mask": mask, "stride_maskm": None if mask is None else mask.stride(2),
        "stride_maskb": None if mask is None else mask.stride(0) * (len(mask) > 1),
    }  # fmt: skip


def block_bounds(blocks: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """``block_starts`` and ``block_ends`` of :class:`Operands`: tokens of a row or sequence with equal numbers >= 0 in
    ``blocks`` (B, Sk) are a block. The first of them stands for the number."""
    segment = layout.segments()
    number = torch.where(segment >= 0, blocks, -1)
    order = number.argsort(dim=1, stable=True)
    if layout.packed:
        order = order.gather(1, segment.gather(1, order).argsort(dim=1, stable=True))
    number, segment = number.gather(1, order), segment.gather(1, order)
    edge = torch.ones_like(number[:, :1], dtype=torch.bool)
    other = (number[:, 1:] != number[:, :-1]) | (segment[:, 1:] != segment[:, :-1])
    place = torch.arange(number.shape[1], device=number.device).expand_as(number)
    first = torch.where(torch.cat([edge, other], dim=1), place, 0).cummax(dim=1).values
    last = torch.where(torch.cat([other, edge], dim=1), place, layout.tokens).flip(1).cummin(dim=1).values.flip(1)
    inside = number >= 0
    bounds = torch.where(inside, order.gather(1, first), -1), torch.where(inside, order.gather(1, last) + 1, 0)
    starts, ends = (torch.zeros_like(order).scatter_(1, order, x).int() for x in bounds)
    return starts, ends
