"""How much memory the decorrelation loss takes at the peak of a step, beside the hidden states of all layers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bench.claims import Claim
from bench.harness import Bench, Comparison, one_line, peak_memory
from bench.ledger import verdict
from bench.shapes import MODELS
from bench.steps import NEVER, Setting, Variant, make_step, norm_name

CLAIMS = (
    Claim(
        "loss_memory",
        "extra memory of the loss / all layers' hidden states",
        "<= 2/S + 0.3%",
        "<= 2/S + 0.3%",
    ),
)
CPU_LAYERS = 10  # of 30
WITH = Variant(probe={"activations": False, "stats_every": NEVER}, weight=1.0, optimizer=False)
# the same fused norms, so that the difference is the loss
WITHOUT = dataclasses.replace(WITH, probe={**(WITH.probe or {}), "decorrelation": False}, weight=None, norm="ours")


def run(bench: Bench, layers: int = 0) -> None:
    if bench.cuda:
        model = MODELS["llama-3.2-3b"]
        measure(bench, Setting(model, layers or model.layers, (512,) * 8, False, bench.device, torch.bfloat16))
        return
    model = MODELS["smollm2-135m"]
    measure(bench, Setting(model, layers or CPU_LAYERS, (256,) * 2, False, bench.device, torch.float32))


def measure(bench: Bench, setting: Setting) -> None:
    """Peaks of whole forwards and backwards with our norms, with the loss and without; dense rows of equal length."""
    shared: dict[str, Tensor] = {}
    comparison = Comparison("loss_memory", setting.shape, setting.dtype, (), metric="memory")
    try:
        peaks = []
        for variant in (WITHOUT, WITH):
            step = make_step(setting, variant, shared)
            for _ in range(2):
                step()
            peaks.append(peak_memory(step, bench.device))
            del step
            bench.clean()
    except Exception as error:
        bench.row(comparison, "flashsink, loss", verdict=f"error: {one_line(error)}")
        return
    states = setting.layers * sum(setting.lengths) * setting.model.hidden * setting.dtype.itemsize
    ratio, target = (peaks[1] - peaks[0]) / states, f"<= {2 / setting.lengths[0] + 0.003:.5f}"
    columns = {
        "against": f"our norms without the loss; other norms {norm_name(bench.device)}",
        "peak_mib": f"{peaks[1] / 2**20:.2f}",
        "ratio": f"{ratio:.4g}",
        "target": target,
        "verdict": verdict(target, ratio) if ratio >= 0 else "error: less memory with the loss than without it",
        "note": f"more at the peak / {states / 2**20:.1f} MiB of states",
    }
    bench.row(comparison, "flashsink, loss", **columns)
