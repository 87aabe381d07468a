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
    bounds: Tensor  # (B + 1,) int64, where the rows begin, and T
    starts: Sequence[int]
    spans: Tensor  # (B,) int64

    def decoder_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the decoder."""
        # with the bounds nobody has to find where the positions restart, which would wait for the device
        return {"inputs_embeds": self.embeddings, "position_ids": self.positions, "cu_seq_lens_q": self.bounds}


def pack(rows: Sequence[Tensor], spans: Tensor) -> Packed:
    """Concatenates rows (S_b, C) with the prompt lengths (B,)."""
    starts = [0, *accumulate(len(row) for row in rows)]
    embeddings, bounds = torch.cat(list(rows))[None], torch.tensor(starts, device=spans.device)
    positions = torch.cat([torch.arange(len(row), device=spans.device) for row in rows])
    return Packed(embeddings, positions[None], bounds, starts[:-1], spans)
