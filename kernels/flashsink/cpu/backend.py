"""The ``cpu`` backend: torch's own CPU attention, and the C++ kernels of ``csrc`` for what is ours.

What runs where, always the same for the same arguments:

- ``attention`` of float16 / bfloat16 / float32, in float32 (half precision is widened first: faster than torch's
  bfloat16 path, and as exact as the reference): sequences of up to 256 tokens by one C++ kernel,
  :mod:`flashsink.cpu.short`; else torch's flash attention for CPU with our own backward,
  :mod:`flashsink.cpu.attention`. Statistics are a second pass in C++, :mod:`flashsink.cpu.received`.
- ``attention`` with ``sink_logits``: the same, rescaled, where no gradient is needed. Torch's log-sum-exp carries
  none, so :mod:`flashsink.cpu.tiled` runs where one is.
- ``attention`` with a pattern, a softcap, or v's head dim unlike q's: :mod:`flashsink.cpu.tiled`.
- ``calibrated_attention``: two sets of keys, attention over all but the sinks by torch's kernel and a skinny product
  for the sinks, in dense rows where no gradient is needed (it needs the log-sum-exp too); else, and with a pattern,
  a softcap or sink logits, the reference.
- scores of a row that are all -inf, which take an infinity in q or k: 0 by torch's kernel, NaN elsewhere.
- float64, no queries, and a graph being compiled (what runs depends on values here): the reference.
- ``decorrelation_sums``, ``activation_stats`` and ``rms_norm``: see :mod:`flashsink.cpu.library` and
  :mod:`flashsink.cpu.norm`.

Dimensions: B rows, H query and Hk key heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink import reference
from flashsink.cpu import short
from flashsink.cpu.attention import LEAST, flash, mask_of
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
    pattern = narrowed(pattern, layout.tokens)
    learning = sink_logits is not None and _needs_gradient(q, k, v, sink_logits)
    run: Callable[..., tuple[Tensor, list[SinkStats]]] | None = None
    if q.dtype == torch.float64 or q.numel() == 0 or v.numel() == 0 or torch.compiler.is_compiling():
        run = reference.attention
    elif pattern is not None or softcap is not None or v.shape[3] != q.shape[3] or learning or segments is not None:
        run = _tiled_attention
    if run is not None:
        options: dict[str, Any] = {"counted": counted, "sink_logits": sink_logits, "pattern": pattern}
        return run(q, k, v, layout, causal=causal, scale=scale, softcap=softcap, segments=segments, **options)
    if layout.packed or short.serves(q, k, layout.lengths):
        wide = _Wide(q.float(), k.float(), v.float(), None)  # padding is never read
    else:
        wide = _widen(q, k, v, layout)
    wide_q, wide_k, wide_v, padding = wide
    out, lse = torch.ops.flashsink.attention(
        wide_q, wide_k, wide_v, layout.starts, layout.lengths, layout.packed, causal, scale
    )
    if padding is not None:
        silent = padding[:, None, layout.tokens - q.shape[2] :]
        out, lse = out.masked_fill(silent.unsqueeze(-1), 0.0), lse.masked_fill(silent, 0.0)
    if sink_logits is not None:
        every = torch.logaddexp(lse, sink_logits.float()[:, None])
        out, lse = out * (lse - every).exp().unsqueeze(-1), every
        lse = lse.masked_fill(~layout.valid()[:, None, layout.tokens - q.shape[2] :], 0.0)
    stats = [_sink_stats(wide, lse, layout, causal, scale, query_starts) for query_starts in counted]
    return out.to(q.dtype), stats


def _tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    counted: Sequence[Tensor | None],
    sink_logits: Tensor | None,
    pattern: Pattern | None,
    softcap: float | None,
    segments: Segments | None,
) -> tuple[Tensor, list[SinkStats]]:
    wide, queries = _widen(q, k, v, layout), q.shape[2]
    targets, kinds = _targets(layout, queries, counted, segments)
    sums = len(counted) * (1 + (segments.number if segments is not None else 0))
    out, lse, received, entropy = torch.ops.flashsink.tiled_attention(
        *(wide.q, wide.k, wide.v, None if sink_logits is None else sink_logits.float(), targets, sums),
        *(segments is not None, layout.starts, layout.lengths, layout.packed),
        *(causal, scale, softcap, *(pattern or Pattern())),
    )
    if wide.padding is not None:  # a padded query's upstream gradient is not looked at
        out = out.masked_fill(wide.padding[:, None, layout.tokens - queries :, None], 0.0)
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
    every, count = Segments(torch.zeros(layout.rows, layout.tokens, dtype=torch.long), 1), len(counted)
    found = [(every.of_queries(layout, queries, x), n) for n, x in enumerate(counted)]
    kinds = [] if segments is None else [segments.of_queries(layout, queries, x) for x in counted]
    found += [(own, count + n * segments.number) for n, own in enumerate(kinds)] if segments is not None else []
    return torch.stack([torch.where(own < 0, -1, own + first).int() for own, first in found]), kinds


def calibrated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    layout: Layout,
    *,
    beta: float,
    scale: float,
    causal: bool = True,
    pattern: Pattern | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """:func:`flashsink.reference.calibrated_attention` without a tensor of probabilities.

    With m the mass of a row on its sinks, o_S their part of the output and o_R attention over the other keys alone
    (log-sum-exp r, and s that of the sinks), ACT is beta o_S + (1 - beta m) o_R with m = e^s / (e^r + e^s). Equal to
    c o + (beta - c) o_S with c = (1 - beta m) / (1 - m), but nothing cancels where m is near 1.
    """
    pattern = narrowed(pattern, layout.tokens)
    apart = layout.packed or q.dtype == torch.float64 or q.numel() == 0 or torch.compiler.is_compiling()
    unlike = pattern is not None or softcap is not None or v.shape[3] != q.shape[3]
    if apart or unlike or sink_logits is not None or not causal or _needs_gradient(q, k, v):
        options: dict[str, Any] = {"pattern": pattern, "softcap": softcap, "sink_logits": sink_logits}
        return reference.calibrated_attention(q, k, v, sinks, layout, beta=beta, scale=scale, causal=causal, **options)
    chosen = sinks & (layout.offsets() > 0)[:, None, :]
    most = int(chosen.sum(dim=-1).max())
    if most == 0:
        return attention(q, k, v, layout, causal=True, scale=scale)[0]
    queries = q.shape[2]
    wide = _widen(q, k, v, layout)
    without = torch.zeros(chosen.shape).masked_fill_(chosen, LEAST)[:, :, None, :].expand(-1, -1, queries, -1)
    mask = mask_of(layout, queries, True)
    if mask is not None:
        without = torch.minimum(mask, without)
    others, lse_others = flash(wide.q, wide.k, wide.v, queries == layout.tokens, without, scale)
    # the sinks of every head, gathered: few
    columns = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
    row, head = torch.arange(q.shape[0])[:, None, None], torch.arange(q.shape[1])[:, None]
    keys, values = (x[row, head // (q.shape[1] // k.shape[1]), columns] for x in (wide.k, wide.v))
    position = torch.arange(layout.tokens - queries, layout.tokens)[:, None]
    seen = chosen.gather(-1, columns).unsqueeze(2) & (position >= columns.unsqueeze(2))
    scores = (wide.q @ keys.mT).mul_(scale).masked_fill_(~seen, -torch.inf)
    lse = torch.logaddexp(lse_others, scores.logsumexp(dim=-1)).unsqueeze(-1)
    a = (scores - lse).exp_()
    mass, rest = a.sum(dim=-1, keepdim=True), (lse_others.unsqueeze(-1) - lse).exp_()
    some = rest > torch.finfo(torch.float32).tiny ** 0.5  # as in the reference: else the row stays as it is
    kept, grown = torch.where(some, beta, 1.0), torch.where(some, rest + (1.0 - beta) * mass, rest)
    out = (a @ values).mul_(kept).addcmul_(others, grown)
    if wide.padding is not None:
        out = out.masked_fill(wide.padding[:, None, layout.tokens - queries :, None], 0.0)
    return out.to(q.dtype)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Wide(NamedTuple):
    """q (B, H, Sq, D), k and v (B, Hk, Sk, D) in float32, and padding (B, Sk) bool, or None
    where there is none or it is never touched."""

    q: Tensor
    k: Tensor
    v: Tensor
    padding: Tensor | None


def _widen(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> _Wide:
    """Dense rows. Padding may hold NaN and must neither send nor receive a gradient, so it is zeroed."""
    q, k, v = (x.float() for x in (q, k, v))
    padding = ~layout.valid()
    if not bool(padding.any()):
        return _Wide(q, k, v, None)
    keys = padding[:, None, :, None]
    queries = keys[:, :, layout.tokens - q.shape[2] :]
    return _Wide(q.masked_fill(queries, 0.0), k.masked_fill(keys, 0.0), v.masked_fill(keys, 0.0), padding)


@torch.no_grad()
def _sink_stats(
    wide: _Wide, lse: Tensor, layout: Layout, causal: bool, scale: float, query_starts: Tensor | None
) -> SinkStats:
    q, k, lse = wide.q.detach(), wide.k.detach(), lse.detach()
    received = torch.ops.flashsink.received(
        q, k, lse, layout.starts, layout.lengths, query_starts, layout.packed, causal, scale
    )
    return SinkStats(received, layout.queries_later(q.shape[2], causal, query_starts), lse)
