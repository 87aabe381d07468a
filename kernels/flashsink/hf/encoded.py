"""Masks as numbers.

Where a mask is no more than causal attention over padded or packed rows, perhaps in a window or chunks, a few numbers a
row stand for it, which every backend takes. They travel as a 4-D int64 tensor, which passes through everything
(generate, checkpointing, other devices) unchanged: dense rows (B, 3, 1, P) = start, length and the first position whose
query counts in the statistics; packed (1, N + ceil(S / 3), 3, P) with the same three of every sequence and, made once
for all layers, the sequence of every token. The last axis is expanded: its size says which window or chunk, so that no
one has to read a number back from a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsink.types import Layout, Pattern

# by the size of the last axis - 1; append-only, a model has one window and one size of chunks
_patterns: list[Pattern | None] = [None]


def encode(layout: Layout, query_starts: Tensor | None = None, pattern: Pattern | None = None) -> Tensor:
    """``layout`` as a mask; ``query_starts`` (N,) = the first position of every sequence whose query counts, default
    all. ``pattern`` has a window or chunk alone."""
    query_starts = layout.starts if query_starts is None else query_starts
    numbers = torch.stack([layout.starts, layout.lengths, query_starts], dim=1)
    if pattern not in _patterns:
        _patterns.append(pattern)
    if layout.packed:
        sequences = torch.nn.functional.pad(layout.segments()[0], (0, -layout.tokens % 3))
        numbers = torch.cat([numbers, sequences.view(-1, 3)])[None, :, :, None]
    else:
        numbers = numbers[:, :, None, None]
    return numbers.expand(-1, -1, -1, 1 + _patterns.index(pattern))


def is_encoded(mask: Any) -> bool:
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.int64 or mask.shape[3] > len(_patterns):
        return False
    return mask.shape[1:3] == (3, 1) or (mask.shape[0] == 1 and mask.shape[2] == 3)


def is_packed(mask: Any) -> bool:
    return is_encoded(mask) and mask.shape[2] == 3


def pattern_of(mask: Tensor) -> Pattern | None:
    """The window or chunk of an encoded mask."""
    return _patterns[mask.shape[3] - 1]


def decode(mask: Tensor, rows: int, tokens: int) -> tuple[Layout, Tensor]:
    """(layout, query_starts) of an encoded mask over ``rows`` rows of ``tokens`` tokens."""
    if mask.shape[2] == 3:
        count = mask.shape[1] + tokens // -3
        starts, lengths, first = mask[0, :count, :, 0].unbind(1)
        return Layout(starts, lengths, 1, tokens, True, segment=mask[0, count:, :, 0].flatten()[:tokens]), first
    return Layout(mask[:, 0, 0, 0], mask[:, 1, 0, 0], rows, tokens, False), mask[:, 2, 0, 0]
