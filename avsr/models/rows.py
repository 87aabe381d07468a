"""Rows of embeddings that the decoder reads: padded, or packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from avsr.runtime.transfer import on_device

PADDING = 0  # the place in a table whose embedding is zero


@dataclass
class Assembled:
    """Padded rows of embeddings. ``spans`` are the prompt lengths: the leading tokens of a row that are not text."""

    embeddings: Tensor  # (B, S, C)
    mask: Tensor  # (B, S) int64, 1 = token
    spans: Tensor  # (B,) int64
    names: list[list[str]] = field(default_factory=list)  # token names of every row, when asked for
    counts: list[int] | None = None  # ``spans``, where the host knows them
    kinds: Tensor | None = None  # (B, S) int64, numbers in avsr.models.prompt.KINDS, -1 at padding; when asked for

    @property
    def starts(self) -> Sequence[int]:
        """Where each row begins in ``embeddings.flatten(0, 1)``, for rows that are padded on the right."""
        rows, length, _ = self.embeddings.shape
        return range(0, rows * length, length)

    @property
    def prompts(self) -> list[int]:
        """The prompt lengths, for the host."""
        return self.spans.tolist() if self.counts is None else self.counts

    def decoder_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the decoder."""
        return {"inputs_embeds": self.embeddings, "attention_mask": self.mask}


@dataclass
class Packed:
    """Rows concatenated without padding, T tokens in all. ``starts``, ``spans`` and ``prompts`` as in
    :class:`Assembled`."""

    embeddings: Tensor  # (1, T, C)
    positions: Tensor  # (1, T) int64, from 0 in every row
    bounds: Tensor  # (B + 1,) int64, where the rows begin, and T
    starts: Sequence[int]
    spans: Tensor  # (B,) int64
    prompts: list[int]
    kinds: Tensor | None = None  # (1, T) int64, as in :class:`Assembled`

    def decoder_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the decoder."""
        # with the bounds nobody has to find where the positions restart, which would wait for the device
        return {"inputs_embeds": self.embeddings, "position_ids": self.positions, "cu_seq_lens_q": self.bounds}


class Table:
    """Embeddings (n, C) one under the other, the first of them zero."""

    def __init__(self, zero: Tensor) -> None:
        self._parts, self._size = [zero], len(zero)

    def add(self, embeddings: Tensor) -> int:
        """Appends embeddings (n, C) and returns the place of the first."""
        first, self._size = self._size, self._size + len(embeddings)
        self._parts.append(embeddings)
        return first

    def whole(self) -> Tensor:
        return torch.cat(self._parts)


@dataclass(frozen=True)
class Places:
    """Rows by the place of every token in a table, known to the host alone.

    Attributes:
        table: (N, C) embeddings of all that the rows are made of, at :data:`PADDING` zeros.
        rows: the places of every row's tokens.
        prompts: the prompt lengths.
        names: as in :class:`Assembled`.
        kinds: of every row's tokens, numbers in avsr.models.prompt.KINDS; when asked for.
    """

    table: Tensor
    rows: list[list[int]]
    prompts: list[int]
    names: list[list[str]]
    kinds: list[list[int]]

    def padded(self, *, left: bool) -> Assembled:
        """With padding on the right or on the left of shorter rows, zero and masked."""
        longest = max(map(len, self.rows))
        padding = [[PADDING] * (longest - len(row)) for row in self.rows]
        filled = [pad + row if left else row + pad for pad, row in zip(padding, self.rows, strict=True)]
        places = on_device(filled, self.table.device)
        kinds = None
        if self.kinds:
            blank = [[-1] * len(pad) for pad in padding]
            filled = [pad + row if left else row + pad for pad, row in zip(blank, self.kinds, strict=True)]
            kinds = on_device(filled, self.table.device)
        mask = (places != PADDING).long()
        return Assembled(self._at(places), mask, self._spans(), self.names, self.prompts, kinds)

    def packed(self) -> Packed:
        """Concatenated."""
        device, starts = self.table.device, [0, *accumulate(map(len, self.rows))]
        places = on_device([place for row in self.rows for place in row], device)
        positions = on_device([position for row in self.rows for position in range(len(row))], device)
        bounds = on_device(starts, device)
        kinds = on_device([kind for row in self.kinds for kind in row], device)[None] if self.kinds else None
        return Packed(self._at(places[None]), positions[None], bounds, starts[:-1], self._spans(), self.prompts, kinds)

    def _at(self, places: Tensor) -> Tensor:
        # not a view, or the layer that reads it would be compiled once more: the others read no view
        return nn.functional.embedding(places, self.table)

    def _spans(self) -> Tensor:
        return on_device(self.prompts, self.table.device)
