"""ACT over torch's flash attention for CPU: two sets of keys, attention over all but the sinks by its kernel and a
skinny product for the sinks, in dense rows where no gradient is needed; else the reference.

Dimensions: B rows, H query and Hk key heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink import reference
from flashsink.checks import positive_scale
from flashsink.operators import adjacent
from flashsink.types import Layout, Pattern, narrowed

LEAST = torch.finfo(torch.float32).min


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
    most = max(int(chosen.sum(dim=-1).max()), 1)
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


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), lse (B, H, Sq)) of torch's kernel, which needs as many key heads as query heads. Its causal
    mask begins at the first key, so ``causal`` serves only as many queries as keys."""
    q, scale = positive_scale(q, scale)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    q, k, v = (adjacent(x) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def mask_of(layout: Layout, queries: int, causal: bool) -> Tensor | None:
    """What is added to the scores of dense rows, or None. Where there are as many queries as keys the causal mask is
    not part of it.

    The least finite number and not -inf: a padded query then gets a finite value, which is zeroed, and not NaN.
    """
    keys, padding = layout.tokens, ~layout.valid()
    # where all rows start at 0 no valid query of a causal row sees padding
    seen = causal and queries > 1 and not bool((layout.starts > 0).any())
    mask = None
    if causal and 1 < queries < keys:
        later = torch.ones(queries, keys, dtype=torch.bool).triu_(keys - queries + 1)
        mask = torch.zeros(later.shape).masked_fill_(later, LEAST)
    if not seen and bool(padding.any()):
        own = torch.zeros(padding.shape).masked_fill_(padding, LEAST)[:, None, None, :]
        mask = own if mask is None else torch.minimum(mask, own)
    return None if mask is None else mask.expand(layout.rows, 1, queries, keys)
