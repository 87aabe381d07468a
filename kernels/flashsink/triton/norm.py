"""RMSNorm with this layer's decorrelation sum and largest activations, in the one read of h that it needs anyway.

    rstd = 1 / sqrt(mean(h^2) + eps)      out = gamma * round(rstd h)
    dh = rstd (g - h rstd^2 <g, h> / C) + dtotal d cos^2/dh,  g = gamma * dout      dgamma = sum of dout * round(rstd h)

(Zhang & Sennrich 2019, rounded as Llama does; the loss is in :mod:`flashsink.triton.decorrelation`). Both gradients of
h are added in float32 and rounded once.

A row of S tokens is cut into chunks of equal size, padding included, since every token is normalized; a program takes
one chunk. In packed layout a chunk may touch several sequences and goes through their pieces one by one. Chunk c's part
of the gradient of sequence n's BOS goes to slot c + n (dense: every row has slots of its own): along a row both only
rise and one of them does from piece to piece, so no two pieces share a slot, and the slots of a sequence are neighbors.
A small second launch adds them in order. There are no atomics.

Dimensions: B rows, S tokens, C features, N sequences (N = B in dense layout).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashsink import reference
from flashsink.triton.activations import ranked, ranks, valid_range
from flashsink.triton.decorrelation import TOGETHER, alike, bounds, check_features, cosine, dcos2, row_tile
from flashsink.triton.launch import VARYING, Tile, launch
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
    """The first and the last sequence with tokens in [begin, end); only the loss needs them."""
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
def _add_max(a, b, c, d):
    return a + c, tl.maximum(b, d)


@triton.jit
def _add_add_max(a, b, c, d, e, f):
    return a + d, b + e, tl.maximum(c, f)


@triton.jit
def reduced(x, rank, a, LOSS: tl.constexpr):
    """(|x|^2, the largest rank, <x, a>) of x, rank and, for the loss, a [BLOCK_C]; the last is 0 without it."""
    if TOGETHER:
        if LOSS:
            x_sq, dot, top = tl.reduce((x * x, x * a, rank), 0, _add_add_max)
        else:
            x_sq, top = tl.reduce((x * x, rank), 0, _add_max)
            dot = 0.0
    else:
        x_sq, top = tl.sum(x * x, axis=0), tl.max(rank, axis=0)
        dot = tl.sum(x * a, axis=0) if LOSS else 0.0
    return x_sq, top, dot


@triton.jit(do_not_specialize=VARYING)
def norm_forward(
    h, weight,  # (B, S, C), (C,)
    starts, lengths, spans,  # (N,) int64
    out,  # (B, S, C) contiguous
    rstd, max_abs, feature, terms, ws, ps,  # (B, S)
    dbos_parts,  # (slots, C) float32
    eps, margin, stride_hb, stride_hs, tokens, sequences, size,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, LOSS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B), chunks of ``size`` tokens."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    begin = chunk * size
    end = tl.minimum(begin + size, tokens)
    offs_c = tl.arange(0, BLOCK_C)
    inside = offs_c < FEATURES
    h += tl.cast(row, tl.int64) * stride_hb
    flat = tl.cast(row, tl.int64) * tokens
    gamma = tl.load(weight + offs_c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_C]
    valid_start, valid_end = valid_range(starts, lengths, row, sequences, tokens, PACKED)
    first, last = owners(starts, sequences, row, begin, end, PACKED, LOSS, BLOCK_N)
    for n in range(first, last + 1):
        low, high = piece(starts, n, first, last, begin, end)
        a = gamma  # not used without the loss
        if LOSS:
            start, span = bounds(starts, spans, n, tokens)
            a = tl.load(h + tl.cast(start, tl.int64) * stride_hs + offs_c, mask=inside & (span > 1), other=0.0)
            a = a.to(tl.float32)  # [BLOCK_C]
            a_sq = tl.sum(a * a, axis=0)
            dbos = tl.zeros((BLOCK_C,), tl.float32)
        for token in tl.range(low, high, num_stages=2):  # loads the next token ahead
            raw = tl.load(h + tl.cast(token, tl.int64) * stride_hs + offs_c, mask=inside, other=0.0)  # [BLOCK_C]
            x = raw.to(tl.float32)
            h_sq, top, dot = reduced(x, ranks(raw, offs_c), a, LOSS)
            rstd_i = 1.0 / tl.sqrt(h_sq / FEATURES + eps)
            x_hat = (x * rstd_i).to(raw.dtype).to(tl.float32)
            tl.store(out + (flat + token) * FEATURES + offs_c, x_hat * gamma, mask=inside)
            tl.store(rstd + flat + token, rstd_i)
            top, index = ranked(top)
            valid = (token >= valid_start) & (token < valid_end)
            tl.store(max_abs + flat + token, tl.where(valid, top, 0.0))
            tl.store(feature + flat + token, tl.where(valid, index, -1))
            if LOSS:
                term, w, p, q = cosine(dot, h_sq, a_sq, margin)
                counted = (token > start) & (token < start + span)
                w = tl.where(counted, w, 0.0)
                tl.store(terms + flat + token, tl.where(counted, term, 0.0))
                tl.store(ws + flat + token, w)
                tl.store(ps + flat + token, tl.where(counted, p, 0.0))
                if w != 0.0:  # a token that does not count adds nothing, whatever it holds
                    dbos += w * (x - q * a)
        if LOSS:
            slot = chunk + n if PACKED else row * tl.num_programs(0) + chunk
            some = (low < high) & (start + 1 < high) & (start + span > low)
            tl.store(dbos_parts + tl.cast(slot, tl.int64) * FEATURES + offs_c, dbos, mask=inside & some)


@triton.jit(do_not_specialize=VARYING)
def bos_gradient(
    starts, spans,  # (N,) int64
    dbos_parts, dbos,  # (slots, C), (N, C) float32
    tokens, chunks, size,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of features, N): adds the parts of every sequence in order."""
    n = tl.program_id(1)
    start, span = bounds(starts, spans, n, tokens)
    counted = tl.maximum(span - 1, 0)
    first = (start + 1) // size
    count = tl.where(counted > 0, (start + counted) // size + 1 - first, 0)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dbos_parts += tl.cast(first + (n if PACKED else n * chunks), tl.int64) * FEATURES + offs_c
    acc = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    for base in range(0, count, SLOTS):
        slot = base + tl.arange(0, SLOTS)[:, None]
        mask = (slot < count) & (offs_c < FEATURES)
        acc += tl.load(dbos_parts + slot.to(tl.int64) * FEATURES, mask=mask, other=0.0)  # [SLOTS, BLOCK_C]
    acc = tl.sum(acc, axis=0)[None, :]
    tl.store(dbos + tl.cast(n, tl.int64) * FEATURES + offs_c, acc, mask=offs_c < FEATURES)


@triton.jit(do_not_specialize=VARYING)
def norm_backward(
    dout, dtotal,  # (B, S, C) contiguous, () float32
    h, weight, starts, spans, rstd, ws, ps, dbos,
    dh, dweight,  # (B, S, C) contiguous, (B, chunks, C) float32
    stride_hb, stride_hs, tokens, sequences, size,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, LOSS: tl.constexpr, WEIGHT: tl.constexpr,
    HOLD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B), as in the forward. HOLD: BOS stays in registers, else every token loads it."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    begin = chunk * size
    end = tl.minimum(begin + size, tokens)
    offs_c = tl.arange(0, BLOCK_C)
    inside = offs_c < FEATURES
    h += tl.cast(row, tl.int64) * stride_hb
    flat = tl.cast(row, tl.int64) * tokens
    if LOSS:
        dsum = tl.load(dtotal)
    if WEIGHT:
        dgamma = tl.zeros((BLOCK_C,), tl.float32)
    first, last = owners(starts, sequences, row, begin, end, PACKED, LOSS, BLOCK_N)
    for n in range(first, last + 1):
        low, high = piece(starts, n, first, last, begin, end)
        if LOSS:
            start, span = bounds(starts, spans, n, tokens)
            a_row = h + tl.cast(start, tl.int64) * stride_hs + offs_c
            if HOLD:
                a = tl.load(a_row, mask=inside & (span > 1), other=0.0).to(tl.float32)  # [BLOCK_C]
        for token in range(low, high):
            raw = tl.load(h + tl.cast(token, tl.int64) * stride_hs + offs_c, mask=inside, other=0.0)  # [BLOCK_C]
            x = raw.to(tl.float32)
            rstd_i = tl.load(rstd + flat + token)
            place = (flat + token) * FEATURES + offs_c
            g = tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_C]
            if WEIGHT:
                dgamma += g * (x * rstd_i).to(raw.dtype).to(tl.float32)
            # gamma comes from the cache every time: kept in registers it would cost those of another token
            g = g * tl.load(weight + offs_c, mask=inside, other=0.0).to(tl.float32)
            mean = tl.sum(g * x, axis=0) * (rstd_i * rstd_i / FEATURES)
            dx = rstd_i * (g - mean * x)
            if LOSS:
                w = tl.load(ws + flat + token)
                p = tl.load(ps + flat + token)
                if not HOLD:
                    counted = (token > start) & (token < start + span)
                    a = tl.load(a_row, mask=inside & counted, other=0.0).to(tl.float32)
                dx += dcos2(tl.where(w != 0.0, w * dsum, 0.0), p, x, a)
                is_bos = (token == start) & (span > 1)
                dbos_row = dbos + tl.cast(n, tl.int64) * FEATURES + offs_c
                dx += tl.where(is_bos, dsum, 0.0) * tl.load(dbos_row, mask=inside & is_bos, other=0.0)
            tl.store(dh + place, dx, mask=inside)
    if WEIGHT:
        slot = tl.cast(row, tl.int64) * tl.num_programs(0) + chunk
        tl.store(dweight + slot * FEATURES + offs_c, dgamma, mask=inside)


def _chunk(rows: int, tokens: int) -> int:
    """Tokens of a chunk: enough chunks for all programs, yet none shorter than 16 tokens: each writes a row of float32.
    No constant of the kernels, which would be compiled again for batches of another size."""
    return min(max(triton.next_power_of_2(rows * tokens // _PROGRAMS), 16), 64)


def _norm_tile(features: int) -> Tile:
    tile = row_tile(features)
    return Tile(tile.blocks | {"BLOCK_N": _BLOCK_N}, tile.warps, tile.stages)


# ---- launchers


def forward_like(h: Tensor, weight: Tensor, starts: Tensor, lengths: Tensor, spans: Tensor | None, *_: Any) -> Any:
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


def forward(
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
    outputs = forward_like(h, weight, starts, lengths, spans)
    out, _, max_abs, feature, rstd, ws, ps, dbos = outputs
    rows, tokens, features = h.shape
    size = _chunk(rows, tokens)
    chunks = triton.cdiv(tokens, size)
    loss = spans is not None
    terms = torch.empty_like(ws)
    dbos_parts = torch.empty(
        (chunks + len(starts) if packed else rows * chunks, features) if loss else (0, features),
        dtype=torch.float32,
        device=h.device,
    )
    common = _common(h, weight, starts, spans, packed)
    launch(
        norm_forward, (chunks, rows), _norm_tile(features),
        **common, lengths=lengths.contiguous(), out=out, rstd=rstd, max_abs=max_abs, feature=feature,
        terms=terms if loss else None, ws=ws if loss else None, ps=ps if loss else None,
        dbos_parts=dbos_parts if loss else None, eps=eps, margin=margin, LOSS=loss,
    )  # fmt: skip
    if not loss:
        return out, torch.zeros((), dtype=torch.float32, device=h.device), *outputs[2:]
    launch(
        bos_gradient, (triton.cdiv(features, 128), len(starts)),
        Tile({"SLOTS": 8, "BLOCK_C": 128}, warps=4, stages=2),
        starts=common["starts"], spans=common["spans"], dbos_parts=dbos_parts, dbos=dbos, tokens=tokens,
        size=size, FEATURES=features, chunks=chunks, PACKED=packed,
    )  # fmt: skip
    return out, terms.sum(), *outputs[2:]


def _common(h: Tensor, weight: Tensor, starts: Tensor, spans: Tensor | None, packed: bool) -> dict[str, Any]:
    """The arguments that both kernels have."""
    (h,) = alike([h])
    stride_hb, stride_hs, _ = h.stride()
    rows, tokens, features = h.shape
    return {
        "h": h, "weight": weight.contiguous(), "starts": starts.contiguous(),
        "spans": None if spans is None else spans.contiguous(), "stride_hb": stride_hb, "stride_hs": stride_hs,
        "tokens": tokens, "sequences": len(starts), "size": _chunk(rows, tokens),
        "FEATURES": features, "PACKED": packed,
    }  # fmt: skip


def backward_like(
    dout: Tensor | None, dtotal: Tensor | None, h: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(h.shape, dtype=h.dtype, device=h.device),
        torch.empty(weight.shape if rest[-1] else (0,), dtype=weight.dtype, device=h.device),
    )


def backward(
    dout: Tensor | None,
    dtotal: Tensor | None,
    h: Tensor,
    weight: Tensor,
    starts: Tensor,
    spans: Tensor | None,
    packed: bool,
    rstd: Tensor,
    ws: Tensor,
    ps: Tensor,
    dbos: Tensor,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of h (B, S, C), contiguous; of weight (C,), or empty where it is not needed).

    ``dout`` and ``dtotal`` are None where nothing depends on that output; then the loss costs nothing.
    """
    if dout is None:  # of the loss alone, which no model asks for: not worth a kernel of its own
        dout = torch.zeros(h.shape, dtype=torch.promote_types(h.dtype, weight.dtype), device=h.device)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    rows, tokens, features = h.shape
    tile = _norm_tile(features)
    # BOS stays in registers except where the compile report has spills with it
    tile.blocks["HOLD"] = h.element_size() == 2 or features not in (4096, 8192)
    chunks = triton.cdiv(tokens, _chunk(rows, tokens))
    spans = None if dtotal is None else spans
    loss = spans is not None
    dweight = torch.empty((rows, chunks, features) if need_weight else (0,), dtype=torch.float32, device=h.device)
    launch(
        norm_backward, (chunks, rows), tile,
        **_common(h, weight, starts, spans, packed), dout=dout.contiguous(),
        dtotal=None if dtotal is None or spans is None else dtotal.float(),
        rstd=rstd.contiguous(), ws=ws.contiguous() if loss else None, ps=ps.contiguous() if loss else None,
        dbos=dbos.contiguous() if loss else None, dh=dh, dweight=dweight if need_weight else None,
        LOSS=loss, WEIGHT=need_weight,
    )  # fmt: skip
    return dh, (dweight.sum(dim=(0, 1)) if need_weight else dweight).to(weight.dtype)


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
        layout: dense rows, or one packed row. All tokens are normalized, padding too.
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
