"""Attention forward and backward with statistics, against the same backend without them."""

from __future__ import annotations

from collections.abc import Iterator

from bench.claims import Claim
from bench.runner.measure import Bench, Comparison
from bench.workloads.attention import Problem, comparison, dense, ours, packed, usable

CLAIM = Claim(
    "attention_statistics",
    "attention fwd+bwd with statistics / same backend without",
    "<= 1.25",
    "<= 1.03 captured, <= 1.15 by the pass",
)
CLAIMS = (CLAIM,)
CAPTURED, PASS = ("captured", "<= 1.03"), ("pass", "<= 1.15")


def comparisons(bench: Bench) -> Iterator[Comparison]:
    if not bench.large:
        for model, rows, tokens in (("smollm2-135m", 8, 256), ("smollm2-135m", 4, 512), ("llama-3.2-3b", 1, 512)):
            yield with_and_without(dense(bench, model, tokens, rows), "cpu", "captured", "<= 1.25")
        return
    for model in ("llama-3.2-3b", "llama-3.2-1b", "llama-3.1-8b"):
        for backend in usable("triton", "sdpa"):
            for graph in (False, True):
                for how in (CAPTURED, PASS) if backend == "triton" else (PASS,):
                    yield with_and_without(packed(bench, model), backend, *how, graph)
    for model, tokens in (("llama-3.2-3b", 1024), ("llama-3.2-1b", 1024), ("llama-3.2-3b", 4096)):
        for backend in usable("triton", "sdpa"):
            how = CAPTURED if backend == "triton" else PASS
            for graph in (True, False):
                yield with_and_without(dense(bench, model, tokens), backend, *how, graph)


def with_and_without(problem: Problem, backend: str, statistics: str, target: str, graph: bool = False) -> Comparison:
    providers = (ours(problem, backend, ours=False), ours(problem, backend, statistics))
    return comparison(CLAIM.name, problem, *providers, target=target, graph=graph)
