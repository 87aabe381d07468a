"""Forward only: the sums of all columns against the plain forward of the same backend."""

from __future__ import annotations

from collections.abc import Iterator

from bench.claims import Claim
from bench.runner.measure import Bench, Comparison
from bench.workloads.attention import Problem, comparison, dense, flex, ours, packed, usable

CLAIM = Claim(
    "forward_statistics",
    "forward-only all-column statistics / plain forward",
    "<= 1.8",
    "<= 1.7 (D 128), 2.0 (D 64)",
)
CLAIMS = (CLAIM,)


def comparisons(bench: Bench) -> Iterator[Comparison]:
    if not bench.large:
        for model, rows, tokens in (("smollm2-135m", 8, 256), ("llama-3.2-3b", 1, 512)):
            yield with_and_without(dense(bench, model, tokens, rows), "cpu", "<= 1.8")
        return
    for model, target in (("llama-3.2-3b", "<= 1.7"), ("llama-3.2-1b", "<= 2.0")):
        for backend in usable("triton", "sdpa"):
            for tokens in (1024, 4096):
                for graph in (True, False):
                    yield with_and_without(dense(bench, model, tokens), backend, target, graph)
            for graph in (False, True):
                yield with_and_without(packed(bench, model), backend, target, graph)
    problem = dense(bench, "llama-3.2-3b", 1024)
    own = [ours(problem, backend, "pass", backward=False) for backend in usable("triton", "sdpa")]
    peer = flex(problem, statistics=True, backward=False)
    yield comparison(CLAIM.name, problem, peer, *own, upper="peer", note="both with statistics; peer / ours")


def with_and_without(problem: Problem, backend: str, target: str, graph: bool = False) -> Comparison:
    plain = ours(problem, backend, backward=False, ours=False)
    own = ours(problem, backend, "pass", backward=False)
    return comparison(CLAIM.name, problem, plain, own, target=target, graph=graph)
