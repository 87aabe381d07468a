"""Attention in C++ (csrc/forward.cpp, csrc/backward.cpp): every length, layout and pattern of visible keys, capped
scores, learned sinks, values of another head dim, and the statistics in the same pass.

A block of queries keeps its probabilities in one core's cache, in dense and packed rows alike; padding is never read,
and memory is linear in the number of tokens. Everything is float32.
Dimensions: B rows, H query and Hk key heads, Sq queries, Sk keys, D head dim, Dv that of v, N sequences (N = B in dense
layout).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from flashsink.cpu.library import Attention, library
from flashsink.operators import adjacent
from flashsink.types import Layout, Pattern

FEW = 16  # sequences times key heads; the backward of fewer takes query heads apart, for more threads than those


def forward_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    targets: Tensor | None,
    sums: int,
    spread: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zeros; out has tokens first in memory, as projections leave and take them."""
    b, h, queries = q.shape[:3]
    out, lse = q.new_zeros(b, queries, h, v.shape[3]).transpose(1, 2), q.new_zeros(b, h, queries)
    return out, lse, q.new_zeros(sums, b, h, k.shape[2]), torch.zeros_like(lse) if spread else q.new_zeros(0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    targets: Tensor | None,
    sums: int,
    spread: bool,
    starts: Tensor,
    lengths: Tensor,
    packed: bool,
    causal: bool,
    scale: float,
    softcap: float | None,
    *pattern: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out (B, H, Sq, Dv), lse (B, H, Sq), received (sums, B, H, Sk), entropy (B, H, Sq)), 0 at queries that see
    nothing.

    Args:
        q, k, v: (B, H, Sq, D), (B, Hk, Sk, D) and (B, Hk, Sk, Dv) float32; padding may hold anything.
        sink_logits: (H,) float32 or None.
        targets: (n, B, Sq) int32, n times the number of the sum in ``received`` that a query adds to, -1 for none; or
            None.
        sums: their number.
        spread: whether the entropy is computed; else it is empty.
        starts, lengths: (N,) int64, as in :class:`flashsink.types.Layout`.
        pattern: the fields of :class:`flashsink.types.Pattern`.
    """
    out, lse, received, entropy = forward_like(q, k, v, sink_logits, targets, sums, spread)
    if targets is not None:
        shape = (q.shape[0], q.shape[2])
        if targets.dtype != torch.int32 or targets.shape[1:] != shape or (targets >= sums).any():
            raise ValueError(f"targets: expected int32 (n, {shape}) below {sums}, got {targets.dtype}")
        targets = targets.contiguous()
    more = {"targets": targets, "received": received, "entropy": entropy if spread else None}
    layout = Layout(starts, lengths, q.shape[0], k.shape[2], packed)
    _run("forward", (q, k, v, out, lse), layout, causal, scale, softcap, Pattern(*pattern), sink_logits, **more)
    return out, lse, received, entropy


def backward_like(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv, q.new_zeros((0,) if sink_logits is None else sink_logits.shape)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    packed: bool,
    causal: bool,
    scale: float,
    softcap: float | None,
    *pattern: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, gradient of sink_logits (H,) or nothing (0,)), 0 at padding, where ``grad`` is not looked at.

    The sink z: dz = -sum over rows of exp(z - lse) delta, with delta = rowsum(grad * out).
    """
    dq, dk, dv, dsink = backward_like(grad, q, k, v, sink_logits)
    layout, group = Layout(starts, lengths, q.shape[0], k.shape[2], packed), q.shape[1] // k.shape[1]
    apart = group > 1 and len(starts) * k.shape[1] < FEW  # not by the number of threads, which must not change a bit
    own = [
        x.new_zeros(x.shape[0], x.shape[2], q.shape[1], x.shape[3]).transpose(1, 2) if apart else x for x in (dk, dv)
    ]
    tensors = (q, k, v, out, lse, grad, dq, *own)
    _run("backward", tensors, layout, causal, scale, softcap, Pattern(*pattern), sink_logits)
    if apart:
        dk, dv = (torch.sum(x.unflatten(1, (-1, group)), dim=2, out=y) for x, y in zip(own, (dk, dv), strict=True))
    if sink_logits is not None:
        # at most 0 where a query sees something; elsewhere delta is 0
        share = (sink_logits[:, None] - lse).clamp_(max=0.0).exp_()
        valid = layout.valid()[:, None, k.shape[2] - q.shape[2] :]
        dsink = (share * (grad * out).sum(dim=-1)).masked_fill_(~valid, 0.0).sum(dim=(0, 2)).neg_()
    return dq, dk, dv, dsink


def _run(
    task: str,
    tensors: tuple[Tensor, ...],
    layout: Layout,
    causal: bool,
    scale: float,
    softcap: float | None,
    pattern: Pattern,
    sink_logits: Tensor | None,
    **more: Tensor | None,
) -> None:
    """Fills the tensors that are results, which have adjacent features, so that ``adjacent`` copies none of them."""
    q, k, v = tensors[:3]
    _check(tensors, layout, pattern, sink_logits)
    # all of these must outlive the call
    tensors = tuple(adjacent(x) if x.dim() == 4 else x for x in tensors)
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    starts = layout.starts.clamp(0, layout.tokens)
    ends = torch.minimum(starts + layout.lengths.clamp(min=0), starts.new_tensor(layout.tokens))
    vectors = {"starts": starts, "ends": ends, "sink_logits": sink_logits, **more}
    vectors |= {"prefix": pattern.prefix, "blocks": pattern.blocks, "mask": pattern.mask}
    vectors = {name: None if x is None else x.contiguous() for name, x in vectors.items()}
    pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
    steps = (ctypes.c_int64 * len(strides))(*strides)
    apart = len(tensors) > 5 and tensors[7].shape[1] > k.shape[1]  # dk
    targets, mask = more.get("targets"), pattern.mask
    problem = Attention(
        data=ctypes.addressof(pointers),
        strides=ctypes.addressof(steps),
        **{"sequences": len(starts), "rows": q.shape[0], "heads": k.shape[1], "group": q.shape[1] // k.shape[1]},
        **{"queries": q.shape[2], "keys": k.shape[2], "dim": q.shape[3], "dim_v": v.shape[3]},
        **{"packed": int(layout.packed), "causal": int(causal)},
        **{"window": pattern.window or 0, "chunk": pattern.chunk or 0},
        mask_row=0 if mask is None or len(mask) == 1 else q.shape[2] * k.shape[2],
        lists=0 if targets is None else len(targets),
        **{"scale": scale, "softcap": softcap or 0.0, "threads": torch.get_num_threads(), "apart": int(apart)},
        **{name: None if x is None else x.data_ptr() for name, x in vectors.items()},
    )
    if getattr(library(), f"flashsink_attention_{task}")(ctypes.byref(problem)):
        raise MemoryError(f"flashsink.attention: no memory for the buffers of its {task}")


def _check(tensors: tuple[Tensor, ...], layout: Layout, pattern: Pattern, sink_logits: Tensor | None) -> None:
    """The C++ side trusts its arguments, so they are checked here."""
    q, k, v, out, lse, *gradient = tensors
    b, h, queries, d = q.shape
    if k.shape[0] != b or k.shape[3] != d or h % k.shape[1] or k.shape[2] < queries:
        raise ValueError(f"k: expected keys for queries {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected values for keys {tuple(k.shape)}, got {tuple(v.shape)}")
    if lse.shape != q.shape[:3] or any(x.shape != (b, h, queries, v.shape[3]) for x in (out, *gradient[:1])):
        raise ValueError(f"out, lse: expected those of {tuple(q.shape)}, got {tuple(out.shape)}, {tuple(lse.shape)}")
    if any(x.dtype != torch.float32 for x in tensors):
        raise ValueError(f"expected float32, got {', '.join(str(x.dtype) for x in tensors)}")
    if sink_logits is not None and (sink_logits.shape != (h,) or sink_logits.dtype != torch.float32):
        raise ValueError(f"sink_logits: expected float32 ({h},), got {sink_logits.dtype} {tuple(sink_logits.shape)}")
    sequences, row = (len(layout.starts),), (b, k.shape[2])
    for name, x, shape in (
        ("starts", layout.starts, sequences),
        ("lengths", layout.lengths, sequences),
        ("prefix", pattern.prefix, sequences),
        ("blocks", pattern.blocks, row),
    ):
        if x is not None and (x.dtype != torch.int64 or x.shape != shape):
            raise ValueError(f"{name}: expected int64 {shape}, got {x.dtype} {tuple(x.shape)}")
    if b != (1 if layout.packed else len(layout.starts)):
        raise ValueError(f"starts: expected one entry a row, or one packed row, got {len(layout.starts)}")
    mask = pattern.mask
    if mask is not None and (
        mask.dtype != torch.bool or tuple(mask.shape) not in [(n, 1, queries, k.shape[2]) for n in (1, b)]
    ):
        raise ValueError(f"mask: expected bool ({b} or 1, 1, {queries}, {k.shape[2]}), got {tuple(mask.shape)}")
