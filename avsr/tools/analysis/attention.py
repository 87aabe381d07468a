"""Attention computed again from queries and keys, block by block of queries: never an (S, S) tensor.

B rows, S tokens, H query and Hk key heads, D head dim. Text queries are the positions after a row's span.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
