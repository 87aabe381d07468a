"""Packed sequences as rows of padded batches: one call for sequences of similar length instead of one per sequence.

Dimensions: N sequences, H heads, T tokens of the packed row, S of the longest sequence of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

WASTE = 1.5  # pairs of tokens that a bucket may compute over those of its sequences


@dataclass(frozen=True)
class Bucket:
    """Sequences that are computed together.

    Attributes:
        which: (N,) int64, their numbers.
        starts: (N,) int64, their first positions in the packed row.
        lengths: (N,) int64.
        places: (tokens,) int64, positions in the packed row, and slots: the same in rows of S.
        source: (N * S,) int64, the position that every slot is read from.
        padding: int64, slots without a token; None where there are none.
    """

    which: Tensor
    starts: Tensor
    lengths: Tensor
    places: Tensor
    slots: Tensor
    source: Tensor
    padding: Tensor | None

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """First position, 0, and length of every row of the batch, (N,) int64 each."""
        return torch.zeros_like(self.lengths), self.lengths

    def spread(self, x: Tensor) -> Tensor:
        """(1, H, T, ...) -> (N, H, S, ...), 0 at padding. Tokens come first in memory, as projections leave them."""
        found = x[0].transpose(0, 1).index_select(0, self.source)
        if self.padding is not None:
            found.index_fill_(0, self.padding, 0.0)
        return found.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)

    def collect(self, x: Tensor, into: Tensor) -> None:
        """Writes (N, H, S, ...) to the places of (1, H, T, ...)."""
        flat = x.transpose(1, 2).flatten(0, 1)
        flat = flat if self.padding is None else flat.index_select(0, self.slots)
        into[0].transpose(0, 1).index_copy_(0, self.places, flat)


def like(x: Tensor) -> Tensor:
    """Zeros of the shape (1, H, T, ...), tokens first in memory."""
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:]).transpose(1, 2)


def buckets(starts: Tensor, lengths: Tensor, tokens: int) -> list[Bucket]:
    """All sequences that have tokens, clamped to the row's ``tokens`` positions, longest first."""
    return _buckets(tuple(starts.tolist()), tuple(lengths.tolist()), tokens)


@lru_cache(maxsize=8)  # all layers of a step have the same sequences
def _buckets(starts: tuple[int, ...], lengths: tuple[int, ...], tokens: int) -> list[Bucket]:
    found = []
    for n, (start, size) in enumerate(zip(starts, lengths, strict=True)):
        low, high = min(max(start, 0), tokens), min(start + size, tokens)
        if high > low:
            found.append((high - low, n, low))
    made: list[list[tuple[int, int, int]]] = []
    pairs = 0
    for sequence in sorted(found, reverse=True):
        square = sequence[0] ** 2
        pairs += square
        if not made or (len(made[-1]) + 1) * made[-1][0][0] ** 2 > WASTE * pairs:
            made.append([])
            pairs = square
        made[-1].append(sequence)
    return [_bucket(sequences) for sequences in made]


def _bucket(sequences: list[tuple[int, int, int]]) -> Bucket:
    sizes, which, starts = torch.tensor(sequences).unbind(1)
    inside = torch.arange(int(sizes[0])) < sizes[:, None]
    positions = starts[:, None] + torch.arange(int(sizes[0]))
    source = torch.where(inside, positions, starts[:, None]).flatten()
    padding = None if bool(inside.all()) else (~inside).flatten().nonzero().flatten()
    return Bucket(which, starts, sizes, positions[inside], inside.flatten().nonzero().flatten(), source, padding)
