"""FlagAttention's method, a pass of its own for the column sums, against ours."""

from __future__ import annotations

from collections.abc import Callable

import torch

import flashsink
from bench.attention import Problem, ours, provider, usable
from bench.claims import Claim
from bench.harness import Absent, Bench, Comparison, Provider, Step
from bench.peers import AS_SHIPPED, TUNED, total_attention, total_attention_cpu
from bench.shapes import HEADLINE_TOKENS, MODELS
from flashsink.triton.launch import Launch, Tile, observe

CLAIMS = (
    Claim(
        "flag_attention",
        "FlagAttention's method / ours",
        "report",
        ">= 3 as shipped, >= 1.2 tuned",
    ),
)


def run(bench: Bench) -> None:
    if not bench.cuda:
        problem = Problem(MODELS["smollm2-135m"], 4, 512, bench.device, torch.float32)
        theirs = provider("cpu forward, then the sums by blocks of keys", problem, cpu_method, backward=False)
        providers = (theirs, ours(problem, "cpu", "pass", backward=False))
        note = "forward only; the method in PyTorch"
        bench.compare(Comparison("flag_attention", problem.shape, problem.dtype, providers, upper="peer", note=note))
        return
    for name, tokens in (("llama-3.2-3b", 1024), ("llama-3.2-1b", 1024), ("llama-3.2-3b", 4096)):
        problem = Problem(MODELS[name], HEADLINE_TOKENS // tokens, tokens, bench.device, torch.bfloat16)
        own = [own_pass(problem, backend) for backend in usable("triton", "sdpa")]
        shipped = [their_pass(problem, AS_SHIPPED, "as shipped")]
        tuned = [their_pass(problem, tile, "tuned") for tile in TUNED]
        for peers, target in ((shipped, ">= 3"), (tuned, ">= 1.2")):
            bench.compare(
                Comparison(
                    "flag_attention",
                    problem.shape,
                    problem.dtype,
                    (*peers, *own),
                    upper="peer",
                    target=target,
                    note="the pass alone, without the attention before it",
                )
            )


def cpu_method(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)), 0.0, True
    )
    return out.transpose(1, 2), lambda: total_attention_cpu(q, k, lse)


def their_pass(problem: Problem, tile: Tile, how: str) -> Provider:
    blocks = f"{tile.blocks['BLOCK_M']}x{tile.blocks['BLOCK_N']}, {tile.stages} stages, {tile.warps} warps"

    def make() -> Step:
        q, k, v, _ = (x.transpose(1, 2) for x in problem.tensors(False))
        stats = flashsink.attention(q, k, v, return_stats=True, backend=usable("triton", "sdpa", "reference")[0])[1]
        lse = stats.lse
        return lambda: total_attention(q, k, lse, tile)

    return Provider(f"FlagAttention's pass {how} ({blocks})", make)


def own_pass(problem: Problem, backend: str) -> Provider:
    """Only the reading of the statistics is timed; the forward before it is not."""

    def make() -> tuple[Step, Step]:
        # with a gradient on its way: only then is the pass put off until the statistics are read
        q, k, v, _ = (x.transpose(1, 2) for x in problem.tensors(True))
        held: list[flashsink.SinkStats] = []

        def forward() -> None:
            held[:] = [flashsink.attention(q, k, v, return_stats=True, backend=backend)[1]]

        def read() -> torch.Tensor:
            return held[0].received

        forward()
        if not launches(read):
            raise Absent("its statistics are computed in the forward, so that the pass cannot be timed alone")
        return forward, read

    return Provider(f"flashsink {backend}, the pass alone", make, ours=True)


def launches(step: Step) -> int:
    """How many of our kernels ``step`` starts."""
    seen: list[Launch] = []

    def note(launch: Launch) -> bool:
        seen.append(launch)
        return True

    with observe(note):
        step()
    return len(seen)
