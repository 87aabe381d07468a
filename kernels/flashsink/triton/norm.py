"""RMSNorm that also finds this layer's decorrelation sum and largest activations, in the one read of h it needs anyway.

The mathematics is in :mod:`flashsink.triton.decorrelation` and :mod:`flashsink.reference`. A row of S tokens is cut
into chunks of equal size, padding included, since every token is normalised; a program takes one chunk. In packed
layout a chunk may touch several sequences and goes through their pieces one by one. Chunk c's part of the gradient of
sequence n's BOS goes to slot c + n (dense: every row has slots of its own): along a row both only rise and one of them
does from piece to piece, so no two pieces share a slot, and the slots of a sequence are neighbours. A small second
launch adds them in order. There are no atomics.

Dimensions: B rows, S tokens, C features, N sequences (N = B in dense layout).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink import reference
from flashsink.triton.activations import largest, valid_range
from flashsink.triton.decorrelation import alike, bounds, check_features, cosine, push, refuse, row_tile
from flashsink.triton.launch import Tile, launch
from flashsink.types import Layout, Normed

_PROGRAMS = 512  # about two programs for every multiprocessor of a large GPU
_BLOCK_N = 1024  # packed sequences that the search for a chunk's first and last one looks at together

# ---- kernels


@triton.jit
def owner(starts, sequences, token, BLOCK_N: tl.constexpr):
    """The packed sequence that a token belongs to, or padding after it: the last one that does not begin later."""
    count = tl.cast(0, tl.int32)
    for base in range(0, sequences, BLOCK_N):
        index = base + tl.arange(0, BLOCK_N)
        first = tl.load(starts + index, mask=index < sequences, other=2147483647)
        count += tl.sum((first <= token).to(tl.int32), axis=0)
    return tl.maximum(count - 1, 0)


@triton.jit
def owners(starts, sequences, row, begin, end, PACKED: tl.constexpr, LOSS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first and the last sequence with tokens in [begin, end); without the loss nobody cares."""
    if PACKED and LOSS:
        return owner(starts, sequences, begin, BLOCK_N), owner(starts, sequences, end - 1, BLOCK_N)
    else:
        return row, row


@triton.jit
def piece(starts, n, first, last, begin, end):
    """[low, high): the tokens of the chunk [begin, end) that sequence ``n`` of first..last owns."""
    low, high = begin, end
    if n > first:
        low = tl.maximum(tl.load(starts + n).to(tl.int32), begin)
    if n < last:
        high = tl.minimum(tl.load(starts + n + 1).to(tl.int32), end)
    return low, high


@triton.jit
def norm_forward(
    h, weight,  # (B, S, C), (C,)
    starts, lengths, spans,  # (N,) int64
    out,  # (B, S, C) contiguous
    rstd, max_abs, feature, over, weights, ratios,  # (B, S)
    parts,  # (slots, C) float32
    eps, margin, row_stride, token_stride, tokens, sequences,
    FEATURES: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, LOSS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B)."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, tokens)
    column = tl.arange(0, BLOCK_C)
    inside = column < FEATURES
    h += tl.cast(row, tl.int64) * row_stride
    flat = tl.cast(row, tl.int64) * tokens
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    valid_start, valid_end = valid_range(starts, lengths, row, sequences, tokens, PACKED)
    first, last = owners(starts, sequences, row, begin, end, PACKED, LOSS, BLOCK_N)
    for n in range(first, last + 1):
        low, high = piece(starts, n, first, last, begin, end)
        if LOSS:
            start, span = bounds(starts, spans, n, tokens)
            a = tl.load(h + tl.cast(start, tl.int64) * token_stride + column, mask=inside & (span > 1), other=0.0)
            a = a.to(tl.float32)
            own = tl.sum(a * a, axis=0)
            gradient = tl.zeros((BLOCK_C,), tl.float32)
        for token in tl.range(low, high, num_stages=2):  # the next token is on its way meanwhile
            raw = tl.load(h + tl.cast(token, tl.int64) * token_stride + column, mask=inside, other=0.0)
            x = raw.to(tl.float32)
            square = tl.sum(x * x, axis=0)
            r = 1.0 / tl.sqrt(square / FEATURES + eps)
            unit = (x * r).to(raw.dtype).to(tl.float32)
            tl.store(out + (flat + token) * FEATURES + column, unit * scale, mask=inside)
            tl.store(rstd + flat + token, r)
            top, index = largest(raw, column, FEATURES)
            valid = (token >= valid_start) & (token < valid_end)
            tl.store(max_abs + flat + token, tl.where(valid, top, 0.0))
            tl.store(feature + flat + token, tl.where(valid, index, -1))
            if LOSS:
                excess, w, p, q = cosine(x, square, a, own, margin)
                counted = (token > start) & (token < start + span)
                w = tl.where(counted, w, 0.0)
                tl.store(over + flat + token, tl.where(counted, excess, 0.0))
                tl.store(weights + flat + token, w)
                tl.store(ratios + flat + token, tl.where(counted, p, 0.0))
                if w != 0.0:  # nothing of a token that does not count, whatever it holds
                    gradient += w * (x - q * a)
        if LOSS:
            slot = chunk + n if PACKED else row * tl.num_programs(0) + chunk
            some = (low < high) & (start + 1 < high) & (start + span > low)
            tl.store(parts + tl.cast(slot, tl.int64) * FEATURES + column, gradient, mask=inside & some)


@triton.jit
def bos_gradient(
    starts, spans,  # (N,) int64
    parts, bos,  # (slots, C), (N, C) float32
    tokens, chunks,
    FEATURES: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of features, N): adds the parts of every sequence in order."""
    n = tl.program_id(1)
    start, span = bounds(starts, spans, n, tokens)
    counted = tl.maximum(span - 1, 0)
    first = (start + 1) // CHUNK
    count = tl.where(counted > 0, (start + counted) // CHUNK + 1 - first, 0)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    parts += tl.cast(first + (n if PACKED else n * chunks), tl.int64) * FEATURES + column
    total = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    for base in range(0, count, SLOTS):
        slot = base + tl.arange(0, SLOTS)[:, None]
        total += tl.load(parts + slot.to(tl.int64) * FEATURES, mask=(slot < count) & (column < FEATURES), other=0.0)
    total = tl.sum(total, axis=0)[None, :]
    tl.store(bos + tl.cast(n, tl.int64) * FEATURES + column, total, mask=column < FEATURES)


@triton.jit
def norm_backward(
    upstream, of_total,  # (B, S, C) contiguous, () float32
    h, weight, starts, spans, rstd, weights, ratios, bos,
    gradient, of_weight,  # (B, S, C) contiguous, (B, chunks, C) float32
    row_stride, token_stride, tokens, sequences,
    FEATURES: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, LOSS: tl.constexpr, WEIGHT: tl.constexpr,
    HOLD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B): both gradients are added in float32 and rounded once. ``of_weight`` (B, chunks, C)."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, tokens)
    column = tl.arange(0, BLOCK_C)
    inside = column < FEATURES
    h += tl.cast(row, tl.int64) * row_stride
    flat = tl.cast(row, tl.int64) * tokens
    if LOSS:
        factor = tl.load(of_total)
    if WEIGHT:
        weight_sum = tl.zeros((BLOCK_C,), tl.float32)
    first, last = owners(starts, sequences, row, begin, end, PACKED, LOSS, BLOCK_N)
    for n in range(first, last + 1):
        low, high = piece(starts, n, first, last, begin, end)
        if LOSS:
            start, span = bounds(starts, spans, n, tokens)
            line = h + tl.cast(start, tl.int64) * token_stride + column
            if HOLD:
                a = tl.load(line, mask=inside & (span > 1), other=0.0).to(tl.float32)
        for token in range(low, high):
            raw = tl.load(h + tl.cast(token, tl.int64) * token_stride + column, mask=inside, other=0.0)
            x = raw.to(tl.float32)
            r = tl.load(rstd + flat + token)
            place = (flat + token) * FEATURES + column
            dy = tl.load(upstream + place, mask=inside, other=0.0).to(tl.float32)
            if WEIGHT:
                weight_sum += dy * (x * r).to(raw.dtype).to(tl.float32)
            # from the cache every time: kept in registers it would cost those of another token
            dy = dy * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            mean = tl.sum(dy * x, axis=0) * (r * r / FEATURES)
            dx = r * (dy - mean * x)
            if LOSS:
                w = tl.load(weights + flat + token)
                p = tl.load(ratios + flat + token)
                if not HOLD:
                    counted = (token > start) & (token < start + span)
                    a = tl.load(line, mask=inside & counted, other=0.0).to(tl.float32)
                dx += push(tl.where(w != 0.0, w * factor, 0.0), p, x, a)
                is_bos = (token == start) & (span > 1)
                sums = bos + tl.cast(n, tl.int64) * FEATURES + column
                dx += tl.where(is_bos, factor, 0.0) * tl.load(sums, mask=inside & is_bos, other=0.0)
            tl.store(gradient + place, dx, mask=inside)
    if WEIGHT:
        slot = tl.cast(row, tl.int64) * tl.num_programs(0) + chunk
        tl.store(of_weight + slot * FEATURES + column, weight_sum, mask=inside)


def _norm_tile(rows: int, tokens: int, features: int) -> Tile:
    """Chunks that make enough programs, yet no shorter than 16 tokens: each leaves a row of float32 behind."""
    tile = row_tile(features)
    chunk = min(max(triton.next_power_of_2(rows * tokens // _PROGRAMS), 16), 64)
    return Tile(tile.blocks | {"CHUNK": chunk, "BLOCK_N": _BLOCK_N}, tile.warps, tile.stages)


# ---- operators

torch.library.define(
    "flashsink::triton_rms_norm",
    "(Tensor h, Tensor weight, Tensor starts, Tensor lengths, Tensor? spans, bool packed, float eps, float margin)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "flashsink::triton_rms_norm_backward",
    "(Tensor upstream, Tensor of_total, Tensor h, Tensor weight, Tensor starts, Tensor? spans, bool packed,"
    " Tensor rstd, Tensor weights, Tensor ratios, Tensor bos, bool need_weight) -> (Tensor, Tensor)",
)


@torch.library.register_fake("flashsink::triton_rms_norm")
def _norm_like(
    h: Tensor,
    weight: Tensor,
    starts: Tensor,
    lengths: Tensor,
    spans: Tensor | None,
    packed: bool,
    eps: float,
    margin: float,
) -> tuple[Tensor, ...]:
    def new(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=h.device)

    rows, tokens, features = h.shape
    kept = (rows, tokens) if spans is not None else (0, 0)
    return (
        new((rows, tokens, features), torch.promote_types(h.dtype, weight.dtype)),
        new(()),
        new((rows, tokens)),
        new((rows, tokens), torch.int32),
        new((rows, tokens)),
        new(kept),
        new(kept),
        new((starts.shape[0] if spans is not None else 0, features)),
    )


def _norm(
    h: Tensor,
    weight: Tensor,
    starts: Tensor,
    lengths: Tensor,
    spans: Tensor | None,
    packed: bool,
    eps: float,
    margin: float,
) -> tuple[Tensor, ...]:
    """(out (B, S, C), total, max_abs (B, S), feature (B, S), and for the backward rstd (B, S), w and p of every token
    (B, S), gradient of BOS (N, C)); the last three are empty and the total is 0 without spans."""
    outputs = _norm_like(h, weight, starts, lengths, spans, packed, eps, margin)
    out, _, max_abs, feature, rstd, weights, ratios, bos = outputs
    rows, tokens, features = h.shape
    tile = _norm_tile(rows, tokens, features)
    chunks = triton.cdiv(tokens, tile.blocks["CHUNK"])
    loss = spans is not None
    over = torch.empty_like(weights)
    parts = torch.empty(
        (chunks + len(starts) if packed else rows * chunks, features) if loss else (0, features),
        dtype=torch.float32,
        device=h.device,
    )
    common = _common(h, starts, spans, packed)
    launch(
        norm_forward,
        (chunks, rows),
        tile,
        **common,
        weight=weight.contiguous(),
        lengths=lengths.contiguous(),
        sequences=len(starts),
        out=out,
        rstd=rstd,
        max_abs=max_abs,
        feature=feature,
        over=over if loss else None,
        weights=weights if loss else None,
        ratios=ratios if loss else None,
        parts=parts if loss else None,
        eps=eps,
        margin=margin,
        LOSS=loss,
    )
    if spans is None:
        return out, torch.zeros((), dtype=torch.float32, device=h.device), *outputs[2:]
    _add_parts(common["starts"], common["spans"], parts, bos, tokens, tile.blocks["CHUNK"], packed)
    return out, over.sum(), *outputs[2:]


def _add_parts(
    starts: Tensor, spans: Tensor, parts: Tensor, bos: Tensor, tokens: int, chunk: int, packed: bool
) -> None:
    sequences, features = bos.shape
    launch(
        bos_gradient,
        (triton.cdiv(features, 128), sequences),
        Tile({"SLOTS": 8, "BLOCK_C": 128, "CHUNK": chunk}, warps=4, stages=2),
        starts=starts,
        spans=spans,
        parts=parts,
        bos=bos,
        tokens=tokens,
        FEATURES=features,
        chunks=triton.cdiv(tokens, chunk),
        PACKED=packed,
    )


def _common(h: Tensor, starts: Tensor, spans: Tensor | None, packed: bool) -> dict[str, Any]:
    """The arguments that both kernels have."""
    (h,) = alike([h])
    row_stride, token_stride, _ = h.stride()
    _, tokens, features = h.shape
    return {
        "h": h,
        "starts": starts.contiguous(),
        "spans": None if spans is None else spans.contiguous(),
        "row_stride": row_stride,
        "token_stride": token_stride,
        "tokens": tokens,
        "FEATURES": features,
        "PACKED": packed,
    }


@torch.library.register_fake("flashsink::triton_rms_norm_backward")
def _gradients_like(
    upstream: Tensor,
    of_total: Tensor,
    h: Tensor,
    weight: Tensor,
    starts: Tensor,
    spans: Tensor | None,
    packed: bool,
    rstd: Tensor,
    weights: Tensor,
    ratios: Tensor,
    bos: Tensor,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(h.shape, dtype=h.dtype, device=h.device),
        torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=h.device),
    )


def _gradients(
    upstream: Tensor,
    of_total: Tensor,
    h: Tensor,
    weight: Tensor,
    starts: Tensor,
    spans: Tensor | None,
    packed: bool,
    rstd: Tensor,
    weights: Tensor,
    ratios: Tensor,
    bos: Tensor,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of h (B, S, C), contiguous; of weight (C,), or empty where it is not needed)."""
    gradient = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    rows, tokens, features = h.shape
    tile = _norm_tile(rows, tokens, features)
    # BOS stays in registers but where the compile report has spills with it
    tile.blocks["HOLD"] = h.element_size() == 2 or features not in (4096, 8192)
    chunks = triton.cdiv(tokens, tile.blocks["CHUNK"])
    loss = spans is not None
    of_weight = torch.empty((rows, chunks, features) if need_weight else (0,), dtype=torch.float32, device=h.device)
    launch(
        norm_backward,
        (chunks, rows),
        tile,
        **_common(h, starts, spans, packed),
        upstream=upstream.contiguous(),
        of_total=of_total.float() if loss else None,
        weight=weight.contiguous(),
        sequences=len(starts),
        rstd=rstd.contiguous(),
        weights=weights.contiguous() if loss else None,
        ratios=ratios.contiguous() if loss else None,
        bos=bos.contiguous() if loss else None,
        gradient=gradient,
        of_weight=of_weight if need_weight else None,
        LOSS=loss,
        WEIGHT=need_weight,
    )
    return gradient, (of_weight.sum(dim=(0, 1)) if need_weight else of_weight).to(weight.dtype)


for _device in ("CUDA", "CPU"):  # on the CPU under TRITON_INTERPRET=1
    torch.library.impl("flashsink::triton_rms_norm", _device)(_norm)
    torch.library.impl("flashsink::triton_rms_norm_backward", _device)(_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, weight, starts, _, spans, ctx.packed, _, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(h, weight, starts, spans, *output[4:])


def _derive(ctx: Any, upstream: Tensor, of_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    h, weight, starts, spans, *kept = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1]
    run = torch.ops.flashsink.triton_rms_norm_backward
    of_h, of_weight = run(upstream, of_total, h, weight, starts, spans, ctx.packed, *kept, need_weight)
    return of_h, of_weight if need_weight else None, None, None, None, None, None, None


torch.library.register_autograd("flashsink::triton_rms_norm", _derive, setup_context=_save)
torch.library.register_autograd("flashsink::triton_rms_norm_backward", refuse)


# ---- what the triton backend calls


def rms_norm(h: Tensor, weight: Tensor, eps: float, layout: Layout, spans: Tensor | None, margin: float) -> Normed:
    """:func:`flashsink.reference.rms_norm` in one read of h each way, differentiable once w.r.t. h and weight.

    Kept for the backward are h itself and three float32 numbers for every token; with ``spans`` also one float32 row
    of C for every sequence. Everything is reduced in a fixed order.

    Args:
        h: (B, S, C) of float16, bfloat16 or float32, C <= 8192; copied where its features are not adjacent. float64
            here or in ``weight`` is computed by the reference.
        weight: (C,).
        eps: added to the mean square.
        layout: dense rows, or one packed row. All tokens are normalised, padding too.
        spans: (N,) int64, within the layout's lengths; None = without the decorrelation sum.
        margin: 0 <= margin < 1.

    Raises:
        ValueError: C is above 8192.
    """
    if torch.float64 in (h.dtype, weight.dtype):
        return reference.rms_norm(h, weight, eps, layout, spans, margin)
    check_features(h.shape[2])
    out, total, max_abs, feature, *_ = torch.ops.flashsink.triton_rms_norm(
        h, weight, layout.starts, layout.lengths, spans, layout.packed, eps, margin
    )
    return Normed(out, None if spans is None else total, max_abs, feature)
