"""Every configuration that flashsink's launchers choose, as calls for the compile report.

Shapes are small, since nothing runs, but of the same kind as real ones: sizes divisible by 16, unit last strides,
tokens before heads in memory. A module that is not there yet is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.compile_report import Case
from flashsink.types import Layout

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
FEATURES = (576, 2048, 3072, 4096)  # SmolLM2, Llama 3.2 1B and 3B, 3.1 8B
MATRIX = ("forward_kernel", "gradient_kv_kernel", "gradient_q_kernel", "received_kernel")
TOKENS, ROWS, GROUP = 256, 2, 4
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def cases() -> Iterator[Case]:
    if _there("flashsink.triton.attention"):
        yield from attention_cases()
    if _there("flashsink.triton.decorrelation"):
        yield from hidden_cases("decorrelation", decorrelation)
    if _there("flashsink.triton.norm"):
        yield from hidden_cases("norm", norm)
    if _there("flashsink.triton.activations"):
        yield from hidden_cases("activations", activations)


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def layout(packed: bool) -> Layout:
    if packed:
        starts = torch.arange(ROWS) * (TOKENS // ROWS)
        return Layout(starts, torch.full((ROWS,), TOKENS // ROWS), 1, TOKENS, True)
    return Layout(torch.zeros(ROWS, dtype=torch.long), torch.full((ROWS,), TOKENS), ROWS, TOKENS, False)


# ---- attention


def attention_cases() -> Iterator[Case]:
    """All head dims in bf16; the other dtypes and the packed layout where the table of tiles has other entries."""
    for dim in HEAD_DIMS:
        yield attention_case(dim, torch.bfloat16)
    for dim in (64, 128):
        yield attention_case(dim, torch.bfloat16, packed=True)
        yield attention_case(dim, torch.bfloat16, options=True)
    yield attention_case(128, torch.float16)
    for dim in (64, 128):
        yield attention_case(dim, torch.float32)
    for dim, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32)):
        yield calibrated_case(dim, dtype)


def attention_case(dim: int, dtype: torch.dtype, packed: bool = False, options: bool = False) -> Case:
    """Forward, statistics pass and backward with capture; with ``options`` a sink logit, counted queries and
    no capture."""
    name = f"attention D{dim} {SHORT[dtype]} {'packed' if packed else 'dense'}{' options' if options else ''}"

    def call() -> None:
        attention: Any = importlib.import_module("flashsink.triton.attention")
        where = layout(packed)
        q, k, v = projections(dim, dtype, where.rows)
        extra = {"sink_logits": torch.zeros(q.shape[1], requires_grad=True)} if options else {}
        counted = [where.starts + 1 if options else None]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                asked = [] if options and grad else counted
                out, _ = attention.attention(q, k, v, where, causal=True, scale=0.1, counted=asked, **extra)
            if grad:
                out.backward(torch.zeros_like(out))

    return Case(name, call, MATRIX if dtype != torch.float32 else ())


def calibrated_case(dim: int, dtype: torch.dtype) -> Case:
    def call() -> None:
        attention: Any = importlib.import_module("flashsink.triton.attention")
        where = layout(False)
        q, k, v = (x.detach() for x in projections(dim, dtype, where.rows))
        sinks = torch.zeros(q.shape[0], q.shape[1], TOKENS, dtype=torch.bool)
        attention.calibrated_attention(q, k, v, sinks, where, beta=0.4, scale=0.1)

    return Case(f"calibrated attention D{dim} {SHORT[dtype]}", call)


def projections(dim: int, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, heads, S, D) as the projections of a decoder leave them."""
    made = [torch.zeros(rows, TOKENS, heads, dim, dtype=dtype).transpose(1, 2) for heads in (2 * GROUP, 2, 2)]
    return tuple(x.requires_grad_() for x in made)  # type: ignore[return-value]


# ---- hidden states


def hidden_cases(name: str, call: Callable[[int, torch.dtype, bool], None]) -> Iterator[Case]:
    for features in FEATURES:
        yield hidden_case(name, call, features, torch.bfloat16, False)
    yield hidden_case(name, call, 3072, torch.bfloat16, True)
    yield hidden_case(name, call, 3072, torch.float32, False)


def hidden_case(
    name: str, call: Callable[[int, torch.dtype, bool], None], features: int, dtype: torch.dtype, packed: bool
) -> Case:
    label = f"{name} C{features} {SHORT[dtype]} {'packed' if packed else 'dense'}"
    return Case(label, lambda: call(features, dtype, packed))


def states(features: int, dtype: torch.dtype, where: Layout, layers: int) -> list[Tensor]:
    size = (where.rows, TOKENS, features)
    return [torch.zeros(size, dtype=dtype).requires_grad_() for _ in range(layers)]


def decorrelation(features: int, dtype: torch.dtype, packed: bool) -> None:
    module: Any = importlib.import_module("flashsink.triton.decorrelation")
    where = layout(packed)
    module.decorrelation_sums(states(features, dtype, where, 3), where.lengths, where, 0.0).sum().backward()


def norm(features: int, dtype: torch.dtype, packed: bool) -> None:
    """With the loss and without it; weight frozen and not."""
    module: Any = importlib.import_module("flashsink.triton.norm")
    where = layout(packed)
    h = states(features, dtype, where, 1)[0]
    for trained, spans in ((False, where.lengths), (True, None)):
        weight = torch.ones(features, dtype=dtype, requires_grad=trained)
        normed = module.rms_norm(h, weight, 1e-5, where, spans, 0.0)
        total = normed.out.sum() if normed.total is None else normed.out.sum() + normed.total
        total.backward()


def activations(features: int, dtype: torch.dtype, packed: bool) -> None:
    module: Any = importlib.import_module("flashsink.triton.activations")
    where = layout(packed)
    module.activation_stats(states(features, dtype, where, 3), where, False)
