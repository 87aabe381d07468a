"""Attention of short sequences as one C++ kernel (csrc/short.cpp): forward, backward and received attention.

Speech at high compression has rows of 20 to 60 tokens. For those the calls around a matrix product cost more than the
product: here a sequence's queries, keys, values and probabilities stay in one core's cache from the load to the store,
in dense and packed rows alike, and padding is never read.
Dimensions: B rows, H query and Hk key heads, S tokens, D head dim, N sequences (N = B in dense layout).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from flashsink.cpu.library import library
from flashsink.operators import adjacent

LONGEST = 256  # tokens of a sequence; up to here measured, and faster than tiles throughout (bench/LOG.md)
WIDEST = 256  # features of a head
_FORWARD, _BACKWARD, _RECEIVED = 0, 1, 2  # enum Task


class How(NamedTuple):
    causal: bool
    scale: float


def serves(q: Tensor, k: Tensor, lengths: Tensor) -> bool:
    """Whether these are sequences for this kernel: short ones, with as many queries as keys."""
    fits = q.shape[2] == k.shape[2] and q.shape[3] <= WIDEST
    return fits and (lengths.numel() == 0 or int(lengths.max()) <= LONGEST)


def forward(
    q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, Tensor], bounds: Tensor, packed: bool, how: How
) -> None:
    """Fills out (B, H, S, D) and lse (B, H, S), ``results``, at the tokens of sequences.

    Args:
        q, k, v: float32 (B, H or Hk, S, D) of any strides.
        results: of any strides.
        bounds: (3, N) int64, start, end and first counted query of every sequence.
        packed: all sequences are in row 0.
        how: causal, and the scale of the scores.
    """
    _run(_FORWARD, (q, k, v, *results), bounds, packed, how)


def backward(
    given: tuple[Tensor, ...], results: tuple[Tensor, Tensor, Tensor], bounds: Tensor, packed: bool, how: How
) -> None:
    """Fills the gradients of q, k and v, ``results``, at the tokens of sequences, from (q, k, v, out, lse, grad)."""
    _run(_BACKWARD, (*given, *results), bounds, packed, how)


def received(q: Tensor, k: Tensor, lse: Tensor, out: Tensor, bounds: Tensor, packed: bool, how: How) -> None:
    """Fills ``out`` (B, H, S) at the tokens of sequences with what their queries from ``bounds[2]`` on give them."""
    _run(_RECEIVED, (q.float(), k.float(), out, out, lse), bounds, packed, how)


def _run(task: int, tensors: tuple[Tensor, ...], bounds: Tensor, packed: bool, how: How) -> None:
    q, k = tensors[:2]
    # results have adjacent features, so ``adjacent`` copies none of them
    tensors = tuple(adjacent(x) if x.dim() == 4 else x for x in tensors)
    if any(x.dtype != torch.float32 for x in tensors):
        raise ValueError(f"expected float32, got {', '.join(str(x.dtype) for x in tensors)}")
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    longest = int((bounds[1] - bounds[0]).max()) if bounds.numel() else 0
    failed = library().flashsink_short_attention(
        task,
        (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors)),
        (ctypes.c_int64 * len(strides))(*strides),
        *(bounds.shape[1], k.shape[1], q.shape[1] // k.shape[1], q.shape[3], max(longest, 0)),
        *(row.data_ptr() for row in bounds),
        *(int(packed), int(how.causal), how.scale, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("flashsink.attention: no memory for the buffers of short sequences")
