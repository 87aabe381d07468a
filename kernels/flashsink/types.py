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
        segment_received: (B, H, n, Sk) float32, ``received`` by the segment of the query, of n segments: several groups
            of queries in one pass. What queries of no segment give is in none.
        segment_mass: (B, H, n, n), packed (N, H, n, n) float32: sum of the probabilities of the counted queries of
            segment a on the keys of segment b.
        segment_queries: (B, n), packed (N, n) int64: the number of counted queries of a segment.
        entropy: (B, H, Sq) float32, of every valid query, counted or not: -sum of p ln p over its keys, in nats; 0 at
            padding. With sink logits the p of the keys sum to less than 1, and the sink's own term is not in it.

    The last four are None where no segments were given.

    ``received`` and ``queries`` may be passed as functions, which are called when they are first read and then dropped
    with the tensors they hold; :meth:`wait_for_backward` lets ``received`` drop them at once.
    """

    def __init__(
        self,
        received: Tensor | Callable[[], Tensor],
        queries: Tensor | Callable[[], Tensor],
        lse: Tensor,
        by_segment: BySegment | None = None,
    ) -> None:
        self._received = received
        self._queries = queries
        self.lse = lse
        self.segment_received: Tensor | None = None
        self.segment_mass: Tensor | None = None
        self.segment_queries: Tensor | None = None
        self.entropy: Tensor | None = None
        if by_segment is not None:
            self.segment_received, self.segment_mass, self.segment_queries, self.entropy = by_segment

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

    def of_first(self, tokens: int) -> SinkStats:
        """The statistics of the first ``tokens`` keys, of which there may be more."""
        received = self._received
        if not isinstance(received, Tensor) or received.shape[-1] == tokens:
            return self
        first = SinkStats(received[..., :tokens], self.queries[..., :tokens], self.lse)
        if self.segment_received is not None:
            first.segment_received = self.segment_received[..., :tokens]
        first.segment_mass, first.segment_queries, first.entropy = self.segment_mass, self.segment_queries, self.entropy
        return first

    @property
    def mean_received(self) -> Tensor:
        """(B, H, Sk) float32: ``received`` divided by the number of counted queries; 0 where there are none."""
        return self.received / self.queries.clamp(min=1).unsqueeze(1)

    @property
    def mean_segment_mass(self) -> Tensor | None:
        """As ``segment_mass``, for one query: where every key has a segment row a sums to 1, without sink logits. 0
        where segment a has no counted query."""
        if self.segment_mass is None or self.segment_queries is None:
            return None
        return self.segment_mass / self.segment_queries.clamp(min=1)[:, None, :, None]

    def sink_rate(self, eps: float = 0.3, min_queries: int = 1) -> Tensor:
        """(B, Sk) float32: the share of heads in which a key is a sink, ``mean_received > eps``.

        Keys that fewer than ``min_queries`` queries may see are never sinks: the last few keys are seen by
        one to three queries, themselves included, which fakes sinks.
        """
        sinks = (self.mean_received > eps) & (self.queries >= max(min_queries, 1)).unsqueeze(1)
        return sinks.float().mean(dim=1)


class BySegment(NamedTuple):
    """What :class:`SinkStats` says by segment."""

    received: Tensor
    mass: Tensor
    queries: Tensor
    entropy: Tensor


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


class Pattern(NamedTuple):
    """Which keys a query sees beside padding and packing.

    A valid query sees a valid key of its own row or packed sequence where ``(order & window & chunk) | blocks |
    prefix`` holds, order being ``j <= i`` for query position i and key position j, or nothing without ``causal``. With
    ``mask`` it sees exactly the pairs of the mask instead.

    Attributes:
        window: the last tokens that a query sees, its own included: i - j < window; without ``causal``
            |i - j| < window.
        chunk: a query sees keys only in its own chunk of this many tokens, counted from BOS.
        prefix: (B,) int64, packed (N,): the leading tokens of a row or sequence that all see each other.
        blocks: (B, Sk) int64, packed (1, Sk): tokens with equal numbers >= 0 see each other, adjacent or not.
        mask: (B or 1, 1, Sq, Sk) bool. A query that sees nothing gives 0, as padding does.
    """

    window: int | None = None
    chunk: int | None = None
    prefix: Tensor | None = None
    blocks: Tensor | None = None
    mask: Tensor | None = None

    def named(self) -> list[str]:
        """The fields that say something."""
        return [name for name, value in zip(self._fields, self, strict=True) if value is not None]

    def wider(self) -> bool:
        """Whether the keys that a query sees may be other than one interval."""
        return any(x is not None for x in (self.prefix, self.blocks, self.mask))


def narrowed(pattern: Pattern | None, tokens: int) -> Pattern | None:
    """``pattern`` for rows of ``tokens`` positions: without a window and chunk that leave nothing out, None where it
    then says nothing."""
    if pattern is None:
        return None
    window, chunk = (None if x is None or x >= tokens else x for x in (pattern.window, pattern.chunk))
    pattern = pattern._replace(window=window, chunk=chunk)
    return pattern if pattern.named() else None


class Segments(NamedTuple):
    """Kinds of tokens.

    Attributes:
        ids: (B, Sk) int64, packed (1, Sk), below ``number``; -1 for none and at padding.
        number: n, how many there are.
    """

    ids: Tensor
    number: int

    def of_queries(self, layout: Layout, queries: int, query_starts: Tensor | None) -> Tensor:
        """(B, Sq) int64: the segments of the last ``queries`` positions, -1 for those before ``query_starts``."""
        own = self.ids[:, layout.tokens - queries :]
        if query_starts is None:
            return own
        position = torch.arange(layout.tokens - queries, layout.tokens, device=own.device)
        first = query_starts[layout.segments().clamp(min=0)[:, layout.tokens - queries :]]
        return own.masked_fill(position < first, -1)

    def sums(self, received: Tensor, entropy: Tensor, layout: Layout, of_queries: Tensor) -> BySegment:
        """The statistics by segment, of ``received`` (B, H, n, Sk) and :meth:`of_queries`."""
        (_, heads, n, keys), queries = received.shape, of_queries.shape[1]
        sequences = len(layout.starts)
        row = layout.segments() * n  # of a sequence's first segment; where there is none, the place after the last
        place = torch.where(self.ids >= 0, row + self.ids, sequences * n).flatten()
        mass = received.new_zeros(sequences * n + 1, heads * n)
        mass.index_add_(0, place, received.permute(0, 3, 1, 2).reshape(-1, heads * n))
        mass = mass[:-1].unflatten(0, (sequences, n)).unflatten(2, (heads, n)).permute(0, 2, 3, 1).contiguous()
        place = torch.where(of_queries >= 0, row[:, keys - queries :] + of_queries, sequences * n).flatten()
        counts = torch.zeros(sequences * n + 1, dtype=torch.long, device=place.device)
        counts.index_add_(0, place, torch.ones_like(place))
        return BySegment(received.float(), mass.float(), counts[:-1].view(sequences, n), entropy.float())


class Pairs(NamedTuple):
    """The anchors of every row and the tokens whose cosine with them the decorrelation loss squares.

    Attributes:
        own: (B, S, M) bool, whether an anchor is one of the token's own row or packed sequence.
        counts: (B, S, M) bool, the pairs of a token and an anchor that count in the loss.
        places: (B, M) int64, the anchors' positions; without meaning where no token is paired. None with ``states``.
        states: (L, M, C), anchors that are constants of every layer, or None.
    """

    own: Tensor
    counts: Tensor
    places: Tensor | None
    states: Tensor | None

    def to(self, device: torch.device) -> Pairs:
        return Pairs(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


class Layout(NamedTuple):
    """Which tokens are valid, resolved once per call. Either dense rows or one packed row.

    Attributes:
        starts: (B,) int64, first valid position of every row. In packed layout (N,), of every sequence.
        lengths: (B,) int64, number of valid tokens. In packed layout (N,).
        rows: number of rows B (1 when packed).
        tokens: number of positions S in a row, valid or not.
        packed: whether the single row holds N sequences one after another.
        full: known on the host: dense rows without padding.
        segment: (tokens,) int64, what :meth:`segments` gives for the packed row, from where it was made for all calls
            that share the layout; None where it was not.
    """

    starts: Tensor
    lengths: Tensor
    rows: int
    tokens: int
    packed: bool
    full: bool = False
    segment: Tensor | None = None

    def to(self, device: torch.device) -> Layout:
        if self.starts.device == device:
            return self
        segment = None if self.segment is None else self.segment.to(device)
        return self._replace(starts=self.starts.to(device), lengths=self.lengths.to(device), segment=segment)

    def segments(self) -> Tensor:
        """(rows, tokens) int64: index of the row or packed sequence a position belongs to, -1 at padding."""
        if self.segment is not None:
            return self.segment.unsqueeze(0)
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

    def reach(self, before: bool, after: bool, pattern: Pattern | None = None) -> tuple[Tensor, Tensor]:
        """(rows, tokens) int64 each: the positions low <= x < high around every token that its row or sequence, and
        the pattern's window and chunk, leave it: those before it and those after it, where asked for. Without meaning
        at padding."""
        index = self.segments().clamp(min=0)
        low, high = self.starts[index], (self.starts + self.lengths)[index]
        position = torch.arange(self.tokens, device=index.device).expand_as(index)
        if pattern is not None and pattern.chunk is not None:
            first = low + (position - low) // pattern.chunk * pattern.chunk
            low, high = torch.maximum(low, first), torch.minimum(high, first + pattern.chunk)
        if pattern is not None and pattern.window is not None:
            low, high = (
                torch.maximum(low, position - pattern.window + 1),
                torch.minimum(high, position + pattern.window),
            )
        return low if before else position, high if after else position + 1

    def visible(
        self,
        queries: int,
        causal: bool,
        pattern: Pattern | None = None,
        rows: slice | None = None,
        keys: slice | None = None,
    ) -> Tensor:
        """(B, 1, Sq, Sk) bool: which keys a query sees, of the last ``queries`` positions; ``rows`` and ``keys`` cut
        queries and keys out, so that a tile needs no whole."""
        rows, keys = rows or slice(None), keys or slice(None)  # dynamo cannot trace a slice as a default
        segment = self.segments()
        own, other = _cut(segment, queries, rows, keys)
        seen = (own == other) & (own >= 0)
        pattern = pattern or Pattern()
        if pattern.mask is not None:
            return seen.unsqueeze(1) & pattern.mask[:, :, rows, keys]
        position = torch.arange(self.tokens, device=segment.device).unsqueeze(0)
        i, j = _cut(position, queries, rows, keys)
        near = j <= i if causal else torch.ones_like(j <= i)
        if pattern.window is not None:
            near = near & ((i - j).abs() < pattern.window)
        if pattern.chunk is not None:
            i, j = _cut(self.offsets() // pattern.chunk, queries, rows, keys)
            near = near & (i == j)
        if pattern.blocks is not None:
            i, j = _cut(pattern.blocks, queries, rows, keys)
            near = near | ((i == j) & (i >= 0))
        if pattern.prefix is not None:
            inside = self.offsets() < pattern.prefix[segment.clamp(min=0)]  # padding belongs to no sequence
            i, j = _cut(inside, queries, rows, keys)
            near = near | (i & j)
        return (seen & near).unsqueeze(1)

    def queries_later(
        self, queries: int, causal: bool, query_starts: Tensor | None = None, pattern: Pattern | None = None
    ) -> Tensor | Callable[[], Tensor]:
        """:meth:`query_counts` for :class:`SinkStats`: a dozen small operations that wait until they are read, except
        in a graph being compiled, which can return tensors only."""
        if torch.compiler.is_compiling():
            return self.query_counts(queries, causal, query_starts, pattern)
        return functools.partial(self.query_counts, queries, causal, query_starts, pattern)

    def query_counts(
        self, queries: int, causal: bool, query_starts: Tensor | None = None, pattern: Pattern | None = None
    ) -> Tensor:
        """(rows, tokens) int64: how many queries see a key, of those at positions >= ``query_starts`` (one entry per
        row or packed sequence); the queries are the last ``queries`` positions of a row."""
        segment = self.segments()
        hidden = self.tokens - queries
        if pattern is not None and pattern.wider():
            counts = torch.ones_like(segment[:, hidden:], dtype=torch.bool)
            if query_starts is not None:
                position = torch.arange(hidden, self.tokens, device=segment.device)
                counts = position >= query_starts[segment.clamp(min=0)[:, hidden:]]
            step = max(queries, 1) if torch.compiler.is_compiling() else 64
            parts = [slice(low, low + step) for low in range(0, queries, step)]
            tiles = (self.visible(queries, causal, pattern, x) & counts[:, None, x, None] for x in parts)
            return sum((tile.sum(dim=(1, 2)) for tile in tiles), torch.zeros_like(segment))
        low, high = self.reach(not causal, True, pattern)
        low = low.clamp(min=hidden)
        if query_starts is not None:
            low = torch.maximum(low, query_starts[segment.clamp(min=0)])
        return torch.where(segment >= 0, (high - low).clamp(min=0), 0)


def _cut(x: Tensor, queries: int, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    """What x (rows, Sk) says of the last ``queries`` positions (rows, Sq, 1) and of all (rows, 1, Sk), cut."""
    return x[:, x.shape[1] - queries :][:, rows, None], x[:, None, keys]
