"""The public functions. They check their arguments, resolve the layout and call the chosen backend.

Dimensions: B rows, H query heads, Hk key/value heads, Sq queries, Sk keys, D head dim (Dv that of v), L layers,
S tokens, C features, N packed sequences. Two layouts: dense rows with ``lengths[b]`` valid tokens from ``starts[b]``
on, or one packed row with the bounds ``cu_seqlens`` (N + 1 entries). BOS is the first valid token of a row or packed
sequence. With fewer queries than keys the queries are the last positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from flashsink import checks, reference
from flashsink.dispatch import implementation, require_general
from flashsink.types import ActivationStats, Layout, SinkStats


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = ...,
    starts: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    backend: str | None = ...,
    return_stats: Literal[False] = ...,
    query_starts: Tensor | None = ...,
    sink_logits: Tensor | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    chunk: int | None = ...,
    prefix: Tensor | None = ...,
    blocks: Tensor | None = ...,
    segments: Tensor | None = ...,
    num_segments: int | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = ...,
    starts: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    backend: str | None = ...,
    return_stats: Literal[True],
    query_starts: Tensor | None = ...,
    sink_logits: Tensor | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    chunk: int | None = ...,
    prefix: Tensor | None = ...,
    blocks: Tensor | None = ...,
    segments: Tensor | None = ...,
    num_segments: int | None = ...,
) -> tuple[Tensor, SinkStats]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
    return_stats: bool = False,
    query_starts: Tensor | None = None,
    sink_logits: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    prefix: Tensor | None = None,
    blocks: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int | None = None,
) -> Tensor | tuple[Tensor, SinkStats]:
    """Softmax attention that can measure its own sinks.

    Args:
        q: (B, H, Sq, D), any floating dtype.
        k: (B, Hk, Sk, D) in q's dtype, Hk dividing H, Sq <= Sk.
        v: (B, Hk, Sk, Dv) in q's dtype; Dv is D or another (DeepSeek's MLA), but not on "sdpa".
        lengths: (B,) integers, valid keys of a row; default: all from ``starts`` on.
        starts: (B,) integers, first valid key of a row; default 0 (right padding).
        cu_seqlens: (N + 1,) integers, bounds of the packed sequences of the single row; Sq = Sk.
        causal: a query sees only keys up to its own position.
        scale: factor on the scores, any finite number, default D ** -0.5.
        backend: a name of :func:`flashsink.backends`, or None for the table's choice.
        return_stats: also return :class:`SinkStats`.
        query_starts: (B,) integers, dense rows: the statistics count only queries from this position of the
            row on (for instance the text after a speech prompt); default all.
        sink_logits: (H,) floating, one more term in every row's softmax, exp(sink_logits[h]), that carries no value
            (the learnable sink of gpt-oss); differentiable. ``lse`` then contains it.
        window: a query sees the last ``window`` tokens only, its own included; without ``causal`` also as many after.
        softcap: scores become softcap * tanh(scale * q k / softcap), as in Gemma 2.
        chunk: a query sees keys only in its own chunk of this many tokens, counted from BOS (Llama 4).
        prefix: (B,), packed (N,) integers: that many leading tokens of a row or sequence all see each other, whatever
            the order, window and chunk (PaliGemma).
        blocks: (B, Sk), packed (1, Sk) integers: tokens of a row or sequence with equal numbers >= 0 see each other,
            whatever the order, window and chunk (the images of Gemma 3).
        segments: (B, Sk), packed (1, Sk) integers, the kind of every token (BOS, delimiter, speech, prompt, text),
            below 0 for none; what padding holds does not matter. The statistics then have ``segment_mass`` and others
            by segment, and the entropy of every query.
        num_segments: n of :class:`SinkStats`, at most 64; default the largest number + 1, which is
            read on the CPU alone. Elsewhere n must be given, and larger numbers are of no segment.

    "sdpa" refuses ``window``, ``softcap``, ``chunk``, ``prefix``, ``blocks`` and ``segments`` by name. A window or
    chunk that leaves nothing out is none.

    Returns:
        out (B, H, Sq, Dv) in q's dtype, 0 at padded queries; with ``return_stats`` the pair (out, stats).

    Raises:
        ValueError: wrong shape, dtype, device or (on CPU) values, naming the argument.
    """
    checks.check_qkv(q, k, v)
    layout = _attention_layout(q, k, lengths, starts, cu_seqlens)
    checks.check_softcap(softcap)
    pattern = checks.check_pattern(layout, window, chunk, prefix, blocks)
    kinds = checks.check_segments(segments, num_segments, layout)
    if kinds is not None and not return_stats:
        raise ValueError("segments: expected with return_stats=True, got return_stats=False")
    chosen = implementation(backend, q.device.type, q, v, pattern, softcap, segments=kinds is not None)
    if query_starts is not None:
        if cu_seqlens is not None:
            raise ValueError("query_starts: expected without cu_seqlens, got both")
        query_starts = checks.index_vector("query_starts", query_starts, q.shape[0], q.device)
    if sink_logits is not None:
        checks.check_sink_logits(sink_logits, q)
    scale = checks.check_scale(scale, q)
    out, stats = chosen.attention(
        q,
        k,
        v,
        layout,
        causal=causal,
        scale=scale,
        counted=[query_starts] if return_stats else [],
        sink_logits=sink_logits,
        pattern=pattern,
        softcap=softcap,
        segments=kinds,
    )
    return (out, stats[0]) if return_stats else out


def calibrated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    *,
    beta: float = 0.4,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention with the attention calibration technique (ACT, Yu et al. 2024).

    The probabilities of the columns in ``sinks``, BOS excepted, are multiplied by ``beta``; the freed mass goes to
    the other visible columns in proportion to their probabilities, so rows still sum to 1.

    Args:
        q, k, v, lengths, starts, backend: as in :func:`attention`.
        sinks: (B, H, Sk) bool, the columns to scale per head.
        beta: factor in 0..1.

    Returns:
        (B, H, Sq, Dv) in q's dtype.
    """
    checks.check_qkv(q, k, v)
    layout = _attention_layout(q, k, lengths, starts, None)
    chosen = implementation(backend, q.device.type, q, v, family="ACT")
    expected = (q.shape[0], q.shape[1], k.shape[2])
    if not isinstance(sinks, Tensor) or sinks.dtype != torch.bool or tuple(sinks.shape) != expected:
        got = (tuple(sinks.shape), sinks.dtype) if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sinks: expected a bool tensor {expected}, got {got}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected a tensor on {q.device}, got {sinks.device}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected 0..1, got {beta}")
    return chosen.calibrated_attention(q, k, v, sinks, layout, beta=beta, scale=checks.check_scale(None, q))


def decorrelation_loss(
    hidden_states: Tensor | Sequence[Tensor],
    spans: Tensor,
    *,
    margin: float = 0.0,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    anchors: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean squared cosine between BOS and the tokens of the prompt (arXiv 2510.22603).

    loss = mean over layers of [sum over rows and 1 <= s < span of max(cos^2(h[BOS], h[s]) - margin, 0)
    / sum over rows of max(span - 1, 0)], 0 when nothing is counted. The gradient flows into BOS too.

    With other tokens or anchors: mean over layers of [sum of max(cos^2(a, h[s]) - margin, 0) / number of terms], over
    every counted token s and every anchor a of its row or packed sequence, but an anchor not with itself. Where rows
    count equal numbers of tokens and anchors this is the mean over the anchors of the loss of each.

    Args:
        hidden_states: (L, B, S, C) or a sequence of (B, S, C), any floating dtype. The paper takes the outputs
            of decoder layers 1..L-1 of an L-layer model: neither the embeddings nor the last layer.
        spans: (B,) or, packed, (N,) integers: number of leading tokens (BOS, speech and prompt) of a row. Or a mask
            (B, S) bool of the tokens that count, none of them padding.
        margin: only states with cos^2 above it are pushed; 0 is the paper's loss.
        starts: (B,) integers, position of BOS in a row; default 0.
        cu_seqlens: (N + 1,) integers, bounds of the packed sequences.
        anchors: default BOS. (B, n) integers: the tokens at these positions 0..S-1, -1 for none; the gradient flows
            into them, and BOS is then a token like others. (L, C) or (L, n, C) floating: directions of every layer that
            stay as they are, such as :func:`flashsink.bos_states`; the first ``span`` tokens but BOS count, or what
            the mask says.
        backend: a name of :func:`flashsink.backends`, or None for the table's choice. A mask or anchors are computed
            in PyTorch, the same on "reference" and "cpu"; others are refused by name.

    Returns:
        float32 scalar with its graph.

    Raises:
        ValueError: wrong shape, dtype, device or (on CPU) values, naming the argument.
    """
    layers = checks.check_hidden_states(hidden_states)
    (rows, tokens, features), device = layers[0].shape, layers[0].device
    layout = checks.resolve_layout(rows, tokens, device, starts=starts, cu_seqlens=cu_seqlens)
    check_margin(margin)
    chosen = implementation(backend, device.type, layers[0], family="loss")
    spans = checks.check_counted(spans, layout)
    if anchors is None and spans.dtype != torch.bool:
        total = chosen.decorrelation_sums(layers, spans, layout, margin).mean()
        return (total / reference.decorrelation_count(spans).clamp(min=1)).float()
    require_general(backend)
    anchors = checks.check_anchors(anchors, layout, len(layers))
    constant = anchors is not None and anchors.is_floating_point()
    if anchors is not None and constant and (anchors.device != device or anchors.shape[2] != features):
        got = f"{tuple(anchors.shape)} on {anchors.device}"
        raise ValueError(f"anchors: expected {features} features on {device}, got {got}")
    pairs = reference.pairs(layout, spans, anchors)
    return (reference.pair_sums(layers, pairs, margin).mean() / pairs.counts.sum().clamp(min=1)).float()


def activation_stats(
    hidden_states: Tensor | Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    median: bool = False,
    backend: str | None = None,
) -> ActivationStats:
    """Largest |h| of every token, its feature, and on request the median |h| of every row (Sun et al. 2024).

    Args:
        hidden_states: (L, B, S, C) or a sequence of (B, S, C), any floating dtype.
        lengths, starts: (B,) integers, as in :func:`attention`.
        median: also give the median over all features of the row's valid tokens.
        backend: a name of :func:`flashsink.backends`, or None for the table's choice.
    """
    layers = checks.check_hidden_states(hidden_states)
    (rows, tokens, _), device = layers[0].shape, layers[0].device
    layout = checks.resolve_layout(rows, tokens, device, lengths=lengths, starts=starts)
    run = implementation(backend, device.type, layers[0], family="activations")
    return run.activation_stats(layers, layout, median)


def check_margin(margin: float) -> None:
    if not 0.0 <= margin < 1.0:
        raise ValueError(f"margin: expected 0 <= margin < 1, got {margin}")


def _attention_layout(
    q: Tensor, k: Tensor, lengths: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None
) -> Layout:
    if cu_seqlens is not None and q.shape[2] != k.shape[2]:
        raise ValueError(f"cu_seqlens: expected as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    return checks.resolve_layout(
        k.shape[0], k.shape[2], k.device, lengths=lengths, starts=starts, cu_seqlens=cu_seqlens
    )
