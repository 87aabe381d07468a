"""Attention computed again from queries and keys, block by block of queries: never an (S, S) tensor.

B rows, S tokens, H query and Hk key heads, D head dim. Text queries are the positions after a row's span.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import flashsink
from avsr.tools.analysis.walk import QKV

BLOCK = 4_000_000  # probabilities in one block


def text_attention(qkv: QKV, spans: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What every key receives from the text queries of its row.

    Args:
        qkv: of one layer.
        spans, lengths: (B,) int64.

    Returns:
        received and own, both (B, H, S) in the accumulation dtype: the sum of A[i, j] over the text queries i, and
        A[j, j] where j is one, else 0.
    """
    q, keys = qkv.q, _wide_keys(qkv)
    b, h, tokens, _ = q.shape
    received, own = keys.new_zeros(b, h, tokens), keys.new_zeros(b, h, tokens)
    size = max(1, BLOCK // (b * h * tokens))
    for start in range(int(spans.min()), tokens, size):
        stop = min(start + size, tokens)
        place = torch.arange(start, stop, device=q.device)
        text = (place >= spans[:, None]) & (place < lengths[:, None])
        a = _probabilities(qkv, keys, start, stop).masked_fill(~text[:, None, :, None], 0.0)
        received[..., :stop] += a.sum(dim=2)
        own[..., start:stop] = a.diagonal(offset=start, dim1=2, dim2=3)
    return received, own


def pooled_attention(qkv: QKV, cells: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Attention of one row in cells: the mean over the heads and that of one ``head``.

    Args:
        qkv: of one layer, B = 1.
        cells: (S,) int64, which cell a position belongs to, from 0 without a gap.
        head: from 0.

    Returns:
        Two tensors (cells, cells): mean over the queries of a cell (rows) of the sum over the keys of a cell.
    """
    keys = _wide_keys(qkv)
    tokens, count = qkv.q.shape[2], int(cells[-1]) + 1
    maps = keys.new_zeros(2, count, count)
    size = max(1, BLOCK // (qkv.q.shape[1] * tokens))
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        a = _probabilities(qkv, keys, start, stop)[0]
        both = torch.stack([a.mean(dim=0), a[head]])  # (2, n, stop)
        narrow = both.new_zeros(2, stop - start, count).index_add_(2, cells[:stop], both)
        maps.index_add_(1, cells[start:stop], narrow)
    mean, one = maps / torch.bincount(cells, minlength=count)[:, None]
    return mean, one


def _wide_keys(qkv: QKV) -> Tensor:
    """(B, H, S, D) in at least float32."""
    wide = qkv.k.to(torch.promote_types(qkv.k.dtype, torch.float32))
    return wide.repeat_interleave(qkv.q.shape[1] // qkv.k.shape[1], dim=1)


def _probabilities(qkv: QKV, keys: Tensor, start: int, stop: int) -> Tensor:
    """(B, H, stop - start, stop): causal A of the queries ``start`` to ``stop``; padded queries mean nothing."""
    scores = qkv.q[:, :, start:stop].to(keys.dtype) @ keys[:, :, :stop].mT * qkv.scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=keys.device).triu_(start + 1)
    return scores.masked_fill_(later, -torch.inf).softmax(dim=-1)


class FrameAttention(NamedTuple):
    """What every frame receives in one layer of an encoder, (H, T) float32 each.

    Attributes:
        raw: mean of A[i, j] over all T queries i, j's own included.
        mean: the same over the clip's own frames as queries, which come first; padding after them asks nothing.
        others: the same without i = j.
        lse: log-sum-exp of the scores by query.
    """

    raw: Tensor
    mean: Tensor
    others: Tensor
    lse: Tensor


def frame_attention(qkv: QKV, own: int, bias: Tensor | None = None) -> FrameAttention:
    """Attention of one clip in which every frame sees all frames.

    Args:
        qkv: of one layer, B = 1, as many key heads as query heads.
        own: number of the clip's own frames, the first of the T.
        bias: (H, T, T) added to the scaled scores (WavLM's relative positions).
    """
    q, k, v, scale = qkv
    frames = q.shape[2]
    if bias is None:
        total, lse = _received(qkv)
        mine = total if own == frames else _received(QKV(q[:, :, :own], k, v, scale))[0]
    else:
        total, mine, lse = _received_biased(qkv, own, bias)
    scores = (q * k)[0].float().sum(dim=-1) * scale
    if bias is not None:
        scores = scores + bias.diagonal(dim1=1, dim2=2).float()
    seen = torch.arange(frames, device=q.device) < own  # a padded frame is no query: it has no self term
    diagonal = (scores - lse).exp() * seen
    return FrameAttention(total / frames, mine / own, (mine - diagonal).clamp(min=0) / (own - seen.long()), lse)


def _received(qkv: QKV) -> tuple[Tensor, Tensor]:
    q, k, v, scale = qkv
    _, stats = flashsink.attention(q, k, v, causal=False, scale=scale, return_stats=True)
    return stats.received[0], stats.lse[0]


def _received_biased(qkv: QKV, own: int, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(H, T) sums over all queries and over the first ``own``, and the log-sum-exp; flashsink takes no bias."""
    q, k = qkv.q[0].float(), qkv.k[0].float()
    heads, frames, _ = q.shape
    total, mine, lse = (q.new_zeros(heads, frames) for _ in range(3))
    size = max(1, BLOCK // (heads * frames))
    for start in range(0, frames, size):
        stop = min(start + size, frames)
        scores = q[:, start:stop] @ k.mT * qkv.scale + bias[:, start:stop].float()
        lse[:, start:stop] = scores.logsumexp(dim=-1)
        a = (scores - lse[:, start:stop, None]).exp()
        total += a.sum(dim=1)
        mine += a[:, : max(own - start, 0)].sum(dim=1)
    return total, mine, lse
