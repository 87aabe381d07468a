"""Checks of a GPU beyond what is timed: every kernel at a small size, CUDA graphs of attached models, NCCL, and whether
the peers compute the same. ``python -m bench.surroundings [NAME ...]``; ``make gpu`` runs them too.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashsink
from bench import check
from bench.check import DTYPE, STEP_LIMIT, Case, Finding
from bench.runner import rehearsal
from bench.runner.measure import Absent, Runner
from bench.workloads import llm_steps
from bench.workloads.attention import flash_varlen, ours
from bench.workloads.peers import plain_rms_norm
from bench.workloads.shapes import Model, random_llm
from flashsink import dispatch, selfcheck
from flashsink.selfcheck import Kernel

SIZES = Model("check", 4, 2, 64, 256, 3, 512, 1000)
LENGTHS = tuple(rehearsal.cut(n, n // 8) for n in (200, 131, 64))
EXACT = 1e-3  # of a replayed graph and of collectives of one rank, relative to the same steps one by one
NEW = 4  # tokens that are decoded


def kernels(device: torch.device, family: str, size: int) -> Iterator[Finding]:
    """Those of one family; of a failure the first result that is wrong."""
    kernel = Kernel(family, DTYPE, size)
    reason = selfcheck.wrong(dispatch.module("triton"), kernel, device)
    yield Finding(f"{kernel}{reason and ': ' + reason}", float(bool(reason)), 0.0)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


# ---- CUDA graphs


def replayed(label: str, device: torch.device, step: Callable[[], list[Tensor]], change: Callable[[], None]) -> Any:
    """A captured step, replayed after its inputs have changed, against the step itself. On the CPU there is no graph:
    the step runs once more."""
    runner = Runner(None, step)
    runner.warm(device, 2)
    if device.type == "cuda":
        runner.capture()
    change()
    got = check.replayed(runner) if device.type == "cuda" else step()
    got = [x.clone() for x in got]
    for index, (mine, want) in enumerate(zip(got, step(), strict=True)):
        yield Finding(f"{label}, result {index}", relative(mine, want), EXACT)


def packed_graph(device: torch.device) -> Iterator[Finding]:
    """The forward of an attached model over a packed row, and what its keys receive."""
    setting = llm_steps.Setting(SIZES, 3, LENGTHS, True, device, DTYPE)
    llama = llm_steps.build(setting, llm_steps.OURS, {})
    batch, probe = llm_steps.Batch(setting), flashsink.attach(llama)

    @torch.no_grad()
    def step() -> list[Tensor]:
        # with the bounds nobody has to look for the places where positions restart, which would stop the host
        hidden = llama.model(**batch.inputs, cu_seq_lens_q=batch.bounds, use_cache=False).last_hidden_state
        return [hidden, *(stats.received for stats in probe.sinks)]

    def change() -> None:
        batch.embeddings.data.copy_(torch.roll(batch.embeddings.data, 7, dims=1))

    yield from replayed("packed forward", device, step, change)


def decoding_graph(device: torch.device) -> Iterator[Finding]:
    """A step of decoding with a static cache."""
    from transformers import StaticCache

    setting = llm_steps.Setting(SIZES, 3, LENGTHS, False, device, DTYPE)
    llama = random_llm(setting).eval()
    flashsink.attach(llama)
    prompt = torch.randint(3, SIZES.vocabulary, (2, 11), generator=torch.Generator().manual_seed(0)).to(device)
    cache = StaticCache(config=llama.config, max_cache_len=prompt.shape[1] + NEW)
    token, place = prompt[:, -1:].clone(), torch.tensor([[prompt.shape[1]]], device=device)
    with torch.no_grad():
        llama(input_ids=prompt, past_key_values=cache)

    @torch.no_grad()
    def step() -> list[Tensor]:
        for layer in cache.layers:  # the same place every time, however often the step has run
            layer.cumulative_length.copy_(place[0, 0])
        return [llama(input_ids=token, position_ids=place, past_key_values=cache).logits]

    def change() -> None:
        token.add_(1)

    yield from replayed("static cache", device, step, change)


# ---- one rank


def collectives(device: torch.device) -> Iterator[Finding]:
    """A step of an attached model under DistributedDataParallel, NCCL on a GPU, against the step alone."""
    import torch.distributed as dist

    setting = llm_steps.Setting(SIZES, 3, LENGTHS, True, device, DTYPE)
    llama = llm_steps.build(setting, llm_steps.OURS, {})
    batch, probe = llm_steps.Batch(setting), flashsink.attach(llama)

    def gradients(run: Callable[..., Any]) -> dict[str, Tensor]:
        llama.zero_grad()
        with probe.spans(batch.spans):
            loss = run(**batch.inputs, use_cache=False).logits.float().square().mean()
        (loss + probe.decorrelation_loss).backward()
        return {name: p.grad.clone() for name, p in llama.named_parameters() if p.grad is not None}

    alone = gradients(llama)
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        try:
            reduced = gradients(torch.nn.parallel.DistributedDataParallel(llama))
        finally:
            dist.destroy_process_group()
    for name, want in alone.items():
        yield Finding(f"{backend}: {name}", relative(reduced[name], want) if want.any() else 0.0, EXACT)


# ---- peers


def flash_attn(device: torch.device) -> Iterator[Finding]:
    problem = check.attention_problem(128, 3, True, device)
    try:
        theirs: Any = flash_varlen(problem).make()
    except Absent as reason:
        yield Finding(f"flash-attn is absent: {reason}", 0.0, 0.0)
        return
    own: Any = ours(problem, "triton", "captured").make()
    for name, mine, other in zip(check.NAMES, own()[:4], theirs()[:4], strict=False):
        yield Finding(f"flash-attn {name}", relative(mine.detach(), other.detach()), STEP_LIMIT)


def liger(device: torch.device) -> Iterator[Finding]:
    features = rehearsal.cut(3072, 96)
    name, theirs = plain_rms_norm(features, 1e-5, DTYPE, device)
    h = torch.randn(4, 32, features, device=device, dtype=DTYPE, requires_grad=True)
    layout = check.resolve_layout(4, 32, device)
    run = dispatch.implementation("triton", device.type)
    weight = torch.ones(features, device=device, dtype=DTYPE)
    for what, mine, other in zip(
        ("output", "gradient"),
        _forward_and_gradient(lambda x: run.rms_norm(x, weight, 1e-5, layout, None, 0.0).out, h),
        _forward_and_gradient(theirs, h),
        strict=True,
    ):
        yield Finding(f"{name}: {what}", relative(mine, other), STEP_LIMIT)


def _forward_and_gradient(norm: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    out = norm(h)
    return out.detach(), torch.autograd.grad(out, h, out.detach().roll(1, dims=-1))[0]


# ---- all of it

KERNELS: dict[str, Case] = {
    f"kernels-{family}-{size}": functools.partial(kernels, family=family, size=size)
    for family in selfcheck.FAMILIES
    for size in (selfcheck.HEAD_DIMS if family in selfcheck.ATTENTION else selfcheck.FEATURES)[: rehearsal.cut(2, 1)]
}
OTHERS: dict[str, Case] = {
    "graph-packed": packed_graph,
    "graph-decoding": decoding_graph,
    "collectives": collectives,
    "flash-attn": flash_attn,
    "liger": liger,
}

if __name__ == "__main__":
    sys.exit(check.main(KERNELS | OTHERS, __doc__ or ""))
