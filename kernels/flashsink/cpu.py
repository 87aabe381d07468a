"""The ``cpu`` backend: torch's own CPU attention, and the C++ kernels of ``csrc`` for what is ours.

What runs where, always the same for the same arguments:

- ``attention``, causal, dense rows, float16 / bfloat16 / float32: torch's flash attention for CPU in float32 (half
  precision is widened first: faster there than its bfloat16 path, and as exact as the reference).
- ``attention``, non-causal, packed or float64: the reference.
- ``calibrated_attention``: the reference; ACT changes the probabilities, which a fused kernel does not hand out.
- ``decorrelation_sums`` and ``activation_stats``: see :mod:`flashsink.native`.

Dimensions: B rows, H query and Hk key heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashsink import reference
from flashsink.native import activation_stats, decorrelation_sums
from flashsink.reference import calibrated_attention, refusal, rms_norm
from flashsink.types import Layout, SinkStats

__all__ = ["activation_stats", "attention", "calibrated_attention", "decorrelation_sums", "refusal", "rms_norm"]

TILE = 128  # queries whose probabilities are held at once for the statistics


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
) -> tuple[Tensor, list[SinkStats]]:
    """:func:`flashsink.reference.attention`; the probabilities of at most ``TILE`` queries exist at a time."""
    if torch.compiler.is_compiling() or not causal or layout.packed or q.dtype == torch.float64 or q.numel() == 0 or sink_logits is not None:
        return reference.attention(
            q, k, v, layout, causal=causal, scale=scale, counted=counted, sink_logits=sink_logits
        )
    padding = ~layout.valid()
    padded = bool(padding.any())
    queries, groups = q.shape[2], q.shape[1] // k.shape[1]
    silent = padding[:, None, layout.tokens - queries :, None]
    wide_q, wide_k, wide_v = (_adjacent(reference.wide(x)) for x in (q, k, v))
    if padded:  # padding may hold NaN, and must neither send nor receive a gradient
        wide_q = wide_q.masked_fill(silent, 0.0)
        wide_k, wide_v = (x.masked_fill(padding[:, None, :, None], 0.0) for x in (wide_k, wide_v))
    if groups > 1:
        wide_k, wide_v = (x.repeat_interleave(groups, dim=1) for x in (wide_k, wide_v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        wide_q,
        wide_k,
        wide_v,
        0.0,
        queries == layout.tokens,  # its causal mask begins at the first key, so it serves only full rows
        attn_mask=_mask(layout, padding, queries, padded),
        scale=scale,
    )
    stats = _sink_stats(wide_q, wide_k, lse, layout, scale, counted) if counted else []
    if padded:
        out = out.masked_fill(silent, 0.0)
    return out.to(q.dtype), stats


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _mask(layout: Layout, padding: Tensor, queries: int, padded: bool) -> Tensor | None:
    """What is added to the scores, on top of the causal mask where there are as many queries as keys.

    The least finite number and not -inf: a padded query then gets finite nonsense, which is zeroed, and not NaN.
    """
    least = torch.finfo(torch.float32).min
    if queries < layout.tokens:
        if queries == 1 and not padded:
            return None
        seen = reference.visible(layout, queries, True)
        return torch.zeros(seen.shape).masked_fill_(~seen, least)
    if not bool((layout.starts > 0).any()):
        return None  # no valid query comes after padding
    mask = torch.zeros(padding.shape).masked_fill_(padding, least)
    return mask[:, None, None, :].expand(-1, 1, queries, -1)


@torch.no_grad()
def _sink_stats(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, scale: float, counted: Sequence[Tensor | None]
) -> list[SinkStats]:
    """Column sums of exp(q k^T scale - lse) by tiles of queries, without the keys after a tile.

    Args:
        q: (B, H, Sq, D) and k: (B, H, Sk, D) float32, 0 at padding.
        lse: (B, H, Sq) float32.
    """
    keys, queries = layout.tokens, q.shape[2]
    seen = reference.visible(layout, queries, True)
    position = torch.arange(keys - queries, keys)
    seen_by = [seen if first is None else seen & (position >= first[:, None])[:, None, :, None] for first in counted]
    received = [q.new_zeros(k.shape[:3]) for _ in counted]
    for first in range(0, queries, TILE):
        last = min(first + TILE, queries)
        end = keys - queries + last
        a = (q[:, :, first:last] @ k[:, :, :end].mT).mul_(scale).sub_(lse[:, :, first:last, None]).exp_()
        for total, visible in zip(received, seen_by, strict=True):
            # not a product: behind the causal edge the exponential may be infinite
            total[:, :, :end] += torch.where(visible[:, :, first:last, :end], a, 0.0).sum(dim=2)
    own = lse.detach().masked_fill(~seen.any(dim=-1), 0.0)
    return [
        SinkStats(total, layout.query_counts(queries, True, first), own)
        for total, first in zip(received, counted, strict=True)
    ]
