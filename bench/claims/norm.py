"""RMSNorm with the loss and the largest activations, forward and backward, against the plain norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.claims import Claim
from bench.runner import rehearsal
from bench.runner.measure import Bench, Comparison, Provider, Step
from bench.workloads.peers import plain_rms_norm
from bench.workloads.shapes import MODELS
from flashsink.dispatch import implementation
from flashsink.types import Layout

CLAIM = Claim("norm", "norm with loss and statistics / Liger's plain norm (CPU: torch's)", "<= 1.15", "<= 1.05")
CLAIMS = (CLAIM,)
EPS = 1e-5
CPU = (
    ("smollm2-135m", 8, 128, torch.float32),
    ("llama-3.2-1b", 4, 512, torch.float32),
    ("llama-3.2-1b", 4, 512, torch.bfloat16),
)


def comparisons(bench: Bench) -> Iterator[Comparison]:
    if not bench.large:
        for model, *size, dtype in CPU:
            yield against_plain(bench.device, (*size, MODELS[model].hidden), dtype, "<= 1.15")
        return
    for model in ("llama-3.2-3b", "llama-3.1-8b", "llama-3.2-1b"):
        size = (rehearsal.cut(32, 2), rehearsal.cut(512, 16), MODELS[model].hidden)
        for graph in (False, True):
            yield against_plain(bench.device, size, torch.bfloat16, "<= 1.05", graph)


def against_plain(
    device: torch.device, size: tuple[int, int, int], dtype: torch.dtype, target: str, graph: bool = False
) -> Comparison:
    """``size``: rows, tokens, features."""
    rows, tokens, hidden = size
    name, norm = plain_rms_norm(hidden, EPS, dtype, device)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        h, gradient = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2))
        return h.requires_grad_(), gradient

    def plain() -> Step:
        h, gradient = inputs()
        return lambda: torch.autograd.grad(norm(h), h, gradient)

    def fused() -> Step:
        h, gradient = inputs()
        weight = torch.ones(hidden, dtype=dtype, device=device)
        starts = torch.zeros(rows, dtype=torch.long, device=device)
        layout = Layout(starts, starts + tokens, rows, tokens, False)
        share = torch.tensor(1e-3, device=device)
        run_norm = implementation(None, device.type).rms_norm

        def step() -> object:
            normed = run_norm(h, weight, EPS, layout, layout.lengths, 0.0)
            assert normed.total is not None
            return torch.autograd.grad((normed.out, normed.total), h, (gradient, share)), normed.max_abs

        return step

    providers = (Provider(name, plain), Provider("flashsink, loss and statistics in the norm", fused, ours=True))
    return Comparison(CLAIM.name, f"B{rows} S{tokens} C{hidden}", dtype, providers, target=target, graph=graph)
