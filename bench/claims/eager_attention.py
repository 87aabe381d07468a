"""Hugging Face's eager attention with its probabilities summed, against ours with statistics: time and memory."""

from __future__ import annotations

from collections.abc import Iterator

from bench.claims import Claim
from bench.runner.measure import Bench, Comparison
from bench.workloads.attention import comparison, dense, eager, ours, usable

CLAIM = Claim(
    "eager_attention",
    "eager with attentions / ours with statistics, S >= 512",
    ">= 2",
    ">= 5, memory >= 10x less at S 1,500",
)
CLAIMS = (CLAIM,)
CPU = (("smollm2-135m", 2, 512), ("smollm2-135m", 1, 1024))
GPU = (("llama-3.2-3b", 16, 512), ("llama-3.2-3b", 4, 1500), ("llama-3.2-1b", 4, 1500))


def comparisons(bench: Bench) -> Iterator[Comparison]:
    backends = usable("triton", "sdpa") if bench.large else ["cpu"]
    for model, rows, tokens in GPU if bench.large else CPU:
        problem = dense(bench, model, tokens, rows)
        for backward, how, note in ((True, "captured", "fwd+bwd"), (False, "pass", "forward only")):
            yield comparison(
                CLAIM.name,
                problem,
                eager(problem, backward=backward),
                *(ours(problem, backend, how, backward=backward) for backend in backends),
                upper="peer",
                target=">= 5" if bench.large else ">= 2",
                memory=">= 10" if tokens == 1500 else "",
                note=note,
            )
