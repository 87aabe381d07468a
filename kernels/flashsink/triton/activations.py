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
from flashsink.triton.launch import launch
from flashsink.types import ActivationStats, Layout


@triton.jit
def largest(raw, column, features):
    """(max |h|, its lowest column) of raw (C,). NaN has its way: it is the largest, and the first one is found.

    Absolute values are compared as integers: the order is that of the numbers, infinity is above them and NaN, all of
    them one, above that. Columns beyond the features are 0 and come last, so they never win.
    """
    bits = raw.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(bits > 0x7F800000, 0x7FC00000, bits)
    if raw.dtype.primitive_bitwidth == 16:
        # the lower 13 bits are 0 and hold the column: one reduction instead of two
        both = tl.max(bits | (8191 - column), axis=0)
        value = (both & 0x7FFFE000).to(tl.float32, bitcast=True)
        index = 8191 - (both & 8191)
    else:
        top = tl.max(bits, axis=0)
        value = top.to(tl.float32, bitcast=True)
        index = tl.min(tl.where(bits == top, column, features), axis=0)
    return value, index


@triton.jit
def valid_range(starts, lengths, row, sequences, tokens, PACKED: tl.constexpr):
    """[start, end) of the real tokens of a row; packed sequences follow each other without a gap."""
    if PACKED:
        start, _ = bounds(starts, lengths, 0, tokens)
        final, count = bounds(starts, lengths, sequences - 1, tokens)
        return start, final + count
    else:
        start, count = bounds(starts, lengths, row, tokens)
        return start, start + count


@triton.jit
def activation_max(
    layers,  # a tuple of (B, S, C)
    starts, lengths,  # (N,) int64
    max_abs, feature,  # (L, B, S) float32, int32
    row_stride, token_stride, rows, tokens, sequences,
    FEATURES: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (S, B, L), a program for every token; padding is not read."""
    token, row, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = valid_range(starts, lengths, row, sequences, tokens, PACKED)
    valid = (token >= start) & (token < end)
    column = tl.arange(0, BLOCK_C)
    h = select(layers, layer) + tl.cast(row, tl.int64) * row_stride + tl.cast(token, tl.int64) * token_stride
    top, index = largest(tl.load(h + column, mask=valid & (column < FEATURES), other=0.0), column, FEATURES)
    flat = (tl.cast(layer, tl.int64) * rows + row) * tokens + token
    tl.store(max_abs + flat, tl.where(valid, top, 0.0))
    tl.store(feature + flat, tl.where(valid, index, -1))


torch.library.define(
    "flashsink::triton_activation_max",
    "(Tensor[] layers, Tensor starts, Tensor lengths, bool packed) -> (Tensor, Tensor)",
)


@torch.library.register_fake("flashsink::triton_activation_max")
def _max_like(layers: Sequence[Tensor], starts: Tensor, lengths: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    shape, device = (len(layers), *layers[0].shape[:2]), layers[0].device
    return (
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )


def _max(layers: Sequence[Tensor], starts: Tensor, lengths: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """(max |h| (L, B, S) float32, its lowest feature (L, B, S) int32), 0 and -1 at padding."""
    top, feature = _max_like(layers, starts, lengths, packed)
    layers = alike(layers)
    row_stride, token_stride, _ = layers[0].stride()
    rows, tokens, features = layers[0].shape
    launch(
        activation_max,
        (tokens, rows if len(starts) else 0, len(layers)),
        row_tile(features),
        layers=tuple(layers),
        starts=starts.contiguous(),
        lengths=lengths.contiguous(),
        max_abs=top,
        feature=feature,
        row_stride=row_stride,
        token_stride=token_stride,
        rows=rows,
        tokens=tokens,
        FEATURES=features,
        sequences=len(starts),
        PACKED=packed,
    )
    return top, feature


for _device in ("CUDA", "CPU"):  # on the CPU under TRITON_INTERPRET=1
    torch.library.impl("flashsink::triton_activation_max", _device)(_max)


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
    run: Any = torch.ops.flashsink.triton_activation_max
    top, feature = run([layer.detach().to(dtype) for layer in layers], layout.starts, layout.lengths, layout.packed)
    medians = torch.stack([reference.row_medians(layer, layout) for layer in layers]) if median else None
    return ActivationStats(top, feature, medians)
