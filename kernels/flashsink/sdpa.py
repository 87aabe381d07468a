"""The ``sdpa`` backend: a vendor's attention that returns its log-sum-exp, and our statistics pass.

On CUDA every layout becomes variable-length attention over one row of tokens: a dense row is cut at its padding, and
the pieces of padding are sequences of their own, whose results are thrown away. So the layout needs no
synchronization, and padding reaches nothing. ``FLASHSINK_VENDOR`` names the attention: ``torch`` (its varlen
flash kernel, the default), ``cudnn`` (dense rows without padding only, else ``torch``), ``flash_attn``
(FlashAttention 2) or ``flash_attn_4``; the last two when they are installed. On CPU tensors this is the ``cpu``
backend.

The loss, the norm, the activation statistics and ACT have no vendor: on CUDA they are those of the ``triton`` backend
where it is usable and passes its check (:mod:`flashsink.verdicts`), else the reference. Dimensions: B rows, H query
and Hk key heads, Sq queries, Sk keys, D head dim, N sequences, T tokens.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashsink import checks, reference, verdicts
from flashsink.cpu import backend as cpu
from flashsink.triton import backend as triton_backend
from flashsink.types import ActivationStats, Layout, Normed, Pattern, Segments, SinkStats

VENDOR_VARIABLE = "FLASHSINK_VENDOR"
# (q, k, v (T, heads, D), cu_seqlens_q, cu_seqlens_k (N + 1,) int32, max_seqlen_q, max_seqlen_k, causal, scale)
# -> out (T, H, D), lse (H, T)
Vendor = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool, float], tuple[Tensor, Tensor]]


def refusal(q: Tensor, v: Tensor | None = None, pattern: Pattern | None = None, softcap: float | None = None) -> str:
    """Why these cannot be taken, or ""."""
    reason = checks.beyond_plain(q, v, pattern, softcap)
    if reason or q.device.type == "cpu":
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"its attention takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"its attention takes head dims that are multiples of 8 up to 256, not {q.shape[-1]}"
    return ""


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
    """:func:`flashsink.reference.attention`. A sink logit changes the log-sum-exp that the vendor's backward relies
    on, so on CUDA it goes to the reference."""
    checks.require("sdpa", checks.beyond_plain(q, v, pattern, softcap, segments is not None))
    if q.device.type == "cpu":
        return cpu.attention(q, k, v, layout, causal=causal, scale=scale, counted=counted, sink_logits=sink_logits)
    if sink_logits is not None:
        return reference.attention(
            q, k, v, layout, causal=causal, scale=scale, counted=counted, sink_logits=sink_logits
        )
    out, lse = attend(q, k, v, layout, causal, scale)
    stats = []
    for query_starts in counted:
        received = _received(q, k, lse, layout, causal, scale, query_starts)
        stats.append(SinkStats(received, layout.queries_later(q.shape[2], causal, query_starts), lse))
    return out, stats


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), lse (B, H, Sq) float32 without a graph), 0 at padded queries."""
    q, scale = checks.positive_scale(q, scale)
    b, h, queries, d = q.shape
    name = os.environ.get(VENDOR_VARIABLE, "torch")
    if name != "cudnn" and name not in VENDORS:
        raise ValueError(f"{VENDOR_VARIABLE}: expected cudnn or one of {', '.join(VENDORS)}, got {name!r}")
    if name == "cudnn" and layout.full and queries == layout.tokens:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse.detach().reshape(b, h, queries)
    if torch.is_grad_enabled() and not layout.full:  # or NaN in padding would reach the gradients of padding
        padding = ~layout.valid()[:, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
        q = q.masked_fill(padding[:, :, layout.tokens - queries :], 0.0)
    lengths = pieces(layout, queries)
    flat_q, flat_k, flat_v = (x.transpose(1, 2).reshape(-1, x.shape[1], d) for x in (q, k, v))
    vendor = VENDORS[name if name != "cudnn" else "torch"]
    out, lse = vendor(flat_q, flat_k, flat_v, *lengths, causal, scale)
    silent = ~layout.valid()[:, None, layout.tokens - queries :]
    out = out.view(b, queries, h, d).transpose(1, 2).masked_fill(silent.unsqueeze(-1), 0.0)
    lse = lse.detach().view(h, b, queries).transpose(0, 1)
    return out, lse.masked_fill(silent, 0.0).float().contiguous()


def pieces(layout: Layout, queries: int) -> tuple[Tensor, Tensor, int, int]:
    """The layout as packed sequences: (cu_seqlens_q, cu_seqlens_k (int32), max_seqlen_q, max_seqlen_k).

    A dense row is three: padding, the valid tokens, padding. Its queries are its last positions. A packed row has
    one more sequence than it is given, for the tokens after the last.
    """
    begins, ends = layout.starts, layout.starts + layout.lengths
    if layout.packed:
        edges = torch.cat([begins, ends[-1:], ends.new_full((1,), layout.tokens)])
        own = edges
    else:
        row = torch.arange(layout.rows, device=begins.device)
        inner = torch.stack([torch.zeros_like(begins), begins, ends], dim=1)
        last = row.new_full((1,), layout.rows)
        edges = torch.cat([(inner + row[:, None] * layout.tokens).flatten(), last * layout.tokens])
        hidden = layout.tokens - queries
        inner = (inner - hidden).clamp(min=0)
        own = torch.cat([(inner + row[:, None] * queries).flatten(), last * queries])
    longest = layout.tokens
    if not torch.compiler.is_compiling() and not (edges.is_cuda and torch.cuda.is_current_stream_capturing()):
        longest = max(int(edges.diff().max()), 1)
    # never 1: FlashAttention folds grouped heads of single queries into rows, and there are more sequences than rows
    return own.int(), edges.int(), max(min(longest, queries), 2), longest


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
    """:func:`flashsink.reference.calibrated_attention`."""
    checks.require("sdpa", checks.beyond_plain(q, v, pattern, softcap))
    return _ours(q, "ACT").calibrated_attention(
        q, k, v, sinks, layout, beta=beta, scale=scale, causal=causal, sink_logits=sink_logits
    )


def decorrelation_sums(layers: Sequence[Tensor], spans: Tensor, layout: Layout, margin: float) -> Tensor:
    """:func:`flashsink.reference.decorrelation_sums`."""
    return _ours(layers[0], "loss").decorrelation_sums(layers, spans, layout, margin)


def activation_stats(layers: Sequence[Tensor], layout: Layout, median: bool) -> ActivationStats:
    """:func:`flashsink.reference.activation_stats`."""
    return _ours(layers[0], "activations").activation_stats(layers, layout, median)


def rms_norm(h: Tensor, weight: Tensor, eps: float, layout: Layout, spans: Tensor | None, margin: float) -> Normed:
    """:func:`flashsink.reference.rms_norm`."""
    return _ours(h, "norm").rms_norm(h, weight, eps, layout, spans, margin)


def _ours(x: Tensor, family: str) -> Any:
    if x.device.type == "cpu":
        return cpu
    return triton_backend if _right(x, family) else reference


def _right(x: Tensor, family: str) -> bool:
    """Whether the Triton kernels of ``family`` can be used for x."""
    return triton_backend.available() == "usable" and not verdicts.refusal(family, x)


def _received(
    q: Tensor, k: Tensor, lse: Tensor, layout: Layout, causal: bool, scale: float, query_starts: Tensor | None
) -> Tensor:
    if _right(q, "statistics"):
        return triton_backend.run_received(q, k, lse, layout, causal=causal, scale=scale, query_starts=query_starts)
    a, own = reference.probabilities(q.detach(), k.detach(), layout, causal=causal, scale=scale)
    return reference.sink_stats(a, own, layout, causal=causal, query_starts=query_starts).received


# ---- the vendors; causal means that the last query sees the last key


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    aux = AuxRequest(lse=True)
    out, lse = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, return_aux=aux, scale=scale, window_size=window)
    return out, lse


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    run = importlib.import_module("flash_attn").flash_attn_varlen_func
    out, lse, _ = run(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return out, lse


def _flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    run = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    bounds = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    out, lse = run(q, k, v, **bounds, softmax_scale=scale, causal=causal, return_lse=True)
    return out, lse


VENDORS: dict[str, Vendor] = {"torch": _torch_varlen, "flash_attn": _flash_attn, "flash_attn_4": _flash_attn_4}
