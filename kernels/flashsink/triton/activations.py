"""Largest |h| of every token and the lowest feature that reaches it, for all layers in one Triton launch.

Dimensions: L layers, B rows, S tokens, C features, N sequences (N = B in dense layout).
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
from flashsink.triton.decorrelation import alike, bounds, check_features, row_tile, select
from flashsink.triton.launch import VARYING, launch
from flashsink.types import ActivationStats, Layout


@triton.jit
def ranks(h, offs_c):
    """An integer for every entry of h [BLOCK_C], the largest for the largest |h| and of equal ones for the lowest
    feature. NaN counts as the largest.

    Absolute values are compared as integers: the order is that of the numbers, infinity is above them and NaN, mapped
    to one value, above that. Entries beyond the features are 0 and come last, so they never win.
    """
    bits = h.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(bits > 0x7F800000, 0x7FC00000, bits)
    if h.dtype.primitive_bitwidth == 16:
        return bits | (8191 - offs_c)  # the lower 13 bits are 0 and hold the feature
    else:
        return (bits.to(tl.int64) << 13) | (8191 - offs_c)


@triton.jit
def ranked(rank):
    """(|h|, feature) of a rank."""
    wide: tl.constexpr = rank.dtype.primitive_bitwidth == 64
    bits = (rank >> 13).to(tl.int32) if wide else rank & 0x7FFFE000
    return bits.to(tl.float32, bitcast=True), 8191 - (rank & 8191).to(tl.int32)


@triton.jit
def valid_range(starts, lengths, row, sequences, tokens, PACKED: tl.constexpr):
    """[start, end) of the valid tokens of a row; packed sequences follow each other without a gap."""
    if PACKED:
        start, _ = bounds(starts, lengths, 0, tokens)
        final, count = bounds(starts, lengths, sequences - 1, tokens)
        return start, final + count
    else:
        start, count = bounds(starts, lengths, row, tokens)
        return start, start + count


@triton.jit(do_not_specialize=VARYING)
def activation_max(
    layers,  # a tuple of (B, S, C)
    starts, lengths,  # (N,) int64
    max_abs, feature,  # (L, B, S) float32, int32
    stride_hb, stride_hs, rows, tokens, sequences,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (S, B, L): one program per token; padding is not read."""
    token, row, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = valid_range(starts, lengths, row, sequences, tokens, PACKED)
    valid = (token >= start) & (token < end)
    offs_c = tl.arange(0, BLOCK_C)
    h_row = select(layers, layer) + tl.cast(row, tl.int64) * stride_hb + tl.cast(token, tl.int64) * stride_hs
    h = tl.load(h_row + offs_c, mask=valid & (offs_c < FEATURES), other=0.0)  # [BLOCK_C]
    top, index = ranked(tl.max(ranks(h, offs_c), axis=0))
    flat = (tl.cast(layer, tl.int64) * rows + row) * tokens + token
    tl.store(max_abs + flat, tl.where(valid, top, 0.0))
    tl.store(feature + flat, tl.where(valid, index, -1))


def forward_like(layers: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    shape, device = (len(layers), *layers[0].shape[:2]), layers[0].device
    return (
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )


def forward(layers: Sequence[Tensor], starts: Tensor, lengths: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """(max |h| (L, B, S) float32, its lowest feature (L, B, S) int32), 0 and -1 at padding."""
    max_abs, feature = forward_like(layers)
    layers = alike(layers)
    stride_hb, stride_hs, _ = layers[0].stride()
    rows, tokens, features = layers[0].shape
    launch(
        activation_max,
        (tokens, rows if len(starts) else 0, len(layers)),
        row_tile(features),
        layers=tuple(layers), starts=starts.contiguous(), lengths=lengths.contiguous(), max_abs=max_abs,
        feature=feature, stride_hb=stride_hb, stride_hs=stride_hs, rows=rows, tokens=tokens, sequences=len(starts),
        FEATURES=features, PACKED=packed,
    )  # fmt: skip
    return max_abs, feature


def activation_stats(layers: Sequence[Tensor], layout: Layout, median: bool) -> ActivationStats:
    """:func:`flashsink.reference.activation_stats`; the median is the reference's.

    Args:
        layers: L tensors (B, S, C) of float16, bfloat16 or float32 and C <= 8192, as in
            :func:`flashsink.triton.decorrelation.decorrelation_sums`. float64 is computed by the reference.
        layout: dense rows, or one packed row.
        median: whether to find the medians too.

    Raises:
        ValueError: C is above 8192.
    """
    dtype = functools.reduce(torch.promote_types, (layer.dtype for layer in layers))
    if dtype == torch.float64:
        return reference.activation_stats(layers, layout, median)
    check_features(layers[0].shape[2])
    run = torch.ops.flashsink.triton_activation_max
    max_abs, feature = run([layer.detach().to(dtype) for layer in layers], layout.starts, layout.lengths, layout.packed)
    medians = torch.stack([reference.row_medians(layer, layout) for layer in layers]) if median else None
    return ActivationStats(max_abs, feature, medians)
