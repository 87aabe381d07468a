"""Forward only: the sums of all columns beside the plain forward of the same backend."""

from __future__ import annotations

import torch

from bench.attention import Problem, flex, ours, usable
from bench.claims import Claim
from bench.harness import Bench, Comparison
from bench.shapes import HEADLINE_TOKENS, MODELS, utterances

CLAIMS = (
    Claim(
        "forward_statistics",
        "forward-only all-column statistics / plain forward",
        "<= 1.8",
        "<= 1.7 (D 128), 2.0 (D 64)",
    ),
)


def run(bench: Bench) -> None:
    if not bench.cuda:
        for model, rows, tokens in (("smollm2-135m", 8, 256), ("llama-3.2-3b", 1, 512)):
            compare(bench, Problem(MODELS[model], rows, tokens, bench.device, torch.float32), "cpu", "<= 1.8")
        return
    packed = tuple(utterances(HEADLINE_TOKENS))
    for name, target in (("llama-3.2-3b", "<= 1.7"), ("llama-3.2-1b", "<= 2.0")):
        for backend in usable("triton", "sdpa"):
            for tokens in (1024, 4096):
                rows = HEADLINE_TOKENS // tokens
                problem = Problem(MODELS[name], rows, tokens, bench.device, torch.bfloat16)
                for graph in (True, False):
                    compare(bench, problem, backend, target, graph)
            problem = Problem(MODELS[name], 1, HEADLINE_TOKENS, bench.device, torch.bfloat16, packed)
            compare(bench, problem, backend, target)
            compare(bench, problem, backend, target, graph=True)
    rows = HEADLINE_TOKENS // 1024
    problem = Problem(MODELS["llama-3.2-3b"], rows, 1024, bench.device, torch.bfloat16)
    own = [ours(problem, backend, "pass", backward=False) for backend in usable("triton", "sdpa")]
    providers = (flex(problem, statistics=True, backward=False), *own)
    note = "both with statistics; peer / ours"
    bench.compare(Comparison("forward_statistics", problem.shape, problem.dtype, providers, upper="peer", note=note))


def compare(bench: Bench, problem: Problem, backend: str, target: str, graph: bool = False) -> None:
    plain = ours(problem, backend, backward=False, ours=False)
    providers = (plain, ours(problem, backend, "pass", backward=False))
    bench.compare(Comparison("forward_statistics", problem.shape, problem.dtype, providers, target=target, graph=graph))
