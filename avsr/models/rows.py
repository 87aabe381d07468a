"""Rows of embeddings that the decoder reads: padded, or packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor


@dataclass
class Assembled:
    """Padded rows of embeddings. ``spans`` are the prompt lengths: the leading tokens of a row that are not text."""

    embeddings: Tensor  # (B, S, C)
    mask: Tensor  # (B, S) int64, 1 = token
    spans: Tensor  # (B,) int64
    names: list[list[str]] = field(default_factory=list)  # token names of every row, when asked for

    @property
    def starts(self) -> Sequence[int]:
        """Where each row begins in ``embeddings.flatten(0, 1)``, for rows that are padded on the right."""
        rows, length, _ = self.embeddings.shape
        return range(0, rows * length, length)

    def decoder_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the decoder."""
        return {"inputs_embeds": self.embeddings, "attention_mask": self.mask}


@dataclass
class Packed:
    """Rows concatenated without padding, T tokens in all. ``starts`` and ``spans`` as in :class:`Assembled`."""

    embeddings: Tensor  # (1, T, C)
    positions: Tensor  # (1, T) int64, from 0 in every row
    starts: Sequence[int]
    spans: Tensor  # (B,) int64

    def decoder_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the decoder."""
        return {"inputs_embeds": self.embeddings, "position_ids": self.positions}


def pack(rows: Sequence[Tensor], spans: Tensor) -> Packed:
    """Concatenates rows (S_b, C) with the prompt lengths (B,)."""
    counts = [len(row) for row in rows]
    positions = torch.cat([torch.arange(count, device=spans.device) for count in counts])
    return Packed(torch.cat(list(rows))[None], positions[None], [0, *accumulate(counts[:-1])], spans)
