"""The ``cpu`` backend: the C++ kernels of ``csrc``.

What runs where, always the same for the same arguments:

- ``attention`` of float16 / bfloat16 / float32 with its statistics, whatever the pattern, in float32 (half precision is
  widened first: faster than torch's bfloat16 path, and as exact as the reference): :mod:`flashsink.cpu.attention`.
- ``calibrated_attention``: :mod:`flashsink.cpu.calibrated` in dense rows where no gradient is needed; else, and with a
  pattern, a softcap or sink logits, the reference.
- float64, no queries, and a graph being compiled (what runs depends on values here): the reference.
- ``decorrelation_sums``, ``activation_stats`` and ``rms_norm``: see :mod:`flashsink.cpu.library` and
  :mod:`flashsink.cpu.norm`.

Dimensions: B rows, H query and Hk key heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashsink import reference
from flashsink.cpu.calibrated import calibrated_attention
from flashsink.cpu.library import activation_stats, decorrelation_sums
from flashsink.cpu.norm import rms_norm
from flashsink.cpu.operators import OPERATORS
from flashsink.operators import register
from flashsink.reference import refusal
from flashsink.types import Layout, Pattern, Segments, SinkStats, narrowed

__all__ = ["activation_stats", "attention", "calibrated_attention", "decorrelation_sums", "refusal", "rms_norm"]

register(OPERATORS, "CPU")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    counted: Sequence[Tensor | None] = (),
    sink_logits: Tensor | None = None,
    pattern: Pattern | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, list[SinkStats]]:
    """:func:`flashsink.reference.attention`; no (Sq, Sk) tensor of probabilities."""
    options: dict[str, Any] = {"causal": causal, "scale": scale, "softcap": softcap}
    if q.dtype == torch.float64 or q.numel() == 0 or v.numel() == 0 or torch.compiler.is_compiling():
        options |= {"counted": counted, "sink_logits": sink_logits, "pattern": pattern, "segments": segments}
        return reference.attention(q, k, v, layout, **options)
    pattern, queries = narrowed(pattern, layout.tokens), q.shape[2]
    targets, kinds = _targets(layout, queries, counted, segments)
    sums = len(counted) * (1 + (segments.number if segments is not None else 0))
    out, lse, received, entropy = torch.ops.flashsink.attention(
        *(q.float(), k.float(), v.float(), None if sink_logits is None else sink_logits.float(), targets, sums),
        *(segments is not None, layout.starts, layout.lengths, layout.packed),
        *(causal, scale, softcap, *(pattern or Pattern())),
    )
    stats = []
    for n, query_starts in enumerate(counted):
        more = None
        if segments is not None:
            own = received[len(counted) :].unflatten(0, (len(counted), -1))[n].movedim(0, 2)
            more = segments.sums(own, entropy, layout, kinds[n])
        seen = layout.queries_later(queries, causal, query_starts, pattern)
        stats.append(SinkStats(received[n], seen, lse, more))
    return out.to(q.dtype), stats


def _targets(
    layout: Layout, queries: int, counted: Sequence[Tensor | None], segments: Segments | None
) -> tuple[Tensor | None, list[Tensor]]:
    """Which column sums a query adds to, (n, B, Sq) int32: that of every entry of ``counted``, then for every entry
    that of its segment; and the segments (B, Sq) of the queries that count."""
    if not counted:
        return None, []
    if segments is None and all(x is None for x in counted):
        number = torch.arange(len(counted), dtype=torch.int32)
        return number[:, None, None].expand(-1, layout.rows, queries), []
    every, count = Segments(torch.zeros(layout.rows, layout.tokens, dtype=torch.long), 1), len(counted)
    found = [(every.of_queries(layout, queries, x), n) for n, x in enumerate(counted)]
    kinds = [] if segments is None else [segments.of_queries(layout, queries, x) for x in counted]
    found += [(own, count + n * segments.number) for n, own in enumerate(kinds)] if segments is not None else []
    return torch.stack([torch.where(own < 0, -1, own + first).int() for own, first in found]), kinds
