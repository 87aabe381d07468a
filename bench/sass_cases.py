"""A decoder layer's calls for the report of machine code: attention of short and long rows, and the norm."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from bench.compile_cases import rms_norm
from bench.compile_report import Case
from flashsink.triton import attention
from flashsink.types import Layout

SHAPES = ((64, 4), (128, 3))  # head dim, query heads to a key head: Llama 3.2 1B and 3B
LENGTHS = {"short": 128, "long": 2048}  # tokens of a sequence


def cases() -> Iterator[Case]:
    for dim, group in SHAPES:
        for packed in (True, False):
            for name, length in LENGTHS.items():
                label = f"D{dim} GQA{group} {'packed' if packed else 'dense'} {name}"
                yield Case(label, functools.partial(layer, dim, group, packed, length))
    for packed in (True, False):
        label = f"norm C3072 {'packed' if packed else 'dense'}"
        yield Case(label, functools.partial(rms_norm, 3072, torch.bfloat16, layout(packed, 128)))


def layout(packed: bool, length: int) -> Layout:
    """Two sequences, or rows, of ``length`` tokens."""
    lengths = torch.full((2,), length)
    if packed:
        return Layout(torch.arange(2) * length, lengths, 1, 2 * length, True)
    return Layout(torch.zeros_like(lengths), lengths, 2, length, False)


def layer(dim: int, group: int, packed: bool, length: int) -> None:
    """Attention of a training step with its statistics, then the statistics pass."""
    where = layout(packed, length)
    q, k, v = (
        torch.zeros(where.rows, where.tokens, heads, dim, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (group, 1, 1)
    )
    out, _ = attention.attention(q, k, v, where, causal=True, scale=0.1, counted=[None])
    out.backward(torch.empty_like(out))
    attention.run_received(q, k, torch.zeros(out.shape[:3]), where, causal=True, scale=0.1)
