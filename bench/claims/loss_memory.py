"""Extra memory of the decorrelation loss at the peak of a step, relative to the hidden states of all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.claims import Claim
from bench.runner import rehearsal
from bench.runner.ledger import Row, verdict
from bench.runner.measure import Bench, Comparison
from bench.runner.memory import peak_memory
from bench.workloads.llm_steps import NEVER, Setting, Variant, make_step, norm_name
from bench.workloads.shapes import MODELS

CLAIM = Claim("loss_memory", "extra memory of the loss / all layers' hidden states", "<= 2/S + 0.3%", "<= 2/S + 0.3%")
CLAIMS = (CLAIM,)
CPU_LAYERS = 10  # of 30
LESS = "error: less memory with the loss than without it"
WITH = Variant(probe={"activations": False, "stats_every": NEVER}, weight=1.0, optimizer=False)
# the same fused norms, so that the difference is the loss
WITHOUT = dataclasses.replace(WITH, probe={**(WITH.probe or {}), "decorrelation": False}, weight=None, norm="ours")


def comparisons(bench: Bench) -> Iterator[Comparison]:
    if bench.large:
        model = MODELS["llama-3.2-3b"]
        setting = Setting(
            model,
            bench.layers or model.layers,
            (rehearsal.cut(512, 16),) * rehearsal.cut(8, 2),
            False,
            bench.device,
            torch.bfloat16,
        )
    else:
        model = MODELS["smollm2-135m"]
        setting = Setting(model, bench.layers or CPU_LAYERS, (256,) * 2, False, bench.device, torch.float32)
    measure = lambda: measured(bench, setting)  # noqa: E731
    yield Comparison(CLAIM.name, setting.shape, setting.dtype, metric="memory", measure=measure)


def measured(bench: Bench, setting: Setting) -> Row:
    """From the peaks of a forward and backward with our norms, with and without the loss. Dense rows of one length."""
    shared: dict[str, Tensor] = {}
    peaks = []
    for variant in (WITHOUT, WITH):
        step = make_step(setting, variant, shared)
        for _ in range(2):
            step()
        peaks.append(peak_memory(step, bench.device))
        del step
        bench.clean()
    states = setting.layers * sum(setting.lengths) * setting.model.hidden * setting.dtype.itemsize
    ratio, target = (peaks[1] - peaks[0]) / states, f"<= {2 / setting.lengths[0] + 0.003:.5f}"
    return {
        "against": f"our norms without the loss; other norms {norm_name(bench.device)}",
        "peak_mib": f"{peaks[1] / 2**20:.2f}",
        "ratio": f"{ratio:.4g}",
        "target": target,
        "verdict": verdict(target, ratio) if ratio >= 0 else LESS,
        "note": f"more at the peak / {states / 2**20:.1f} MiB of states",
    }
