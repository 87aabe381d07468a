"""What flashsink returns: small frozen records of float32 tensors without a graph.

Dimensions: B rows, H query heads, Sq queries, Sk keys, L layers, S tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SinkStats:
    """How much attention every key received in one call of attention.

    Attributes:
        received: (B, H, Sk) float32, sum of the probabilities over the counted queries that may see the key.
        queries: (B, Sk) int64, the number of those queries.
        lse: (B, H, Sq) float32, natural log-sum-exp of the scaled scores; 0 at padded queries.

    ``received`` and ``queries`` may be passed as functions, which are called when they are first read and then dropped
    with the tensors they hold; :meth:`wait_for_backward` lets ``received`` drop them at once.
    """

    def __init__(
        self, received: Tensor | Callable[[], Tensor], queries: Tensor | Callable[[], Tensor], lse: Tensor
    ) -> None:
        self._received = received
        self._queries = queries
        self.lse = lse

    @property
    def received(self) -> Tensor:
        if not isinstance(self._received, Tensor):
            self._received = self._received()
        return self._received

    @property
    def queries(self) -> Tensor:
        if not isinstance(self._queries, Tensor):
            self._queries = self._queries()
        return self._queries

    def wait_for_backward(self) -> None:
        """From now on only the backward can provide ``received``; nothing is held for the statistics pass."""
        release = getattr(self._received, "release", None)
        if release is not None:
            release()

    @property
    def mean_received(self) -> Tensor:
        """(B, H, Sk) float32: ``received`` divided by the number of counted queries; 0 where there are none."""
        return self.received / self.queries.clamp(min=1).unsqueeze(1)

    def sink_rate(self, eps: float = 0.3, min_queries: int = 1) -> Tensor:
        """(B, Sk) float32: the share of heads in which a key is a sink, ``mean_received > eps``.

        Keys that fewer than ``min_queries`` queries may see are never sinks: the last few keys are seen by
        one to three queries, themselves included, which fakes sinks.
        """
        sinks = (self.mean_received > eps) & (self.queries >= max(min_queries, 1)).unsqueeze(1)
        return sinks.float().mean(dim=1)


@dataclass(frozen=True)
class ActivationStats:
    """The largest activation of every token in every layer.

    Attributes:
        max_abs: (L, B, S) float32, max |h| over the features; 0 at padded tokens, NaN where a feature is NaN.
        feature: (L, B, S) int32 in 0..C-1, the lowest feature that reaches it, with NaN the first that is NaN; -1 at
            padded tokens.
        median: (L, B) float32, median of |h| over all features of the row's valid tokens (``torch.median``:
            the lower of two middle values), or None when it was not asked for; 0 for a row without tokens.
    """

    max_abs: Tensor
    feature: Tensor
    median: Tensor | None


class Normed(NamedTuple):
    """What one pass over hidden states h (B, S, C) gives.

    Attributes:
        out: (B, S, C) in h's dtype, h after RMSNorm.
        total: float32 scalar with its graph, this layer's sum of max(cos^2 - margin, 0); None when not asked for.
        max_abs: (B, S) float32, and feature: (B, S) int32, as in :class:`ActivationStats`; without a graph.
    """

    out: Tensor
    total: Tensor | None
    max_abs: Tensor
    feature: Tensor


class Layout(NamedTuple):
    """Which tokens are valid, resolved once per call. Either dense rows or one packed row.

    Attributes:
        starts: (B,) int64, first valid position of every row. In packed layout (N,), of every sequence.
        lengths: (B,) int64, number of valid tokens. In packed layout (N,).
        rows: number of rows B (1 when packed).
        tokens: number of positions S in a row, valid or not.
        packed: whether the single row holds N sequences one after another.
        full: known on the host: dense rows without padding.
    """

    starts: Tensor
    lengths: Tensor
    rows: int
    tokens: int
    packed: bool
    full: bool = False

    def segments(self) -> Tensor:
        """(rows, tokens) int64: index of the row or packed sequence a position belongs to, -1 at padding."""
        device = self.starts.device
        position = torch.arange(self.tokens, device=device)
        if self.packed:
            ends = (self.starts + self.lengths).contiguous()
            index = torch.bucketize(position, ends, right=True)
            return torch.where(index < len(ends), index, -1).unsqueeze(0)
        inside = (position >= self.starts[:, None]) & (position < (self.starts + self.lengths)[:, None])
        return torch.where(inside, torch.arange(self.rows, device=device)[:, None], -1)

    def offsets(self) -> Tensor:
        """(rows, tokens) int64: position within the row or packed sequence, 0 = BOS; -1 at padding."""
        segment = self.segments()
        position = torch.arange(self.tokens, device=segment.device)
        return torch.where(segment >= 0, position - self.starts[segment.clamp(min=0)], -1)

    def valid(self) -> Tensor:
        """(rows, tokens) bool: valid tokens."""
        return self.segments() >= 0

    def queries_later(
        self, queries: int, causal: bool, query_starts: Tensor | None = None
    ) -> Tensor | Callable[[], Tensor]:
        """:meth:`query_counts` for :class:`SinkStats`: a dozen small operations that wait until they are read, except
        in a graph being compiled, which can return tensors only."""
        if torch.compiler.is_compiling():
            return self.query_counts(queries, causal, query_starts)
        return functools.partial(self.query_counts, queries, causal, query_starts)

    def query_counts(self, queries: int, causal: bool, query_starts: Tensor | None = None) -> Tensor:
        """(rows, tokens) int64: how many queries see a key, of those at positions >= ``query_starts`` (one entry per
        row or packed sequence); the queries are the last ``queries`` positions of a row."""
        segment = self.segments()
        index = segment.clamp(min=0)
        position = torch.arange(self.tokens, device=segment.device)
        low = position.expand_as(segment) if causal else self.starts[index]
        low = low.clamp(min=self.tokens - queries)
        if query_starts is not None:
            low = torch.maximum(low, query_starts[index])
        count = (self.starts + self.lengths)[index] - low
        return torch.where(segment >= 0, count.clamp(min=0), 0)
