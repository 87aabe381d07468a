"""A training step with loss and statistics against the same step without, a tuned public stack, and the reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.claims import Claim
from bench.runner import rehearsal
from bench.runner.ledger import verdict
from bench.runner.measure import Bench, Comparison, Provider, Sample
from bench.workloads import llm_steps
from bench.workloads.llm_steps import MFU_FORMULA, OURS, REFERENCE, WITHOUT, Setting, Variant
from bench.workloads.shapes import MODELS, utterances

CLAIMS = (
    Claim(
        "step_statistics",
        "training step (3B shapes, LoRA, random weights) with loss and statistics / without both",
        "report",
        "<= 1.02",
    ),
    Claim("step_public", "the same step / tuned public stack", "report", "<= 1.02, MFU >= 45%"),
    Claim("step_reference", "the reference's step / ours", "report", ">= 3 in time, >= 2 in peak memory"),
)
CPU_LAYERS = 10  # of 30, so that the suite ends in minutes
CPU_LENGTHS = (120, 96, 88, 64)
NAME = "flashsink, loss and statistics"
NOTE = "memory beyond what is there before the step: weights, optimizer states and inputs are not counted"


def comparisons(bench: Bench) -> Iterator[Comparison]:
    norm = llm_steps.norm_name(bench.device)
    if bench.large:
        model = MODELS["llama-3.2-3b"]
        layers, lengths = bench.layers or model.layers, tuple(utterances(rehearsal.cut(8192, 24)))
        setting = Setting(model, layers, lengths, True, bench.device, torch.bfloat16)
        # a smaller batch for the reference, whose logits of all tokens would not fit
        short = dataclasses.replace(setting, lengths=tuple(utterances(rehearsal.cut(4096, 12))))
        parts = ["HF", *filter(None, [llm_steps.liger()]), "varlen flash", "packing", "label-only logits", norm]
        public, name = Variant("varlen"), " + ".join(parts)
        targets = ("<= 1.02", "<= 1.02", ">= 3", ">= 2")
    else:
        model, fast = MODELS["smollm2-135m"], torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtype = torch.bfloat16 if fast else torch.float32
        setting = short = Setting(model, bench.layers or CPU_LAYERS, CPU_LENGTHS, False, bench.device, dtype)
        public, name = Variant("sdpa"), f"HF sdpa, label-only logits, {norm}"
        targets = ("", "", "", "")
    shared: dict[str, Tensor] = {}

    def provider(name: str, setting: Setting, variant: Variant, ours: bool = False) -> Provider:
        return Provider(name, functools.partial(llm_steps.make_step, setting, variant, shared), ours)

    ours = provider(NAME, setting, OURS, True)
    plain = provider(f"flashsink attention, without both, {norm}", setting, WITHOUT)
    peer = provider(name, setting, public)
    theirs = provider("reference: eager, padded, all hidden states and logits", short.padded(), REFERENCE)
    step = functools.partial(Comparison, shape=setting.shape, dtype=setting.dtype, flush=False)
    after = functools.partial(utilisation, bench, setting)
    yield step("step_statistics", providers=(plain, ours), target=targets[0], after=after)
    yield step("step_public", providers=(peer, ours), target=targets[1])
    providers = (theirs, provider(NAME, short, OURS, True))
    options = {"upper": "peer", "target": targets[2], "memory": targets[3], "note": NOTE}
    yield step("step_reference", shape=short.shape, providers=providers, **options)


def utilisation(bench: Bench, setting: Setting, samples: dict[str, Sample]) -> None:
    """Prints the rate of our step; reports its share of the device's peak where that is known."""
    if NAME not in samples:
        return
    rate, peak = llm_steps.flops(setting) / samples[NAME].median(), llm_steps.peak_flops(bench.device)
    print(f"{rate / 1e12:.3g} TFLOP/s. {MFU_FORMULA}")
    if math.isnan(peak):
        return
    share, target, note = rate / peak, ">= 0.45", f"peak {peak:.3g} FLOP/s"
    comparison = Comparison("step_public", setting.shape, setting.dtype, metric="MFU", note=note)
    bench.row(comparison, NAME, ratio=f"{share:.4g}", target=target, verdict=verdict(target, share))
