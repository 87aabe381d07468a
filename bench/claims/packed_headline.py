"""Packed utterances: our best backend with statistics against the best peer without."""

from __future__ import annotations

from collections.abc import Iterator

from bench.claims import Claim
from bench.runner.measure import Bench, Comparison
from bench.workloads.attention import comparison, flash_varlen, flex, ours, packed, sdpa_apart, torch_varlen, usable

CLAIM = Claim(
    "packed_headline", "packed headline, best backend with statistics / best peer without", "report", "<= 1.0"
)
CLAIMS = (CLAIM,)


def comparisons(bench: Bench) -> Iterator[Comparison]:
    if not bench.large:
        problem = packed(bench, "smollm2-135m", 1024)
        yield comparison(CLAIM.name, problem, sdpa_apart(problem), ours(problem, "cpu", "captured"))
        return
    for model in ("llama-3.2-3b", "llama-3.2-1b", "llama-3.1-8b"):
        problem = packed(bench, model)
        for graph in (False, True):
            own = [ours(problem, backend, "captured") for backend in usable("triton", "sdpa")]
            # compiling FlexAttention takes half a minute; once is enough to place it
            once = [flex(problem)] if model == "llama-3.2-3b" and not graph else []
            providers = (torch_varlen(problem), flash_varlen(problem), *once, *own)
            yield comparison(CLAIM.name, problem, *providers, target="<= 1.0", graph=graph)
