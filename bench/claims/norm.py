"""RMSNorm with the loss and the largest activations, forward and backward, against the plain norm."""

from __future__ import annotations

import torch

from bench.claims import Claim
from bench.harness import Bench, Comparison, Provider, Step
from bench.peers import plain_rms_norm
from bench.shapes import MODELS
from flashsink.dispatch import implementation
from flashsink.types import Layout

CLAIMS = (Claim("norm", "norm with loss and statistics / Liger's plain norm (CPU: torch's)", "<= 1.15", "<= 1.05"),)
EPS = 1e-5


def run(bench: Bench) -> None:
    if not bench.cuda:
        for name, rows, tokens, dtype in (
            ("smollm2-135m", 8, 128, torch.float32),
            ("llama-3.2-1b", 4, 512, torch.float32),
            ("llama-3.2-1b", 4, 512, torch.bfloat16),
        ):
            compare(bench, MODELS[name].hidden, rows, tokens, dtype, "<= 1.15")
        return
    for name, rows, tokens in (("llama-3.2-3b", 32, 512), ("llama-3.1-8b", 32, 512), ("llama-3.2-1b", 32, 512)):
        for graph in (False, True):
            compare(bench, MODELS[name].hidden, rows, tokens, torch.bfloat16, "<= 1.05", graph)


def compare(
    bench: Bench, hidden: int, rows: int, tokens: int, dtype: torch.dtype, target: str, graph: bool = False
) -> None:
    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(bench.device).manual_seed(0)
        size, options = (rows, tokens, hidden), {"device": bench.device, "dtype": dtype}
        h, gradient = (torch.randn(size, generator=generator, **options) for _ in range(2))
        return h.requires_grad_(), gradient

    name, norm = plain_rms_norm(hidden, EPS, dtype, bench.device)

    def plain() -> Step:
        h, gradient = inputs()
        return lambda: torch.autograd.grad(norm(h), h, gradient)

    def fused() -> Step:
        h, gradient = inputs()
        weight = torch.ones(hidden, dtype=dtype, device=bench.device)
        starts = torch.zeros(rows, dtype=torch.long, device=bench.device)
        layout = Layout(starts, starts + tokens, rows, tokens, False)
        share = torch.tensor(1e-3, device=bench.device)
        run_norm = implementation(None, bench.device.type).rms_norm

        def step() -> object:
            normed = run_norm(h, weight, EPS, layout, layout.lengths, 0.0)
            assert normed.total is not None
            return torch.autograd.grad((normed.out, normed.total), h, (gradient, share)), normed.max_abs

        return step

    providers = (Provider(name, plain), Provider("flashsink, loss and statistics in the norm", fused, ours=True))
    shape = f"B{rows} S{tokens} C{hidden}"
    bench.compare(Comparison("norm", shape, dtype, providers, target=target, graph=graph))
