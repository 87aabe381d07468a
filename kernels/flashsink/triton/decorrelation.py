"""The decorrelation loss of all layers in one Triton launch forward and one backward.

Mathematics (the same as in csrc/rows.h): with a = h at BOS, d = <a, h>, |a|^2 and |h|^2 clamped at 1e-24 as
``F.normalize`` does, and 0 where the margin wins,

    term = max(cos^2 - margin, 0),  cos^2 = p q,  p = d / |h|^2,  q = d / |a|^2,  w = 2 d / (|a|^2 |h|^2)
    d cos^2 / dh = w (a - p h)    (p = 0 where |h|^2 is clamped)
    d cos^2 / da = w (h - q a)    (q = 0 where |a|^2 is clamped)

The forward reads every counted token once and adds up the last line while h is in registers, so the backward needs
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
from flashsink.triton.launch import INTERPRETED, VARYING, Tile, launch
from flashsink.types import Layout

MAX_FEATURES = 8192  # a row is held in the registers of one program
_PROGRAMS = 512  # about two programs for every multiprocessor of a large GPU, each with a steady stream of rows
_LEAST = tl.constexpr(1e-24)  # F.normalize divides by at least 1e-12
# Several sums are one reduction, with the barriers of one; the interpreter would go through such element by element
TOGETHER = tl.constexpr(not INTERPRETED)

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
    """First token and number of tokens of sequence ``n``, clamped to the tensor."""
    start = tl.minimum(tl.maximum(tl.load(starts + n), 0), tokens).to(tl.int32)
    count = tl.minimum(tl.maximum(tl.load(counts + n), 0), tokens - start).to(tl.int32)
    return start, count


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def squared_and_dot(h, a):
    """(|h|^2, <h, a>) of h and a [BLOCK_C] float32."""
    if TOGETHER:
        return tl.reduce((h * h, h * a), 0, _add_two)
    else:
        return tl.sum(h * h, axis=0), tl.sum(h * a, axis=0)


@triton.jit
def cosine(dot, h_sq, a_sq, margin):
    """(term, w, p, q) of a token and BOS, from their product and squared norms."""
    p = dot / tl.maximum(h_sq, _LEAST)
    # a NaN of BOS is in dot; tl.maximum need not propagate that of a_sq
    q = dot / tl.maximum(a_sq, _LEAST)
    term = p * q - margin
    off = term < 0.0  # False for NaN, which must be seen
    w = tl.where(off, 0.0, 2.0 * p / tl.maximum(a_sq, _LEAST))
    p = tl.where(h_sq < _LEAST, 0.0, p)
    q = tl.where(a_sq < _LEAST, 0.0, q)
    return tl.where(off, 0.0, term), w, p, q


@triton.jit
def dcos2(w, p, h, a):
    """d cos^2 / dh [BLOCK_C]; exactly 0 where w is, whatever is in h and a."""
    return tl.where(w != 0.0, w * (a - p * h), 0.0)


# ---- kernels


@triton.jit(do_not_specialize=VARYING)
def decorrelation_forward(
    layers,  # a tuple of (B, S, C)
    starts, spans,  # (N,) int64
    terms, ws, ps,  # (L, B, S) float32
    dbos_parts,  # (L, N, P, C) float32
    margin, stride_hb, stride_hs, rows, tokens,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (P, N, L). Writes term, w and p of its counted tokens and its part of the gradient of BOS."""
    part, n, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = 0 if PACKED else n
    start, span = bounds(starts, spans, n, tokens)
    counted = tl.maximum(span - 1, 0)
    each = tl.cdiv(counted, tl.num_programs(0))
    first = start + 1 + part * each
    last = tl.minimum(first + each, start + 1 + counted)

    offs_c = tl.arange(0, BLOCK_C)
    inside = offs_c < FEATURES
    h_row = select(layers, layer) + tl.cast(row, tl.int64) * stride_hb
    a = tl.load(h_row + tl.cast(start, tl.int64) * stride_hs + offs_c, mask=inside & (counted > 0), other=0.0)
    a = a.to(tl.float32)  # [BLOCK_C]
    a_sq = tl.sum(a * a, axis=0)
    dbos = tl.zeros((BLOCK_C,), tl.float32)
    flat = (tl.cast(layer, tl.int64) * rows + row) * tokens
    for token in tl.range(first, last, num_stages=2):  # loads the next token ahead
        h = tl.load(h_row + tl.cast(token, tl.int64) * stride_hs + offs_c, mask=inside, other=0.0).to(tl.float32)
        h_sq, dot = squared_and_dot(h, a)
        term, w, p, q = cosine(dot, h_sq, a_sq, margin)
        tl.store(terms + flat + token, term)
        tl.store(ws + flat + token, w)
        tl.store(ps + flat + token, p)
        dbos += dcos2(w, q, a, h)
    slot = (tl.cast(layer, tl.int64) * tl.num_programs(1) + n) * tl.num_programs(0) + part
    tl.store(dbos_parts + slot * FEATURES + offs_c, dbos, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def decorrelation_backward(
    layers, dlayers,  # tuples of (B, S, C), the second contiguous
    dsums,  # (L,) float32
    starts, spans, ws, ps, dbos_parts, stride_hb, stride_hs, rows, tokens, parts,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pieces, N, L). Sequence n writes its tokens and, packed, the padding up to the next one; the first one
    also the padding before it, so every token is written once."""
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

    offs_c = tl.arange(0, BLOCK_C)
    inside = offs_c < FEATURES
    h_row = select(layers, layer) + tl.cast(row, tl.int64) * stride_hb
    dh_row = select(dlayers, layer) + tl.cast(row, tl.int64) * tokens * FEATURES
    dsum = tl.load(dsums + layer)
    a = tl.load(h_row + tl.cast(start, tl.int64) * stride_hs + offs_c, mask=inside & (span > 1), other=0.0)
    a = a.to(tl.float32)  # [BLOCK_C]
    flat = (tl.cast(layer, tl.int64) * rows + row) * tokens
    for token in range(low, high):
        counted = (token > start) & (token < start + span)
        h = tl.load(h_row + tl.cast(token, tl.int64) * stride_hs + offs_c, mask=inside & counted, other=0.0)
        w = tl.load(ws + flat + token, mask=counted, other=0.0)
        p = tl.load(ps + flat + token, mask=counted, other=0.0)
        # where w is 0 dsum must not matter: it may be infinite
        dh = dcos2(tl.where(w != 0.0, w * dsum, 0.0), p, h.to(tl.float32), a)
        written = inside & ((token != start) | (span <= 1))
        tl.store(dh_row + tl.cast(token, tl.int64) * FEATURES + offs_c, dh, mask=written)
    if (piece == 0) & (span > 1):
        slot = (tl.cast(layer, tl.int64) * sequences + n) * parts
        dbos = tl.zeros((BLOCK_C,), tl.float32)
        for part in range(parts):
            dbos += tl.load(dbos_parts + (slot + part) * FEATURES + offs_c, mask=inside, other=0.0)
        tl.store(dh_row + tl.cast(start, tl.int64) * FEATURES + offs_c, dsum * dbos, mask=inside)


def row_tile(features: int) -> Tile:
    """A program takes one token after the other, a warp 512 of its features (16 a thread).

    No GPU has run this yet: what is known is that these compile without spills for sm_80, sm_90 and sm_100.
    """
    block = max(triton.next_power_of_2(features), 16)
    return Tile({"BLOCK_C": block}, warps=min(max(block // 512, 1), 16), stages=2)


# ---- launchers


def _parts(layers: int, sequences: int, tokens: int, least: int, programs: int) -> int:
    """Into how many parts of at least ``least`` tokens every sequence is cut to make enough programs."""
    wanted = -(-programs // max(layers * sequences, 1))
    return max(min(wanted, tokens // least), 1)


def forward_like(
    layers: Sequence[Tensor], starts: Tensor, spans: Tensor, packed: bool, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w and p are 0 at tokens that do not count."""
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


def forward(
    layers: Sequence[Tensor], starts: Tensor, spans: Tensor, packed: bool, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums (L,), w and p of every token (L, B, S), parts of the gradient of BOS (L, N, P, C)), all float32."""
    _, ws, ps, dbos_parts = forward_like(layers, starts, spans, packed, margin)
    terms = torch.zeros_like(ws)
    launch(
        decorrelation_forward,
        (dbos_parts.shape[2], len(starts), len(layers)),
        row_tile(layers[0].shape[2]),
        **_common(layers, starts, spans, packed),
        terms=terms, ws=ws, ps=ps, dbos_parts=dbos_parts, margin=margin,
    )  # fmt: skip
    return terms.sum(dim=(1, 2)), ws, ps, dbos_parts


def alike(layers: Sequence[Tensor]) -> list[Tensor]:
    """The layers as kernels can read them: of equal strides and adjacent features, in place or else copied."""
    strides, features = layers[0].stride(), layers[0].shape[2]
    if any(layer.stride() != strides for layer in layers) or (strides[2] != 1 and features > 1):
        return [layer.contiguous() for layer in layers]
    return list(layers)


def _common(layers: Sequence[Tensor], starts: Tensor, spans: Tensor, packed: bool) -> dict[str, Any]:
    """The arguments that both kernels have."""
    layers = alike(layers)
    stride_hb, stride_hs, _ = layers[0].stride()
    rows, tokens, features = layers[0].shape
    return {
        "layers": tuple(layers), "starts": starts.contiguous(), "spans": spans.contiguous(),
        "stride_hb": stride_hb, "stride_hs": stride_hs, "rows": rows, "tokens": tokens,
        "FEATURES": features, "PACKED": packed,
    }  # fmt: skip


def backward_like(dsums: Tensor, layers: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty(layer.shape, dtype=layer.dtype, device=layer.device) for layer in layers]


def backward(
    dsums: Tensor,
    layers: Sequence[Tensor],
    starts: Tensor,
    spans: Tensor,
    packed: bool,
    ws: Tensor,
    ps: Tensor,
    dbos_parts: Tensor,
) -> list[Tensor]:
    """L contiguous tensors (B, S, C), exactly 0 at tokens that do not count. dsums: (L,)."""
    dlayers = backward_like(dsums, layers)
    _, tokens, features = layers[0].shape
    length = -(-tokens // max(len(starts), 1)) if packed else tokens
    launch(
        decorrelation_backward,
        # rows are independent here, so pieces cost nothing and may be many
        (_parts(len(layers), len(starts), length, 16, 8 * _PROGRAMS), len(starts), len(layers)),
        row_tile(features),
        **_common(layers, starts, spans, packed),
        dlayers=tuple(dlayers), dsums=dsums.float().contiguous(), ws=ws.contiguous(), ps=ps.contiguous(),
        dbos_parts=dbos_parts.contiguous(), parts=dbos_parts.shape[2],
    )  # fmt: skip
    return dlayers


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
            their strides are equal and their features adjacent, and copied elsewhere; layers of different dtypes are
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
