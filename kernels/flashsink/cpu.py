"""The ``cpu`` backend: torch's own CPU attention, and the C++ kernels of ``csrc`` for what is ours.

What runs where, always the same for the same arguments:

- ``attention`` of float16 / bfloat16 / float32: torch's flash attention for CPU in float32 (half precision is widened
  first: faster there than its bfloat16 path, and as exact as the reference), one call for dense rows and one for
  every packed sequence. Statistics are a second pass in C++, :mod:`flashsink.native_received`.
- ``attention`` with ``sink_logits``: the same, rescaled, where no gradient is needed. Torch's log-sum-exp carries
  none, so the reference computes where one is.
- ``calibrated_attention``: two sets of keys, attention over all but the sinks by torch's kernel and a skinny product
  for the sinks, where no gradient is needed (it needs the log-sum-exp too); else the reference.
- float64, no queries at all, and a graph being compiled (values decide what runs here): the reference.
- ``decorrelation_sums``, ``activation_stats`` and ``rms_norm``: see :mod:`flashsink.native` and
  :mod:`flashsink.native_norm`.

Dimensions: B rows, H query and Hk key heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashsink import native_received as _registered  # noqa: F401 - flashsink::received
from flashsink import reference
from flashsink.native import activation_stats, decorrelation_sums, rows
from flashsink.native_norm import rms_norm
from flashsink.reference import refusal
from flashsink.types import Layout, SinkStats

__all__ = ["activation_stats", "attention", "calibrated_attention", "decorrelation_sums", "refusal", "rms_norm"]

_LEAST = torch.finfo(torch.float32).min


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
    """:func:`flashsink.reference.attention`; no (Sq, Sk) tensor of probabilities."""
    learning = sink_logits is not None and _needs_gradient(q, k, v, sink_logits)
    if q.dtype == torch.float64 or q.numel() == 0 or learning or torch.compiler.is_compiling():
        return reference.attention(
            q, k, v, layout, causal=causal, scale=scale, counted=counted, sink_logits=sink_logits
        )
    if layout.packed:
        wide = _Wide(rows(q.float()), rows(k.float()), rows(v.float()), None)
        out, lse = _packed(wide, layout, causal, scale)
    else:
        wide = _widen(q, k, v, layout)
        mask = _mask(layout, wide.padding, q.shape[2], causal)
        out, lse = _flash(wide, causal and q.shape[2] == layout.tokens, mask, scale)
        if wide.padding is not None:
            silent = wide.padding[:, None, layout.tokens - q.shape[2] :]
            out, lse = out.masked_fill(silent.unsqueeze(-1), 0.0), lse.masked_fill(silent, 0.0)
    if sink_logits is not None:
        every = torch.logaddexp(lse, sink_logits.float()[:, None])
        out, lse = out * (lse - every).exp().unsqueeze(-1), every
        lse = lse.masked_fill(~layout.valid()[:, None, layout.tokens - q.shape[2] :], 0.0)
    stats = [_sink_stats(wide, lse, layout, causal, scale, first) for first in counted]
    return out.to(q.dtype), stats


def calibrated_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, layout: Layout, *, beta: float, scale: float
) -> Tensor:
    """:func:`flashsink.reference.calibrated_attention` without a tensor of probabilities.

    With m the mass of a row on its sinks, o_S their part of the output and o_R attention over the other keys alone
    (log-sum-exp r, and s that of the sinks), ACT is beta o_S + (1 - beta m) o_R with m = e^s / (e^r + e^s). Equal to
    c o + (beta - c) o_S with c = (1 - beta m) / (1 - m), but nothing cancels where m is near 1.
    """
    if q.dtype == torch.float64 or q.numel() == 0 or _needs_gradient(q, k, v) or torch.compiler.is_compiling():
        return reference.calibrated_attention(q, k, v, sinks, layout, beta=beta, scale=scale)
    chosen = sinks & (layout.offsets() > 0)[:, None, :]
    most = int(chosen.sum(dim=-1).max())
    if most == 0:
        return attention(q, k, v, layout, causal=True, scale=scale)[0]
    queries = q.shape[2]
    wide = _widen(q, k, v, layout)
    without = torch.zeros(chosen.shape).masked_fill_(chosen, _LEAST)[:, :, None, :].expand(-1, -1, queries, -1)
    mask = _mask(layout, wide.padding, queries, True)
    if mask is not None:
        without = torch.minimum(mask, without)
    others, lse_others = _flash(wide, queries == layout.tokens, without, scale)
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
    """q (B, H, Sq, D), k and v (B, Hk, Sk, D) in float32 with unit last stride, and padding (B, Sk) bool, or None
    where there is none or it is never touched."""

    q: Tensor
    k: Tensor
    v: Tensor
    padding: Tensor | None


def _widen(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> _Wide:
    """Dense rows. Padding may hold NaN and must neither send nor receive a gradient, so it is zeroed."""
    q, k, v = (rows(x.float()) for x in (q, k, v))
    padding = ~layout.valid()
    if not bool(padding.any()):
        return _Wide(q, k, v, None)
    keys = padding[:, None, :, None]
    queries = keys[:, :, layout.tokens - q.shape[2] :]
    return _Wide(q.masked_fill(queries, 0.0), k.masked_fill(keys, 0.0), v.masked_fill(keys, 0.0), padding)


def _flash(wide: _Wide, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), lse (B, H, Sq)) of torch's kernel, which wants as many key heads as query heads. Its causal
    mask begins at the first key, so ``causal`` serves only as many queries as keys."""
    q, k, v, _ = wide
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def _packed(wide: _Wide, layout: Layout, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The sequences of one row, each in a call of its own; what lies behind the last is left alone."""
    q, k, v, _ = wide
    sizes = layout.lengths.tolist()
    behind = layout.tokens - sum(sizes)
    # one split and one cat, so that the backward does not add up as many full tensors as there are sequences
    parts = zip(*(x.split([*sizes, behind], dim=2) for x in (q, k, v)), strict=True)
    results = [
        _flash(_Wide(part[0], part[1], part[2], None), causal, None, scale)
        for part, size in zip(parts, sizes, strict=False)
        if size > 0
    ]
    outs, lses = [out for out, _ in results], [lse for _, lse in results]
    if behind:
        outs.append(q.new_zeros(q.shape[0], q.shape[1], behind, q.shape[3]))
        lses.append(q.new_zeros(q.shape[0], q.shape[1], behind))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _mask(layout: Layout, padding: Tensor | None, queries: int, causal: bool) -> Tensor | None:
    """What is added to the scores, beside the causal mask where there are as many queries as keys; None if nothing.

    The least finite number and not -inf: a padded query then gets finite nonsense, which is zeroed, and not NaN.
    """
    keys = layout.tokens
    # no valid query of a causal row comes after padding but behind its start
    seen = causal and queries > 1 and not bool((layout.starts > 0).any())
    mask = None
    if causal and 1 < queries < keys:
        later = torch.ones(queries, keys, dtype=torch.bool).triu_(keys - queries + 1)
        mask = torch.zeros(later.shape).masked_fill_(later, _LEAST)
    if padding is not None and not seen:
        own = torch.zeros(padding.shape).masked_fill_(padding, _LEAST)[:, None, None, :]
        mask = own if mask is None else torch.minimum(mask, own)
    return None if mask is None else mask.expand(layout.rows, 1, queries, keys)


@torch.no_grad()
def _sink_stats(
    wide: _Wide, lse: Tensor, layout: Layout, causal: bool, scale: float, first: Tensor | None
) -> SinkStats:
    q, k, lse = wide.q.detach(), wide.k.detach(), lse.detach()
    received = torch.ops.flashsink.received(
        q, k, lse, layout.starts, layout.lengths, first, layout.packed, causal, scale
    )
    return SinkStats(received, layout.query_counts(q.shape[2], causal, first), lse)
