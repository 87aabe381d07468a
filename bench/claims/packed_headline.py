"""Packed utterances: our best backend with statistics against the best peer without."""

from __future__ import annotations

import torch

from bench.attention import Problem, flash_varlen, flex, ours, sdpa_apart, torch_varlen, usable
from bench.claims import Claim
from bench.harness import Bench, Comparison
from bench.shapes import HEADLINE_TOKENS, MODELS, utterances

CLAIMS = (
    Claim(
        "packed_headline",
        "packed headline, best backend with statistics / best peer without",
        "report",
        "<= 1.0",
    ),
)


def run(bench: Bench) -> None:
    if not bench.cuda:
        problem = Problem(MODELS["smollm2-135m"], 1, 1024, bench.device, torch.float32, tuple(utterances(1024)))
        apart = (sdpa_apart(problem), ours(problem, "cpu", "captured"))
        bench.compare(Comparison("packed_headline", problem.shape, problem.dtype, apart))
        return
    packed = tuple(utterances(HEADLINE_TOKENS))
    for name in ("llama-3.2-3b", "llama-3.2-1b", "llama-3.1-8b"):
        problem = Problem(MODELS[name], 1, HEADLINE_TOKENS, bench.device, torch.bfloat16, packed)
        for graph in (False, True):
            own = [ours(problem, backend, "captured") for backend in usable("triton", "sdpa")]
            # compiling FlexAttention takes half a minute; once is enough to place it
            once = [flex(problem)] if name == "llama-3.2-3b" and not graph else []
            providers = (torch_varlen(problem), flash_varlen(problem), *once, *own)
            bench.compare(
                Comparison("packed_headline", problem.shape, problem.dtype, providers, target="<= 1.0", graph=graph)
            )
