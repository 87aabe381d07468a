"""Rows of 1k to 8k tokens: the Triton kernels with capture against torch's sdpa without, every backend by name."""

from __future__ import annotations

import torch

from bench.attention import Problem, ours, sdpa, usable
from bench.claims import Claim
from bench.harness import Bench, Comparison
from bench.shapes import HEADLINE_TOKENS, MODELS

CLAIMS = (
    Claim(
        "long_rows",
        "long rows, Triton with capture / SDPA-flash without",
        "-",
        "<= 1.0 (D 64), <= 1.15 (D 128, deterministic)",
    ),
)


def run(bench: Bench) -> None:
    if not bench.cuda:
        return
    for name, target in (("llama-3.2-1b", "<= 1.0"), ("llama-3.2-3b", "<= 1.15")):
        for tokens in (1024, 2048, 4096, 8192):
            rows = HEADLINE_TOKENS // tokens
            problem = Problem(MODELS[name], rows, tokens, bench.device, torch.bfloat16)
            own = [ours(problem, backend, "captured") for backend in usable("triton")]
            providers = (sdpa(problem, "FLASH_ATTENTION"), *own)
            bench.compare(Comparison("long_rows", problem.shape, problem.dtype, providers, target=target))
    # the other backends of sdpa, as numbers beside it
    for name, tokens in (("llama-3.2-3b", 1024), ("llama-3.2-3b", 4096), ("llama-3.2-1b", 1024)):
        problem = Problem(MODELS[name], HEADLINE_TOKENS // tokens, tokens, bench.device, torch.bfloat16)
        own = [ours(problem, backend, "captured") for backend in usable("triton", "sdpa")]
        peers = [sdpa(problem, backend) for backend in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", None)]
        note = "all backends of sdpa, for comparison"
        bench.compare(Comparison("long_rows", problem.shape, problem.dtype, (*peers, *own), note=note))
    small = Problem(MODELS["llama-3.2-3b"], 2, 1024, bench.device, torch.bfloat16)
    own = [ours(small, backend, "captured") for backend in usable("triton")]
    bench.compare(Comparison("long_rows", small.shape, small.dtype, (sdpa(small, "MATH"), *own), note="MATH, small"))
