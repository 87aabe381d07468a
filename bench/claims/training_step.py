"""One training step with loss and statistics against the same step without, a tuned public stack, and the
reference's way."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from bench import steps
from bench.claims import Claim
from bench.harness import Bench, Comparison, Provider, Sample
from bench.ledger import verdict
from bench.shapes import MODELS, utterances
from bench.steps import MFU_FORMULA, OURS, REFERENCE, WITHOUT, Setting, Variant

CLAIMS = (
    Claim(
        "step_statistics",
        "training step (3B shapes, LoRA, random weights) with loss and statistics / without both",
        "report",
        "<= 1.02",
    ),
    Claim("step_public", "the same step / tuned public stack", "report", "<= 1.02, MFU >= 45%"),
    Claim(
        "step_reference",
        "the reference's step / ours",
        "report",
        ">= 3 in time, >= 2 in peak memory",
    ),
)

CPU_LAYERS = 10  # of 30, so that the suite ends in minutes


def run(bench: Bench, layers: int = 0) -> None:
    """``layers`` cuts the model; 0 = all of them (a CPU: CPU_LAYERS)."""
    if not bench.cuda:
        model, lengths, fast = MODELS["smollm2-135m"], (120, 96, 88, 64), torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtype = torch.bfloat16 if fast else torch.float32
        setting = Setting(model, layers or CPU_LAYERS, lengths, False, bench.device, dtype)
        name = f"HF sdpa, label-only logits, {steps.norm_name(bench.device)}"
        three(bench, setting, Variant("sdpa"), name, ("", "", ""), None)
        return
    model = MODELS["llama-3.2-3b"]
    public = Variant("varlen")
    parts = ["HF", *filter(None, [steps.liger()]), "varlen flash", "packing", "label-only logits"]
    name = " + ".join([*parts, steps.norm_name(bench.device)])
    setting = Setting(model, layers or model.layers, tuple(utterances(8192)), True, bench.device, torch.bfloat16)
    short = dataclasses.replace(setting, lengths=tuple(utterances(4096)))
    three(bench, setting, public, name, ("<= 1.02", "<= 1.02", ">= 3"), ">= 2", short)


def three(
    bench: Bench,
    setting: Setting,
    public: Variant,
    public_name: str,
    targets: tuple[str, str, str],
    memory: str | None,
    short: Setting | None = None,
) -> None:
    """``short``: a smaller batch for the reference, whose logits of all tokens would not fit."""
    shared: dict[str, Tensor] = {}
    ours = provider("flashsink, loss and statistics", setting, OURS, shared, True)
    without = f"flashsink attention, without both, {steps.norm_name(bench.device)}"
    plain = provider(without, setting, WITHOUT, shared)
    peer = provider(public_name, setting, public, shared)
    dtype, shape = setting.dtype, setting.shape
    samples = bench.compare(Comparison("step_statistics", shape, dtype, (plain, ours), "ours", targets[0], flush=False))
    utilisation(bench, setting, samples.get(ours.name))
    bench.compare(Comparison("step_public", shape, dtype, (peer, ours), "ours", targets[1], flush=False))
    small = short or setting
    ours = provider("flashsink, loss and statistics", small, OURS, shared, True)
    theirs = provider("reference: eager, padded, all hidden states and logits", small.padded(), REFERENCE, shared)
    # on a CPU the number alone
    memory = "" if memory is None else memory
    note = "memory beyond what is there before the step: weights, optimizer states and inputs are not counted"
    providers = (theirs, ours)
    bench.compare(
        Comparison("step_reference", small.shape, dtype, providers, "peer", targets[2], memory, flush=False, note=note)
    )


def provider(name: str, setting: Setting, variant: Variant, shared: dict[str, Tensor], ours: bool = False) -> Provider:
    return Provider(name, lambda: steps.make_step(setting, variant, shared), ours)


def utilisation(bench: Bench, setting: Setting, sample: Sample | None) -> None:
    """A row with the share of the device's peak; on a device without a known peak it is not printed."""
    peak = steps.peak_flops(bench.device)
    if sample is None:
        return
    rate = steps.flops(setting) / sample.median()
    print(f"{rate / 1e12:.3g} TFLOP/s. {MFU_FORMULA}")
    if math.isnan(peak):
        return
    share, target = rate / peak, ">= 0.45"
    comparison = Comparison(
        "step_public", setting.shape, setting.dtype, (), metric="MFU", note=f"peak {peak:.3g} FLOP/s"
    )
    columns = {"ratio": f"{share:.4g}", "target": target, "verdict": verdict(target, share)}
    bench.row(comparison, "flashsink, loss and statistics", **columns)
