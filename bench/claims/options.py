"""What the options of a training change in a whole step: packed rows, label-only logits, checkpointing, compile."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.claims import Claim
from bench.harness import Bench, Comparison, Provider
from bench.shapes import MODELS
from bench.speech_steps import Setting, Variant, demo_rows, make_step, neighbours

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
PLAIN = Variant()
NAME = "packed, label-only logits"


def run(bench: Bench, layers: int = 0) -> None:
    """``layers`` cuts the model; 0 = all of them. On a CPU the demo's batch and model, on a GPU 8,192 tokens, 3B."""
    if bench.cuda:
        model, rows, dtype = MODELS["llama-3.2-3b"], neighbours(8192), torch.bfloat16
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        model, rows, dtype = MODELS["smollm2-135m"], demo_rows(), torch.bfloat16 if fast else torch.float32
    compare(bench, Setting(model, layers or model.layers, rows, bench.device, dtype))


def compare(bench: Bench, setting: Setting) -> None:
    """Every option in turns with what it is to be compared with."""
    shared: dict[str, Any] = {}

    def provider(name: str, variant: Variant, ours: bool = False) -> Provider:
        return Provider(name, functools.partial(make_step, setting, variant, shared), ours)

    def pair(claim: str, peer: Provider, ours: Provider, upper: str, target: str, memory: str) -> None:
        target, memory = (target, memory) if bench.cuda or claim == "step_packed" else ("", "")
        samples = bench.compare(
            Comparison(claim, setting.shape, setting.dtype, (peer, ours), upper, target, memory, flush=False)
        )
        for name, sample in samples.items():
            print(f"{name}: {setting.tokens / sample.median():,.0f} tokens/s")

    plain = provider(NAME, PLAIN)

    def option(words: str, **changes: Any) -> Provider:
        return provider(f"flashsink, {NAME}, {words}", Variant(**changes), True)

    packed = provider(f"flashsink, {NAME}", PLAIN, True)
    reference = provider("padded, logits of all tokens", Variant(packed=False, all_logits=True))
    padded = provider("padded, label-only logits", Variant(packed=False))
    pair("step_packed", reference, packed, "peer", ">= 1.4", "")
    pair("step_padding", padded, packed, "peer", ">= 1", "")
    pair(
        "step_selective",
        plain,
        option("selective checkpointing", checkpointing="selective"),
        "ours",
        "<= 1.15",
        "<= 0.8",
    )
    pair("step_full", plain, option("full checkpointing", checkpointing="true"), "ours", "<= 1.4", "<= 0.5")
    pair("step_chunked", plain, option("chunked cross entropy", cross_entropy="chunked"), "ours", "<= 1.05", "<= 1")
    pair("step_compile", plain, option("compiled", compile=True), "ours", "<= 1", "")
