"""The decorrelation loss forward and backward: the reference's code, eager and compiled, against our kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashsink
from bench.claims import Claim
from bench.harness import Bench, Comparison, Provider, Step
from bench.peers import reference_decorrelation
from bench.shapes import MODELS

CLAIMS = (
    Claim(
        "decorrelation_eager",
        "eager decorrelation fwd+bwd / standalone kernel",
        ">= 3 in cache, >= 4 from DRAM",
        ">= 5, and >= 85% of measured copy bandwidth on counted bytes",
    ),
    Claim("decorrelation_compiled", "compiled decorrelation / standalone kernel", ">= 1.5", ">= 2"),
)


def run(bench: Bench) -> None:
    if not bench.cuda:
        small, large = (4, 4, 128, 576), (15, 4, 512, 2048)
        for dtype in (torch.float32, torch.bfloat16):
            compare(bench, "decorrelation_eager", small, dtype, "eager", ">= 3", "in cache")
        compare(bench, "decorrelation_eager", large, torch.float32, "eager", ">= 4", "from DRAM")
        compare(bench, "decorrelation_compiled", small, torch.float32, "compiled", ">= 1.5", "in cache")
        return
    for name, tokens in (("llama-3.2-3b", 4096), ("llama-3.2-3b", 16384), ("llama-3.1-8b", 4096)):
        model = MODELS[name]
        # as many rows of 512 as there are tokens; half the layers, so that eager fits beside the others
        shape = (min(model.layers - 1, 15), tokens // 512, 512, model.hidden)
        for graph in (False, True):
            compare(bench, "decorrelation_eager", shape, torch.bfloat16, "eager", ">= 5", graph=graph)
        copy_bandwidth(bench, shape)
    compare(bench, "decorrelation_compiled", (15, 8, 512, 3072), torch.bfloat16, "compiled", ">= 2")


def states(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
    return [torch.randn(shape[1:], **options).requires_grad_() for _ in range(shape[0])]


def label(shape: tuple[int, ...]) -> str:
    return "L{} B{} S{} C{}".format(*shape)


def provider(
    name: str,
    make_loss: Callable[[list[Tensor]], Callable[[list[Tensor]], Tensor]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    ours: bool = False,
) -> Provider:
    def make() -> Step:
        layers = states(shape, dtype, device)
        loss = make_loss(layers)
        return lambda: torch.autograd.grad(loss(layers), layers)

    return Provider(name, make, ours)


def flashsink_loss(layers: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
    spans = torch.full((layers[0].shape[0],), layers[0].shape[1], device=layers[0].device)
    return lambda given: flashsink.decorrelation_loss(given, spans)


def compare(
    bench: Bench,
    claim: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    peer: str,
    target: str,
    note: str = "",
    graph: bool = False,
) -> None:
    def their(layers: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
        return reference_decorrelation if peer == "eager" else torch.compile(reference_decorrelation, dynamic=False)

    providers = (
        provider(f"reference loss, {peer}", their, shape, dtype, bench.device),
        provider("flashsink", flashsink_loss, shape, dtype, bench.device, ours=True),
    )
    memory = "" if peer == "eager" else None
    bench.compare(Comparison(claim, label(shape), dtype, providers, "peer", target, memory, graph=graph, note=note))


def copy_bandwidth(bench: Bench, shape: tuple[int, ...]) -> None:
    """Counted bytes: the forward reads every state once, the backward reads it and writes its gradient: three
    times the states, where a copy moves them twice. The faster of two copies counts."""

    def make() -> Step:
        layers = [layer.detach() for layer in states(shape, torch.bfloat16, bench.device)]
        targets = [torch.empty_like(layer) for layer in layers]
        return lambda: torch._foreach_copy_(targets, layers)

    def make_flat() -> Step:
        source = torch.zeros(math.prod(shape), dtype=torch.bfloat16, device=bench.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    providers = (
        Provider("device copy of the states", make),
        Provider("one flat copy of as many bytes", make_flat),
        provider("flashsink", flashsink_loss, shape, torch.bfloat16, bench.device, ours=True),
    )
    bench.compare(
        Comparison(
            "decorrelation_eager",
            label(shape),
            torch.bfloat16,
            providers,
            upper="peer",
            target=">= 0.85",
            metric="bandwidth",
            factor=1.5,
            note="bytes a second / those of a copy",
        )
    )
