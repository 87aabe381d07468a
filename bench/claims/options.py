"""What the options of a training change in a whole step: packed rows, label-only logits, checkpointing, compile."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from bench.claims import Claim
from bench.runner.measure import Bench, Comparison, Provider, Sample
from bench.workloads.shapes import MODELS
from bench.workloads.speech_steps import Setting, Variant, demo_rows, make_step, neighbours

CLAIMS = (
    Claim("step_packed", "step, padded with logits of all tokens / packed with label-only logits", ">= 1.4", ">= 1.4"),
    Claim("step_padding", "step, padded / packed, both with label-only logits", "report", ">= 1"),
    Claim(
        "step_selective", "the packed step with selective checkpointing / without", "report", "<= 1.15, memory <= 0.8"
    ),
    Claim("step_full", "the packed step with full checkpointing / without", "report", "<= 1.4, memory <= 0.5"),
    Claim("step_chunked", "the packed step, cross entropy in eighths / at once", "report", "<= 1.05, memory <= 1"),
    Claim("step_compile", "the packed step with compiled MLPs and norms / without", "report", "<= 1"),
)
NAME = "packed, label-only logits"
# peers of the packed step: claim, provider, its variant, target
PEERS = (
    ("step_packed", "padded, logits of all tokens", Variant(packed=False, all_logits=True), ">= 1.4"),
    ("step_padding", "padded, label-only logits", Variant(packed=False), ">= 1"),
)
# options of the packed step: claim, option, its variant, target, target of memory
OPTIONS = (
    ("step_selective", "selective checkpointing", Variant(checkpointing="selective"), "<= 1.15", "<= 0.8"),
    ("step_full", "full checkpointing", Variant(checkpointing="true"), "<= 1.4", "<= 0.5"),
    ("step_chunked", "chunked cross entropy", Variant(cross_entropy="chunked"), "<= 1.05", "<= 1"),
    ("step_compile", "compiled", Variant(compile=True), "<= 1", ""),
)


def comparisons(bench: Bench) -> Iterator[Comparison]:
    """On a CPU the demo's batch and model, on a GPU 8,192 tokens and the 3B model."""
    if bench.large:
        model, rows, dtype = MODELS["llama-3.2-3b"], neighbours(8192), torch.bfloat16
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        model, rows, dtype = MODELS["smollm2-135m"], demo_rows(), torch.bfloat16 if fast else torch.float32
    setting = Setting(model, bench.layers or model.layers, rows, bench.device, dtype)
    shared: dict[str, Any] = {}

    def provider(name: str, variant: Variant, ours: bool = False) -> Provider:
        return Provider(name, functools.partial(make_step, setting, variant, shared), ours)

    def rates(samples: dict[str, Sample]) -> None:
        for name, sample in samples.items():
            print(f"{name}: {setting.tokens / sample.median():,.0f} tokens/s")

    step = functools.partial(Comparison, shape=setting.shape, dtype=setting.dtype, flush=False, after=rates)
    packed = provider(f"flashsink, {NAME}", Variant(), True)
    for claim, name, variant, target in PEERS:
        target = target if bench.large or claim == "step_packed" else ""
        yield step(claim, providers=(provider(name, variant), packed), upper="peer", target=target, memory="")
    for claim, option, variant, target, memory in OPTIONS:
        providers = (provider(NAME, Variant()), provider(f"flashsink, {NAME}, {option}", variant, True))
        target, memory = (target, memory) if bench.large else ("", "")
        yield step(claim, providers=providers, target=target, memory=memory)
