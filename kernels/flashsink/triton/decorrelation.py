"""The decorrelation loss of all layers in one Triton launch forward and one backward.

Mathematics (definition 4, the same as csrc/decorrelation.cpp): with a = h at BOS, d = <a, h>, A = |a|^2 and
H = |h|^2 clamped at 1e-24 as ``F.normalize`` does, and 0 where the margin wins,

    w = 2 d / (A H)    d cos^2 / dh = w (a - p h),  p = d / H (0 where H is clamped)
                       d cos^2 / da = w (h - q a),  q = d / A (0 where A is clamped)

The forward reads every counted token once and adds up the second line while h is in registers, so the backward needs
nothing from other tokens: again one read. Sums are float32 trees. A sink is nearly parallel to BOS, where a - p h is a
thousandth of a; the error of p is then that of the gradient divided by a thousand: about 1e-4 for 1 - cos^2 = 1e-6.

Reductions are in a fixed order without atomics: a sequence is cut into a number of parts that depends on shapes alone,
every part leaves its sums, and the backward adds them in order.

Dimensions: L layers, B rows, S tokens, C features, N sequences (N = B in dense layout), P parts of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink import reference
from flashsink.triton.launch import Tile, launch
from flashsink.types import Layout

MAX_FEATURES = 8192  # a row lives in the registers of one program
_PROGRAMS = 512  # about two programs for every multiprocessor of a large GPU, each with a steady stream of rows
_LEAST = tl.constexpr(1e-24)  # F.normalize divides by at least 1e-12

# ---- pieces that other kernels share


@triton.jit
def select(pointers, index):
    """The entry of a tuple of pointers. They travel as kernel arguments: no table to copy to the device."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


@triton.jit
def bounds(starts, counts, n, tokens):
    """First token and number of tokens of sequence ``n``, cut to the tokens there are."""
    start = tl.minimum(tl.maximum(tl.load(starts + n), 0), tokens).to(tl.int32)
    count = tl.minimum(tl.maximum(tl.load(counts + n), 0), tokens - start).to(tl.int32)
    return start, count


@triton.jit
def cosine(x, square, a, own, margin):
    """Of a token x (C,) with its squared norm, and BOS a (C,) with its own: (over, w, p, q), where
    over = max(cos^2 - margin, 0)."""
    dot = tl.sum(x * a, axis=0)
    p = dot / tl.maximum(square, _LEAST)
    # a NaN of BOS is in dot; tl.maximum need not hand on that of own
    q = dot / tl.maximum(own, _LEAST)
    over = p * q - margin
    off = over < 0.0  # False for NaN, which must be seen
    w = tl.where(off, 0.0, 2.0 * p / tl.maximum(own, _LEAST))
    p = tl.where(square < _LEAST, 0.0, p)
    q = tl.where(own < _LEAST, 0.0, q)
    return tl.where(off, 0.0, over), w, p, q


@triton.jit
def push(w, p, x, a):
    """d cos^2 / dh (C,); exactly 0 where w is, whatever is in x and a."""
    return tl.where(w != 0.0, w * (a - p * x), 0.0)


# ---- kernels


@triton.jit
def decorrelation_forward(
    layers,  # a tuple of (B, S, C)
    starts, spans,  # (N,) int64
    over, weights, ratios,  # (L, B, S) float32
    parts,  # (L, N, P, C) float32
    margin, row_stride, token_stride, rows, tokens,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (P, N, L). Writes over, w and p of its counted tokens and its part of the gradient of BOS."""
    part, n, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = 0 if PACKED else n
    start, span = bounds(starts, spans, n, tokens)
    counted = tl.maximum(span - 1, 0)
    each = tl.cdiv(counted, tl.num_programs(0))
    first = start + 1 + part * each
    last = tl.minimum(first + each, start + 1 + counted)

    column = tl.arange(0, BLOCK_C)
    inside = column < FEATURES
    h = select(layers, layer) + tl.cast(row, tl.int64) * row_stride
    a = tl.load(h + tl.cast(start, tl.int64) * token_stride + column, mask=inside & (counted > 0), other=0.0)
    a = a.to(tl.float32)
    own = tl.sum(a * a, axis=0)
    gradient = tl.zeros((BLOCK_C,), tl.float32)
    flat = (tl.cast(layer, tl.int64) * rows + row) * tokens
    for token in tl.range(first, last, num_stages=2):  # the next token is on its way meanwhile
        x = tl.load(h + tl.cast(token, tl.int64) * token_stride + column, mask=inside, other=0.0).to(tl.float32)
        excess, w, p, q = cosine(x, tl.sum(x * x, axis=0), a, own, margin)
        tl.store(over + flat + token, excess)
        tl.store(weights + flat + token, w)
        tl.store(ratios + flat + token, p)
        gradient += push(w, q, a, x)
    slot = (tl.cast(layer, tl.int64) * tl.num_programs(1) + n) * tl.num_programs(0) + part
    tl.store(parts + slot * FEATURES + column, gradient, mask=inside)


@triton.jit
def decorrelation_backward(
    layers, gradients,  # tuples of (B, S, C), the second contiguous
    upstream,  # (L,) float32
    starts, spans, weights, ratios, parts, row_stride, token_stride, rows, tokens, parts_count,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pieces, N, L). Sequence n writes its tokens and, packed, the padding up to the next one; the first one also
    what is before it, so that every token is written once."""
    piece, n, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequences = tl.num_programs(1)
    row = 0 if PACKED else n
    start, span = bounds(starts, spans, n, tokens)
    low, high = tl.cast(0, tl.int32), tl.cast(tokens, tl.int32)
    if PACKED:
        following, _ = bounds(starts, spans, tl.minimum(n + 1, sequences - 1), tokens)
        low = tl.where(n == 0, 0, start)
        high = tl.where(n == sequences - 1, tokens, following)
    each = tl.cdiv(high - low, tl.num_programs(0))
    low += piece * each
    high = tl.minimum(low + each, high)

    column = tl.arange(0, BLOCK_C)
    inside = column < FEATURES
    h = select(layers, layer) + tl.cast(row, tl.int64) * row_stride
    out = select(gradients, layer) + tl.cast(row, tl.int64) * tokens * FEATURES
    factor = tl.load(upstream + layer)
    a = tl.load(h + tl.cast(start, tl.int64) * token_stride + column, mask=inside & (span > 1), other=0.0)
    a = a.to(tl.float32)
    flat = (tl.cast(layer, tl.int64) * rows + row) * tokens
    for token in range(low, high):
        counted = (token > start) & (token < start + span)
        x = tl.load(h + tl.cast(token, tl.int64) * token_stride + column, mask=inside & counted, other=0.0)
        w = tl.load(weights + flat + token, mask=counted, other=0.0)
        p = tl.load(ratios + flat + token, mask=counted, other=0.0)
        # where w is 0 the factor is not looked at: it may be infinite
        gradient = push(tl.where(w != 0.0, w * factor, 0.0), p, x.to(tl.float32), a)
        written = inside & ((token != start) | (span <= 1))
        tl.store(out + tl.cast(token, tl.int64) * FEATURES + column, gradient, mask=written)
    if (piece == 0) & (span > 1):
        slot = (tl.cast(layer, tl.int64) * sequences + n) * parts_count
        of_bos = tl.zeros((BLOCK_C,), tl.float32)
        for part in range(parts_count):
            of_bos += tl.load(parts + (slot + part) * FEATURES + column, mask=inside, other=0.0)
        tl.store(out + tl.cast(start, tl.int64) * FEATURES + column, factor * of_bos, mask=inside)


def row_tile(features: int) -> Tile:
    """A program takes one token after the other, a warp 512 of its features (16 a thread).

    No GPU has run this yet: what is known is that these compile without spills for sm_80, sm_90 and sm_100.
    """
    block = max(triton.next_power_of_2(features), 16)
    return Tile({"BLOCK_C": block}, warps=min(max(block // 512, 1), 16), stages=2)


# ---- operators

torch.library.define(
    "flashsink::triton_decorrelation_sums",
    "(Tensor[] layers, Tensor starts, Tensor spans, bool packed, float margin) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "flashsink::triton_decorrelation_sums_backward",
    "(Tensor upstream, Tensor[] layers, Tensor starts, Tensor spans, bool packed, Tensor weights, Tensor ratios,"
    " Tensor parts) -> Tensor[]",
)


def _parts(layers: int, sequences: int, tokens: int, least: int, programs: int) -> int:
    """Into how many parts of at least ``least`` tokens every sequence is cut, so that there are enough programs."""
    wanted = -(-programs // max(layers * sequences, 1))
    return max(min(wanted, tokens // least), 1)


@torch.library.register_fake("flashsink::triton_decorrelation_sums")
def _sums_like(
    layers: Sequence[Tensor], starts: Tensor, spans: Tensor, packed: bool, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uncounted tokens have 0 in what is kept of tokens."""
    (rows, tokens, features), device = layers[0].shape, layers[0].device
    length = tokens // max(starts.shape[0], 1) if packed else tokens
    parts = _parts(len(layers), starts.shape[0], length, 32, _PROGRAMS)
    kept = (len(layers), rows, tokens)
    return (
        torch.empty((len(layers),), dtype=torch.float32, device=device),
        torch.zeros(kept, dtype=torch.float32, device=device),
        torch.zeros(kept, dtype=torch.float32, device=device),
        torch.empty((len(layers), starts.shape[0], parts, features), dtype=torch.float32, device=device),
    )


def _sums(
    layers: Sequence[Tensor], starts: Tensor, spans: Tensor, packed: bool, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums (L,), w and p of every token (L, B, S), parts of the gradient of BOS (L, N, P, C)), all float32."""
    _, weights, ratios, parts = _sums_like(layers, starts, spans, packed, margin)
    over = torch.zeros_like(weights)
    launch(
        decorrelation_forward,
        (parts.shape[2], len(starts), len(layers)),
        row_tile(layers[0].shape[2]),
        **_common(layers, starts, spans, packed),
        over=over,
        weights=weights,
        ratios=ratios,
        parts=parts,
        margin=margin,
    )
    return over.sum(dim=(1, 2)), weights, ratios, parts


def alike(layers: Sequence[Tensor]) -> list[Tensor]:
    """The layers as kernels can read them: of equal strides and adjacent features, in place or else copied."""
    strides, features = layers[0].stride(), layers[0].shape[2]
    if any(layer.stride() != strides for layer in layers) or (strides[2] != 1 and features > 1):
        return [layer.contiguous() for layer in layers]
    return list(layers)


def _common(layers: Sequence[Tensor], starts: Tensor, spans: Tensor, packed: bool) -> dict[str, Any]:
    """The arguments that both kernels have."""
    layers = alike(layers)
    row_stride, token_stride, _ = layers[0].stride()
    rows, tokens, features = layers[0].shape
    return {
        "layers": tuple(layers),
        "starts": starts.contiguous(),
        "spans": spans.contiguous(),
        "row_stride": row_stride,
        "token_stride": token_stride,
        "rows": rows,
        "tokens": tokens,
        "FEATURES": features,
        "PACKED": packed,
    }


@torch.library.register_fake("flashsink::triton_decorrelation_sums_backward")
def _gradients_like(
    upstream: Tensor,
    layers: Sequence[Tensor],
    starts: Tensor,
    spans: Tensor,
    packed: bool,
    weights: Tensor,
    ratios: Tensor,
    parts: Tensor,
) -> list[Tensor]:
    return [torch.empty(layer.shape, dtype=layer.dtype, device=layer.device) for layer in layers]


def _gradients(
    upstream: Tensor,
    layers: Sequence[Tensor],
    starts: Tensor,
    spans: Tensor,
    packed: bool,
    weights: Tensor,
    ratios: Tensor,
    parts: Tensor,
) -> list[Tensor]:
    """L contiguous tensors (B, S, C), exactly 0 at tokens that do not count."""
    gradients = _gradients_like(upstream, layers, starts, spans, packed, weights, ratios, parts)
    _, tokens, features = layers[0].shape
    length = -(-tokens // max(len(starts), 1)) if packed else tokens
    launch(
        decorrelation_backward,
        # rows are independent here, so pieces cost nothing and may be many
        (_parts(len(layers), len(starts), length, 16, 8 * _PROGRAMS), len(starts), len(layers)),
        row_tile(features),
        **_common(layers, starts, spans, packed),
        gradients=tuple(gradients),
        upstream=upstream.float().contiguous(),
        weights=weights.contiguous(),
        ratios=ratios.contiguous(),
        parts=parts.contiguous(),
        parts_count=parts.shape[2],
    )
    return gradients


for _device in ("CUDA", "CPU"):  # on the CPU under TRITON_INTERPRET=1
    torch.library.impl("flashsink::triton_decorrelation_sums", _device)(_sums)
    torch.library.impl("flashsink::triton_decorrelation_sums_backward", _device)(_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    layers, starts, spans, ctx.packed, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(starts, spans, *output[1:], *layers)


def _derive(ctx: Any, upstream: Tensor, *_: Any) -> tuple[list[Tensor], None, None, None, None]:
    starts, spans, weights, ratios, parts, *layers = ctx.saved_tensors
    run = torch.ops.flashsink.triton_decorrelation_sums_backward
    return run(upstream, layers, starts, spans, ctx.packed, weights, ratios, parts), None, None, None, None


def refuse(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("the triton backend differentiates this once; backend='reference' as often as you like")


torch.library.register_autograd("flashsink::triton_decorrelation_sums", _derive, setup_context=_save)
torch.library.register_autograd("flashsink::triton_decorrelation_sums_backward", refuse)


# ---- what the triton backend calls


def check_features(features: int) -> None:
    """Raises:
    ValueError: a row is too long for the registers of one program.
    """
    if features > MAX_FEATURES:
        raise ValueError(f"hidden_states: the triton backend takes up to {MAX_FEATURES} features, got {features}")


def decorrelation_sums(layers: Sequence[Tensor], spans: Tensor, layout: Layout, margin: float) -> Tensor:
    """:func:`flashsink.reference.decorrelation_sums`, differentiable once w.r.t. ``layers``.

    One launch forward and one backward for all layers; nothing of the layers' size is kept or copied.

    Args:
        layers: L tensors (B, S, C) of float16, bfloat16 or float32 and C <= 8192. They are read in place where
            their strides are equal and their features adjacent, and copied elsewhere; layers of unlike dtypes are
            converted to their common one. float64 is computed by the reference.
        spans: (N,) int64, within the layout's lengths.
        layout: dense rows, or one packed row.
        margin: 0 <= margin < 1.

    Returns:
        (L,) float32 (float64 for float64), with its graph.

    Raises:
        ValueError: C is above 8192.
    """
    dtype = functools.reduce(torch.promote_types, (layer.dtype for layer in layers))
    if dtype == torch.float64:
        return reference.decorrelation_sums(layers, spans, layout, margin)
    check_features(layers[0].shape[2])
    layers = [layer.to(dtype) for layer in layers]
    run = torch.ops.flashsink.triton_decorrelation_sums
    return run(layers, layout.starts, spans, layout.packed, margin)[0]
