"""Forwards of a subject with everything read off on the way: one pass, and no (S, S) tensor for all layers.

L layers, B rows padded on the right, H query and Hk key heads, S tokens, D head dim. Text queries are the positions
behind a row's span.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashsink
from avsr.models.speech_llm import Assembled
from avsr.tools.analysis.subject import Subject

EPS = 0.3  # a key is a sink when its mean received attention exceeds this (Gu et al.)
MIN_QUERIES = 8  # keys that fewer queries see are not counted
CELLS = 4_000_000  # probabilities in one block
_NAME, _MARK = "avsr_watched", "_avsr_watched"
# (layer from 0, q (B, H, S, D) and k, v (B, Hk, S, D) as attention gets them, the factor of the scores)
See = Callable[[int, Tensor, Tensor, Tensor, float], None]


@dataclass
class Observed:
    """One batch. ``counted`` says which keys at least ``MIN_QUERIES`` text queries other than their own see, in a row
    with fewer text tokens all of them (so that its prompt counts); the statistics "of others" are of these queries."""

    rate: Tensor  # (L, B, S) share of heads in which a key is a sink, of all queries; 0 where not ``counted_raw``
    counted_raw: Tensor  # (B, S) bool, keys that at least ``MIN_QUERIES`` queries see, their own included
    rate_text: Tensor  # (L, B, S) the same of the text queries, however few
    sinks: Tensor  # (L, B, H, S) bool, sinks of others
    received: Tensor  # (L, B, S) mean attention from others, mean over heads
    received_value: Tensor  # (L, B, S) mean over heads of that attention x |v|
    value_norm: Tensor  # (L, B, S) |v|, mean over key heads
    mass: Tensor  # (L, B, S) attention of all text queries, their own included, mean over heads
    counted: Tensor  # (B, S) bool
    cosine: Tensor  # (L, B, S) to BOS
    max_abs: Tensor  # (L, B, S)
    feature: Tensor  # (L, B, S) int32
    median: Tensor  # (L, B)
    decorrelation: float  # mean squared cosine over ``count`` tokens
    count: int


@torch.no_grad()
def observe(subject: Subject, rows: Assembled) -> Observed:
    """All statistics of one batch, on the CPU in float32."""
    lengths = rows.mask.sum(dim=1)
    position = torch.arange(rows.mask.shape[1], device=lengths.device)
    text = (position >= rows.spans[:, None]) & (position < lengths[:, None])
    queries = (lengths[:, None] - torch.maximum(position[None], rows.spans[:, None])).clamp(min=0)  # (B, S)
    others = queries - text.long()
    enough = (lengths - rows.spans).clamp(min=1, max=MIN_QUERIES)  # (B,)
    counted = (others >= enough[:, None]) & (position < lengths[:, None])
    layers: list[dict[str, Tensor]] = []

    def see(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        received, own = text_attention(q, k, scale, rows.spans, lengths)
        mean = (received - own) / others.clamp(min=1)[:, None]
        norm = v.float().norm(dim=-1)
        value = norm.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        seen = {
            "rate_text": (received / queries.clamp(min=1)[:, None] > EPS).float().mean(dim=1),
            "sinks": (mean > EPS) & counted[:, None],
            "received": mean.mean(dim=1),
            "received_value": (mean * value).mean(dim=1),
            "value_norm": norm.mean(dim=1),
            "mass": received.mean(dim=1),
        }
        layers.append({key: tensor.cpu() for key, tensor in seen.items()})

    cosines: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: cosines.append(_cosine(out).cpu()))
        for layer in subject.decoder.layers
    ]
    try:
        probe = forward_watched(subject, rows, see, decorrelation=True, activations=True, median=True)
    finally:
        for hook in hooks:
            hook.remove()
    activations = probe.activations
    assert activations.median is not None
    return Observed(
        rate=torch.stack([stats.sink_rate(EPS, MIN_QUERIES) for stats in probe.sinks]).cpu(),
        **{key: torch.stack([seen[key] for seen in layers]) for key in layers[0]},
        counted_raw=(lengths[:, None] - position >= MIN_QUERIES).cpu(),
        counted=counted.cpu(),
        cosine=torch.stack(cosines),
        max_abs=activations.max_abs.cpu(),
        feature=activations.feature.cpu(),
        median=activations.median.cpu(),
        decorrelation=float(probe.decorrelation_loss) if subject.layers > 1 else 0.0,
        count=int(probe.decorrelation_count),
    )


@torch.no_grad()
def forward_watched(subject: Subject, rows: Assembled, see: See, **options: Any) -> flashsink.Probe:
    """One forward through flashsink with ``see`` called before every attention; the probe it returns is detached and
    readable. ``options`` are those of ``flashsink.attach``."""
    probe = flashsink.attach(subject.lm, **options)
    try:
        with _watching(subject.decoder, see), probe.spans(rows.spans):
            subject.forward(rows)
    finally:
        probe.detach()
    return probe


def text_attention(q: Tensor, k: Tensor, scale: float, spans: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What every key gets from the text queries of its row, block by block of queries.

    Returns:
        received and own, both (B, H, S) in the accumulation dtype: the sum of A[i, j] over the text queries i, and
        A[j, j] where j is one, else 0.
    """
    b, h, tokens, _ = q.shape
    keys = _wide_keys(k, h)
    received, own = keys.new_zeros(b, h, tokens), keys.new_zeros(b, h, tokens)
    size = max(1, CELLS // (b * h * tokens))
    for start in range(int(spans.min()), tokens, size):
        stop = min(start + size, tokens)
        place = torch.arange(start, stop, device=q.device)
        text = (place >= spans[:, None]) & (place < lengths[:, None])
        a = causal_probabilities(q, keys, start, stop, scale).masked_fill(~text[:, None, :, None], 0.0)
        received[..., :stop] += a.sum(dim=2)
        own[..., start:stop] = a.diagonal(offset=start, dim1=2, dim2=3)
    return received, own


def causal_probabilities(q: Tensor, keys: Tensor, start: int, stop: int, scale: float) -> Tensor:
    """(B, H, stop - start, stop): A of the queries ``start`` to ``stop`` of rows that begin at 0; what stands behind
    the end of a row means nothing. ``keys`` (B, H, S, D) are as wide as they are to be multiplied."""
    scores = q[:, :, start:stop].to(keys.dtype) @ keys[:, :, :stop].mT * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(start + 1)
    return scores.masked_fill_(later, -torch.inf).softmax(dim=-1)


def pooled_attention(q: Tensor, k: Tensor, scale: float, cells: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Attention of one row in cells: the mean over the heads and that of one ``head``.

    Args:
        q, k: (1, H, S, D) and (1, Hk, S, D).
        scale: of the scores.
        cells: (S,) int64, which cell a position belongs to, from 0 without a gap.
        head: from 0.

    Returns:
        Two tensors (cells, cells): mean over the queries of a cell (rows) of the sum over the keys of a cell.
    """
    keys = _wide_keys(k, q.shape[1])
    tokens, count = q.shape[2], int(cells[-1]) + 1
    maps = keys.new_zeros(2, count, count)
    size = max(1, CELLS // (q.shape[1] * tokens))
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        a = causal_probabilities(q, keys, start, stop, scale)[0]
        both = torch.stack([a.mean(dim=0), a[head]])  # (2, n, stop)
        narrow = both.new_zeros(2, stop - start, count).index_add_(2, cells[:stop], both)
        maps.index_add_(1, cells[start:stop], narrow)
    sizes = torch.bincount(cells, minlength=count)
    mean, one = maps / sizes[:, None]
    return mean, one


def _wide_keys(k: Tensor, heads: int) -> Tensor:
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    return wide.repeat_interleave(heads // k.shape[1], dim=1)


@contextmanager
def _watching(decoder: Any, see: See) -> Iterator[None]:
    """Puts ``see`` before the attention that is in force."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = decoder.config._attn_implementation
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[before])  # or there would be no mask
    for index, layer in enumerate(decoder.layers):
        setattr(layer.self_attn, _MARK, (functools.partial(see, index), ALL_ATTENTION_FUNCTIONS[before]))
    decoder.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        for layer in decoder.layers:
            delattr(layer.self_attn, _MARK)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    see, inner = getattr(module, _MARK)
    scaling = options.get("scaling")
    see(q, k, v, q.shape[-1] ** -0.5 if scaling is None else float(scaling))
    return inner(module, q, k, v, mask, **options)


def _cosine(out: Any) -> Tensor:
    """(B, S) cosine of every state to its row's BOS."""
    hidden = (out[0] if isinstance(out, tuple) else out).float()
    return torch.nn.functional.cosine_similarity(hidden, hidden[:, :1], dim=-1)
