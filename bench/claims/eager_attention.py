"""Hugging Face's eager attention with its probabilities summed, against ours with statistics: time and memory."""

from __future__ import annotations

import torch

from bench.attention import Problem, eager, ours, usable
from bench.claims import Claim
from bench.harness import Bench, Comparison
from bench.shapes import MODELS

CLAIMS = (
    Claim(
        "eager_attention",
        "eager with attentions / ours with statistics, S >= 512",
        ">= 2",
        ">= 5, memory >= 10x less at S 1,500",
    ),
)


def run(bench: Bench) -> None:
    if not bench.cuda:
        for model, rows, tokens in (("smollm2-135m", 2, 512), ("smollm2-135m", 1, 1024)):
            problem = Problem(MODELS[model], rows, tokens, bench.device, torch.float32)
            for backward in (True, False):
                compare(bench, problem, backward, ">= 2", "")
        return
    for name, rows, tokens in (("llama-3.2-3b", 16, 512), ("llama-3.2-3b", 4, 1500), ("llama-3.2-1b", 4, 1500)):
        problem = Problem(MODELS[name], rows, tokens, bench.device, torch.bfloat16)
        for backward in (True, False):
            compare(bench, problem, backward, ">= 5", ">= 10" if tokens >= 1500 else "")


def compare(bench: Bench, problem: Problem, backward: bool, target: str, memory: str) -> None:
    names = usable("triton", "sdpa") if bench.cuda else ["cpu"]
    how = "captured" if backward else "pass"
    providers = (
        eager(problem, backward=backward),
        *(ours(problem, name, how, backward=backward) for name in names),
    )
    note = "fwd+bwd" if backward else "forward only"
    bench.compare(
        Comparison(
            "eager_attention",
            problem.shape,
            problem.dtype,
            providers,
            upper="peer",
            target=target,
            memory=memory,
            note=note,
        )
    )
