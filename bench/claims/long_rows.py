"""Rows of 1k to 8k tokens: the Triton kernels with capture against torch's sdpa without, every backend by name."""

from __future__ import annotations

from collections.abc import Iterator

from bench.claims import Claim
from bench.runner.measure import Bench, Comparison
from bench.workloads.attention import comparison, dense, ours, sdpa, usable

CLAIM = Claim(
    "long_rows",
    "long rows, Triton with capture / SDPA-flash without",
    "-",
    "<= 1.0 (D 64), <= 1.15 (D 128, deterministic)",
)
CLAIMS = (CLAIM,)


def comparisons(bench: Bench) -> Iterator[Comparison]:
    if not bench.large:
        return
    for model, target in (("llama-3.2-1b", "<= 1.0"), ("llama-3.2-3b", "<= 1.15")):
        for tokens in (1024, 2048, 4096, 8192):
            problem = dense(bench, model, tokens)
            own = [ours(problem, backend, "captured") for backend in usable("triton")]
            yield comparison(CLAIM.name, problem, sdpa(problem, "FLASH_ATTENTION"), *own, target=target)
    # the other backends of sdpa, without a target
    for model, tokens in (("llama-3.2-3b", 1024), ("llama-3.2-3b", 4096), ("llama-3.2-1b", 1024)):
        problem = dense(bench, model, tokens)
        own = [ours(problem, backend, "captured") for backend in usable("triton", "sdpa")]
        peers = [sdpa(problem, backend) for backend in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", None)]
        yield comparison(CLAIM.name, problem, *peers, *own, note="all backends of sdpa, for comparison")
    small = dense(bench, "llama-3.2-3b", 1024, rows=2)
    own = [ours(small, backend, "captured") for backend in usable("triton")]
    yield comparison(CLAIM.name, small, sdpa(small, "MATH"), *own, note="MATH, small")
