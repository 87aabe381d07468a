"""The definition of everything flashsink computes, in plain PyTorch, short and exact.

Every other backend is held to these functions. They accumulate in float32 (float64 for float64 inputs) and
materialise the probabilities. Dimensions: B rows, S tokens, H query and Hk key heads, D head dim, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashsink.types import ActivationStats, BySegment, Layout, Normed, Pairs, Pattern, Segments, SinkStats


def refusal(q: Tensor, v: Tensor | None = None, pattern: Pattern | None = None, softcap: float | None = None) -> str:
    """Why attention cannot take these: it takes everything."""
    return ""


def wide(tensor: Tensor) -> Tensor:
    """The accumulation dtype: float32, or float64 for float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def visible(
    layout: Layout, queries: int, causal: bool, pattern: Pattern | None = None, rows: slice | None = None
) -> Tensor:
    """(B, 1, Sq, Sk) bool: which key a query may see; the queries are the last positions of a row, of which ``rows``
    cuts some out. :class:`flashsink.types.Pattern` has the formula."""
    return layout.visible(queries, causal, pattern, rows)


def probabilities(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    sink_logits: Tensor | None = None,
    pattern: Pattern | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A (B, H, Sq, Sk), 0 where masked, and its natural log-sum-exp (B, H, Sq), 0 at queries that see nothing.

    ``sink_logits`` (H,) adds one more term to every row's sum of exponentials, a key without a value. ``softcap`` c
    makes the scores c tanh(scores / c), as in Gemma 2.
    """
    group = q.shape[1] // k.shape[1]
    # padding may hold NaN: zeroed here, it reaches neither the result nor a gradient
    padding = ~layout.valid()[:, None, :, None]
    keys = wide(k).masked_fill(padding, 0.0).repeat_interleave(group, dim=1)
    queries = wide(q).masked_fill(padding[:, :, layout.tokens - q.shape[2] :], 0.0)
    scores = queries @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    mask = visible(layout, q.shape[2], causal, pattern)
    sees = mask.any(dim=-1, keepdim=True)
    # finite where nothing is seen, for no NaN in the gradients
    scores = scores.masked_fill(~mask & sees, -torch.inf).masked_fill(~sees, torch.finfo(scores.dtype).min)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None, None])
    lse = lse + (lse - lse).detach()  # a score of inf, or none above -inf, is NaN in the whole row, as of softmax
    a = (scores - lse).exp().masked_fill(~mask, 0.0)
    return a, lse.masked_fill(~sees, 0.0).squeeze(-1)


def sink_stats(
    a: Tensor,
    lse: Tensor,
    layout: Layout,
    *,
    causal: bool,
    query_starts: Tensor | None = None,
    pattern: Pattern | None = None,
    segments: Segments | None = None,
) -> SinkStats:
    """Column sums of A over the queries at positions >= ``query_starts``, one entry per row or packed sequence."""
    queries, a = a.shape[2], a.detach()
    more = None if segments is None else by_segment(a, layout, segments, query_starts)
    if query_starts is not None:
        position = torch.arange(layout.tokens, device=a.device)
        counts = position >= query_starts[layout.segments().clamp(min=0)]
        a = a * counts[:, None, layout.tokens - queries :, None]
    seen = layout.query_counts(queries, causal, query_starts, pattern)
    return SinkStats(a.sum(dim=2).float(), seen, lse.detach().float(), more)


def by_segment(a: Tensor, layout: Layout, segments: Segments, query_starts: Tensor | None) -> BySegment:
    """What :class:`flashsink.types.SinkStats` says by segment, of the probabilities A (B, H, Sq, Sk)."""
    own = segments.of_queries(layout, a.shape[2], query_starts)
    chosen = own[..., None] == torch.arange(segments.number, device=a.device)
    sums = chosen.mT.to(a.dtype).unsqueeze(1) @ a
    return segments.sums(sums, torch.special.entr(a).sum(dim=-1), layout, own)


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
    """(out (B, H, Sq, Dv) in q's dtype, one :class:`SinkStats` for every entry of ``counted``).

    An entry of ``counted`` is a ``query_starts``: (N,) int64, the position from which on the queries of each row or
    packed sequence count, or None for all. Dv is the head dim of v.
    """
    a, lse = probabilities(
        q, k, layout, causal=causal, scale=scale, sink_logits=sink_logits, pattern=pattern, softcap=softcap
    )
    options: dict[str, Any] = {"causal": causal, "pattern": pattern, "segments": segments}
    stats = [sink_stats(a, lse, layout, query_starts=x, **options) for x in counted]
    return weigh(a, v, layout).to(q.dtype), stats


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
    """Attention with ACT on the columns ``sinks`` (B, H, Sk): (B, H, Sq, Dv) in q's dtype."""
    a, _ = probabilities(
        q, k, layout, causal=causal, scale=scale, sink_logits=sink_logits, pattern=pattern, softcap=softcap
    )
    return weigh(calibrate(a, sinks, layout, beta), v, layout).to(q.dtype)


def weigh(a: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """A V in the accumulation dtype, with padding of ``v`` taken as 0."""
    values = wide(v).masked_fill(~layout.valid()[:, None, :, None], 0.0)
    return a @ values.repeat_interleave(a.shape[1] // v.shape[1], dim=1)


def calibrate(a: Tensor, sinks: Tensor, layout: Layout, beta: float) -> Tensor:
    """ACT on probabilities: sink columns except BOS times ``beta``, the freed mass to the other visible
    columns in proportion. With m the mass on the sinks of a row, the others grow by (1 - beta m) / (1 - m)
    (Yu et al. 2024). A row with all its mass on sinks is left as it is.

    A sink logit's mass is in no column: it is neither freed nor receives any, and a row's sum over the keys, then
    below 1, stays what it was: the others grow by (rest + (1 - beta) m) / rest, rest being their own mass."""
    chosen = sinks & (layout.offsets() != 0)[:, None, :]
    chosen = chosen.unsqueeze(2)  # (B, H, 1, Sk)
    mass = (a * chosen).sum(dim=-1, keepdim=True)
    rest = (a * ~chosen).sum(dim=-1, keepdim=True)
    least = torch.finfo(a.dtype).tiny ** 0.5  # below it the gradient's 1 / rest^2 overflows
    some = rest > least
    grown = torch.where(some, (rest + (1.0 - beta) * mass) / rest.clamp(min=least), 1.0)
    kept = torch.where(some, beta, 1.0)
    return a * torch.where(chosen, kept, grown)


def decorrelation_sums(layers: Sequence[Tensor], spans: Tensor, layout: Layout, margin: float) -> Tensor:
    """(L,): of every layer the sum over rows and positions 1 <= s < span of max(cos^2(h[BOS], h[s]) - margin, 0).

    With d = <a, h>: cos^2 = d^2 / (|a|^2 |h|^2), the squared norms clamped at 1e-24 as ``F.normalize`` does. In
    float64: in float32 a square overflows at a norm of 1e19 and cos^2 - margin has no digits left for a margin near 1.
    """
    segment = layout.segments()
    offset = layout.offsets()
    counts = (offset >= 1) & (offset < spans[segment.clamp(min=0)])
    row, column = counts.nonzero(as_tuple=True)
    bos = layout.starts[segment[row, column]]
    sums = []
    for layer in layers:
        h, a = layer[row, column].double(), layer[row, bos].double()
        dot = (h * a).sum(dim=-1)
        norms = (h * h).sum(dim=-1).clamp(min=1e-24), (a * a).sum(dim=-1).clamp(min=1e-24)
        cos2 = (dot / norms[0]) * (dot / norms[1])
        sums.append((cos2 - margin).clamp(min=0.0).sum().to(torch.promote_types(layer.dtype, torch.float32)))
    return torch.stack(sums)


def decorrelation_count(spans: Tensor) -> Tensor:
    """Number of counted tokens, sum of max(span - 1, 0): int64 scalar."""
    return (spans - 1).clamp(min=0).sum()


def pairs(layout: Layout, spans: Tensor, anchors: Tensor | None) -> Pairs:
    """Which tokens and anchors the loss pairs: every counted token with every anchor of its own row or packed sequence,
    but an anchor not with itself.

    Args:
        spans: (N,) int64, the first ``span`` tokens of a row or packed sequence count; or (B, S) bool, these do.
        anchors: None: BOS. (B, n) int64: the tokens at these positions, -1 for none. (L, n, C) floating: constants of
            the layers, in BOS's place, so that with lengths the first token does not count; with a mask it may.
    """
    segment, offset = layout.segments(), layout.offsets()
    valid, lengths = segment >= 0, spans.dtype != torch.bool
    counted = valid & (offset < spans[segment.clamp(min=0)] if lengths else spans)
    if anchors is not None and anchors.is_floating_point():
        counted = counted & (offset > 0) if lengths else counted
        shape = (-1, -1, anchors.shape[1])
        return Pairs(valid[..., None].expand(shape), counted[..., None].expand(shape), None, anchors.detach())
    if anchors is None:
        anchors = torch.where(layout.lengths > 0, layout.starts, -1)
        anchors = anchors[None] if layout.packed else anchors[:, None]
    anchors = anchors[:, : layout.tokens * anchors.shape[1]]  # none where there are no tokens
    places = anchors.clamp(min=0)
    theirs = segment.gather(1, places).masked_fill(anchors < 0, -1)
    own = valid[..., None] & (segment[..., None] == theirs[:, None])
    itself = torch.arange(layout.tokens, device=segment.device)[:, None] == places[:, None]
    return Pairs(own, counted[..., None] & own & ~itself, places, None)


def squared_cosines(layer: Tensor, pairs: Pairs, among: Tensor, constants: Tensor | None) -> Tensor:
    """(B, S, M) float64: cos^2 of the states (B, S, C) with their anchors, 0 outside ``among`` (B, S, M) bool, as
    :func:`decorrelation_sums` has it. ``constants`` (M, C): this layer's, where the anchors are such."""
    used = among.any(dim=-1)
    if pairs.places is not None:
        position = torch.arange(layer.shape[1], device=layer.device)[:, None]
        used = used | ((position == pairs.places[:, None]) & among.any(dim=1)[:, None]).any(dim=-1)
    h = layer.masked_fill(~used[..., None], 0.0).double()  # what is not used may be NaN
    if pairs.places is not None:
        a = h.gather(1, pairs.places[..., None].expand(-1, -1, h.shape[-1]))
    else:
        assert constants is not None
        a = constants.detach().to(layer.device).double().expand(h.shape[0], -1, -1)
    norms = (h * h).sum(dim=-1)[..., None].clamp(min=1e-24), (a * a).sum(dim=-1)[:, None].clamp(min=1e-24)
    dot = h @ a.mT
    return ((dot / norms[0]) * (dot / norms[1])).masked_fill(~among, 0.0)


def pair_sums(layers: Sequence[Tensor], pairs: Pairs, margin: float) -> Tensor:
    """:func:`decorrelation_sums` over ``pairs``: (L,), of every layer the sum of max(cos^2 - margin, 0)."""
    sums = []
    for index, layer in enumerate(layers):
        cos2 = squared_cosines(layer, pairs, pairs.counts, None if pairs.states is None else pairs.states[index])
        sums.append((cos2 - margin).clamp(min=0.0).sum().to(torch.promote_types(layer.dtype, torch.float32)))
    return torch.stack(sums)


def mean_squared_cosines(layer: Tensor, pairs: Pairs, constants: Tensor | None) -> Tensor:
    """(B, S) float32 without a graph: of every valid token cos^2 with the anchors of its row or sequence, the mean over
    them, itself included where it is one (1); 0 at padding and without anchors."""
    total = squared_cosines(layer.detach(), pairs, pairs.own, constants).sum(dim=-1)
    return (total / pairs.own.sum(dim=-1).clamp(min=1)).float()


def activation_stats(layers: Sequence[Tensor], layout: Layout, median: bool) -> ActivationStats:
    """Largest |h| of every token with its feature, and the median |h| of every row (definition 3). NaN is larger than
    all numbers, as for ``torch.amax``."""
    valid = layout.valid()
    maxima, features = [], []
    for layer in layers:
        size = wide(layer.detach()).abs()
        # argmax does not promise the first of equal values; the lowest index that reaches the maximum does
        top = size.amax(dim=-1)
        index = torch.arange(size.shape[-1], device=size.device)
        reached = (size == top.unsqueeze(-1)) | size.isnan()
        lowest = torch.where(reached, index, size.shape[-1]).amin(dim=-1)
        maxima.append(top.float().masked_fill(~valid, 0.0))
        features.append(lowest.int().masked_fill(~valid, -1))
    medians = torch.stack([row_medians(layer, layout) for layer in layers]) if median else None
    return ActivationStats(torch.stack(maxima), torch.stack(features), medians)


def rms_norm(h: Tensor, weight: Tensor, eps: float, layout: Layout, spans: Tensor | None, margin: float) -> Normed:
    """RMSNorm of h (B, S, C) as Llama has it, with this layer's decorrelation sum (where ``spans`` is given) and
    its largest activations. The normalized states are rounded to h's dtype before the weight (C,) multiplies them."""
    size = wide(h)
    out = weight * (size * torch.rsqrt(size.square().mean(dim=-1, keepdim=True) + eps)).to(h.dtype)
    total = None if spans is None else decorrelation_sums([h], spans, layout, margin)[0].float()
    stats = activation_stats([h], layout, False)
    return Normed(out, total, stats.max_abs[0], stats.feature[0])


def row_medians(layer: Tensor, layout: Layout) -> Tensor:
    """(B,) float32: median of |h| over all features of a row's valid tokens; 0 for a row without tokens."""
    size, valid = wide(layer.detach()).abs(), layout.valid()
    rows = [size[b][valid[b]].flatten() for b in range(layout.rows)]
    medians = [r.median() if len(r) else r.new_zeros(()) for r in rows]
    return torch.stack(medians).float() if medians else size.new_zeros(0, dtype=torch.float32)
