"""Every configuration that flashsink's launchers choose, as cases of the compile report.

Shapes are small, since nothing runs, but with the properties of real ones: sizes divisible by 16, unit last strides,
tokens before heads in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.compile_report import Case
from flashsink.triton import activations, attention, decorrelation, norm
from flashsink.types import Layout

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
FEATURES = (576, 2048, 3072, 4096)  # SmolLM2, Llama 3.2 1B and 3B, 3.1 8B
MATRIX = ("forward_kernel", "gradient_kv_kernel", "gradient_q_kernel", "received_kernel")
TOKENS, ROWS, GROUP = 256, 2, 4
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def cases() -> Iterator[Case]:
    yield from attention_cases()
    for name, call in (("decorrelation", loss), ("norm", rms_norm), ("activations", statistics)):
        for features in FEATURES:
            yield hidden_case(name, call, features, torch.bfloat16, False)
        yield hidden_case(name, call, 3072, torch.bfloat16, True)
        yield hidden_case(name, call, 3072, torch.float32, False)


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
        where = layout(False)
        q, k, v = (x.detach() for x in projections(dim, dtype, where.rows))
        sinks = torch.zeros(q.shape[0], q.shape[1], TOKENS, dtype=torch.bool)
        attention.calibrated_attention(q, k, v, sinks, where, beta=0.4, scale=0.1)

    return Case(f"calibrated attention D{dim} {SHORT[dtype]}", call)


def projections(dim: int, dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
    """q, k, v (B, heads, S, D), laid out as a decoder's projections leave them."""
    made = [torch.zeros(rows, TOKENS, heads, dim, dtype=dtype).transpose(1, 2) for heads in (2 * GROUP, 2, 2)]
    return tuple(x.requires_grad_() for x in made)


# ---- hidden states


def hidden_case(
    name: str, call: Callable[[int, torch.dtype, Layout], None], features: int, dtype: torch.dtype, packed: bool
) -> Case:
    label = f"{name} C{features} {SHORT[dtype]} {'packed' if packed else 'dense'}"
    return Case(label, lambda: call(features, dtype, layout(packed)))


def states(features: int, dtype: torch.dtype, where: Layout, layers: int) -> list[Tensor]:
    size = (where.rows, TOKENS, features)
    return [torch.zeros(size, dtype=dtype).requires_grad_() for _ in range(layers)]


def loss(features: int, dtype: torch.dtype, where: Layout) -> None:
    decorrelation.decorrelation_sums(states(features, dtype, where, 3), where.lengths, where, 0.0).sum().backward()


def rms_norm(features: int, dtype: torch.dtype, where: Layout) -> None:
    """With the loss and without it; weight frozen and not."""
    h = states(features, dtype, where, 1)[0]
    for trained, spans in ((False, where.lengths), (True, None)):
        weight = torch.ones(features, dtype=dtype, requires_grad=trained)
        normed = norm.rms_norm(h, weight, 1e-5, where, spans, 0.0)
        total = normed.out.sum() if normed.total is None else normed.out.sum() + normed.total
        total.backward()


def statistics(features: int, dtype: torch.dtype, where: Layout) -> None:
    activations.activation_stats(states(features, dtype, where, 3), where, False)
