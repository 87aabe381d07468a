"""The decorrelation loss forward and backward: the reference's code, eager and compiled, against our kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import flashsink
from bench.claims import Claim
from bench.runner import rehearsal
from bench.runner.measure import Bench, Comparison, Provider, Step
from bench.workloads.peers import reference_decorrelation
from bench.workloads.shapes import MODELS

EAGER, COMPILED = "decorrelation_eager", "decorrelation_compiled"
CLAIMS = (
    Claim(
        EAGER,
        "eager decorrelation fwd+bwd / standalone kernel",
        ">= 3 in cache, >= 4 from DRAM",
        ">= 5, and >= 85% of measured copy bandwidth on counted bytes",
    ),
    Claim(COMPILED, "compiled decorrelation / standalone kernel", ">= 1.5", ">= 2"),
)
Shape = tuple[int, int, int, int]  # layers, rows, tokens, features


def comparisons(bench: Bench) -> Iterator[Comparison]:
    if not bench.large:
        small, large = (4, 4, 128, 576), (15, 4, 512, 2048)
        yield against(EAGER, small, torch.float32, bench, ">= 3", "in cache")
        yield against(EAGER, small, torch.bfloat16, bench, ">= 3", "in cache")
        yield against(EAGER, large, torch.float32, bench, ">= 4", "from DRAM")
        yield against(COMPILED, small, torch.float32, bench, ">= 1.5", "in cache")
        return
    for model, tokens in (("llama-3.2-3b", 4096), ("llama-3.2-3b", 16384), ("llama-3.1-8b", 4096)):
        # rows of 512 tokens; half of the layers, so that eager fits in memory as well
        rows, length = rehearsal.cut(tokens // 512, 2), rehearsal.cut(512, 16)
        shape = (min(MODELS[model].layers - 1, 15), rows, length, MODELS[model].hidden)
        for graph in (False, True):
            yield against(EAGER, shape, torch.bfloat16, bench, ">= 5", graph=graph)
        yield copy_bandwidth(shape, bench.device)
    compiled = (rehearsal.cut(15, 2), rehearsal.cut(8, 2), rehearsal.cut(512, 16), MODELS["llama-3.2-3b"].hidden)
    yield against(COMPILED, compiled, torch.bfloat16, bench, ">= 2")


def against(
    claim: str, shape: Shape, dtype: torch.dtype, bench: Bench, target: str, note: str = "", graph: bool = False
) -> Comparison:
    def reference() -> Callable[[Sequence[Tensor]], Tensor]:
        return reference_decorrelation if claim == EAGER else torch.compile(reference_decorrelation, dynamic=False)

    name = f"reference loss, {'eager' if claim == EAGER else 'compiled'}"
    providers = (loss_step(name, reference, shape, dtype, bench.device), our_step(shape, dtype, bench.device))
    memory = "" if claim == EAGER else None
    return Comparison(claim, label(shape), dtype, providers, "peer", target, memory, graph=graph, note=note)


def copy_bandwidth(shape: Shape, device: torch.device) -> Comparison:
    """Counted bytes: the forward reads every state once, the backward reads it and writes its gradient, three times
    the states in all; a copy moves them twice. The faster of two copies counts."""

    def make() -> Step:
        layers = [layer.detach() for layer in states(shape, torch.bfloat16, device)]
        targets = [torch.empty_like(layer) for layer in layers]
        return lambda: torch._foreach_copy_(targets, layers)

    def make_flat() -> Step:
        source = torch.zeros(math.prod(shape), dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    providers = (
        Provider("device copy of the states", make),
        Provider("one flat copy of as many bytes", make_flat),
        our_step(shape, torch.bfloat16, device),
    )
    options: dict[str, Any] = {"metric": "bandwidth", "factor": 1.5, "note": "bytes a second / those of a copy"}
    return Comparison(EAGER, label(shape), torch.bfloat16, providers, "peer", ">= 0.85", **options)


def loss_step(
    name: str,
    make_loss: Callable[[], Callable[[Sequence[Tensor]], Tensor]],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    ours: bool = False,
) -> Provider:
    """Forward and backward of a loss of all layers."""

    def make() -> Step:
        layers, loss = states(shape, dtype, device), make_loss()
        return lambda: torch.autograd.grad(loss(layers), layers)

    return Provider(name, make, ours)


def our_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> Provider:
    def make_loss() -> Callable[[Sequence[Tensor]], Tensor]:
        spans = torch.full((shape[1],), shape[2], device=device)
        return lambda layers: flashsink.decorrelation_loss(layers, spans)

    return loss_step("flashsink", make_loss, shape, dtype, device, ours=True)


def states(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """One tensor (rows, tokens, features) per layer."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
    return [torch.randn(shape[1:], **options).requires_grad_() for _ in range(shape[0])]


def label(shape: Shape) -> str:
    return "L{} B{} S{} C{}".format(*shape)
