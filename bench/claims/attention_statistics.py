"""Attention forward and backward with statistics, against the same backend without them."""

from __future__ import annotations

import torch

from bench.attention import Problem, ours, usable
from bench.claims import Claim
from bench.harness import Bench, Comparison
from bench.shapes import HEADLINE_TOKENS, MODELS, utterances

CLAIMS = (
    Claim(
        "attention_statistics",
        "attention fwd+bwd with statistics / same backend without",
        "<= 1.25",
        "<= 1.03 captured, <= 1.15 by the pass",
    ),
)


def run(bench: Bench) -> None:
    if not bench.cuda:
        for model, rows, tokens in (("smollm2-135m", 8, 256), ("smollm2-135m", 4, 512), ("llama-3.2-3b", 1, 512)):
            problem = Problem(MODELS[model], rows, tokens, bench.device, torch.float32)
            compare(bench, problem, "cpu", "captured", "<= 1.25")
        return
    packed = tuple(utterances(HEADLINE_TOKENS))
    for name in ("llama-3.2-3b", "llama-3.2-1b", "llama-3.1-8b"):
        problem = Problem(MODELS[name], 1, HEADLINE_TOKENS, bench.device, torch.bfloat16, packed)
        for backend in usable("triton", "sdpa"):
            for graph in (False, True):
                if backend == "triton":
                    compare(bench, problem, backend, "captured", "<= 1.03", graph)
                compare(bench, problem, backend, "pass", "<= 1.15", graph)
    for name, tokens in (("llama-3.2-3b", 1024), ("llama-3.2-1b", 1024), ("llama-3.2-3b", 4096)):
        rows = HEADLINE_TOKENS // tokens
        problem = Problem(MODELS[name], rows, tokens, bench.device, torch.bfloat16)
        for backend in usable("triton", "sdpa"):
            statistics, target = ("captured", "<= 1.03") if backend == "triton" else ("pass", "<= 1.15")
            for graph in (True, False):
                compare(bench, problem, backend, statistics, target, graph)


def compare(bench: Bench, problem: Problem, backend: str, statistics: str, target: str, graph: bool = False) -> None:
    providers = (ours(problem, backend, ours=False), ours(problem, backend, statistics))
    bench.compare(
        Comparison("attention_statistics", problem.shape, problem.dtype, providers, target=target, graph=graph)
    )
