"""FlagAttention's method, a separate pass for the column sums, against ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import flashsink
from bench.claims import Claim
from bench.runner.measure import Absent, Bench, Comparison, Provider, Step
from bench.workloads.attention import Problem, comparison, dense, ours, provider, usable
from bench.workloads.peers import AS_SHIPPED, TUNED, total_attention, total_attention_cpu
from flashsink.triton.launch import Launch, Tile, observe

CLAIM = Claim("flag_attention", "FlagAttention's method / ours", "report", ">= 3 as shipped, >= 1.2 tuned")
CLAIMS = (CLAIM,)


def comparisons(bench: Bench) -> Iterator[Comparison]:
    if not bench.large:
        problem = dense(bench, "smollm2-135m", 512, rows=4)
        name = "cpu forward, then the sums by blocks of keys"
        theirs = provider(name, problem, lambda: cpu_method, backward=False)
        own = ours(problem, "cpu", "pass", backward=False)
        note = "forward only; the method in PyTorch"
        yield comparison(CLAIM.name, problem, theirs, own, upper="peer", note=note)
        return
    for model, tokens in (("llama-3.2-3b", 1024), ("llama-3.2-1b", 1024), ("llama-3.2-3b", 4096)):
        problem = dense(bench, model, tokens)
        own = [own_pass(problem, backend) for backend in usable("triton", "sdpa")]
        shipped = [their_pass(problem, AS_SHIPPED, "as shipped")]
        tuned = [their_pass(problem, tile, "tuned") for tile in TUNED]
        note = "the pass alone, without the attention before it"
        for peers, target in ((shipped, ">= 3"), (tuned, ">= 1.2")):
            yield comparison(CLAIM.name, problem, *peers, *own, upper="peer", target=target, note=note)


def cpu_method(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
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
    """Only reading the statistics is timed, not the forward before it."""

    def make() -> tuple[Step, Step]:
        # with gradients enabled: only then is the pass deferred until the statistics are read
        q, k, v, _ = (x.transpose(1, 2) for x in problem.tensors(True))
        held: list[flashsink.SinkStats] = []

        def forward() -> None:
            held[:] = [flashsink.attention(q, k, v, return_stats=True, backend=backend)[1]]

        def read() -> Tensor:
            return held[0].received

        forward()
        seen: list[Launch] = []
        with observe(lambda launch: seen.append(launch) or True):
            read()
        if not seen:
            raise Absent("its statistics are computed in the forward, so that the pass cannot be timed alone")
        return forward, read

    return Provider(f"flashsink {backend}, the pass alone", make, ours=True)
