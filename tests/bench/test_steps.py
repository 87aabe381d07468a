"""Whole steps of a tiny model: all ways to do one give the loss that they should, on the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import steps
from bench.claims import loss_memory, training_step
from bench.harness import Bench
from bench.shapes import Model

TINY = Model("tiny", 4, 2, 16, 64, 3, 96, 50)
PACKED = steps.Setting(TINY, 3, (20, 9, 14), True, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def losses(setting, variant, shared, count=3):
    step = steps.make_step(setting, variant, shared)
    return [float(step()) for _ in range(count)]


def test_all_ways_share_weights_and_agree():
    shared = {}
    unweighted = dataclasses.replace(steps.OURS, weight=None, optimizer=False)
    plain = losses(PACKED, unweighted, shared, 1)
    assert losses(PACKED.padded(), unweighted, shared, 1) == pytest.approx(plain, rel=1e-4)
    public = steps.Variant("sdpa", optimizer=False)
    assert losses(PACKED, public, shared, 1) == pytest.approx(plain, rel=1e-4)
    reference = dataclasses.replace(steps.REFERENCE, weight=None, optimizer=False)
    assert losses(PACKED.padded(), reference, shared, 1) == pytest.approx(plain, rel=1e-4)


def test_a_step_trains_with_loss_and_statistics():
    shared = {}
    with_loss = losses(PACKED, steps.OURS, shared, 4)
    assert with_loss[-1] < with_loss[0]
    without = losses(PACKED, steps.WITHOUT, shared, 1)
    assert with_loss[0] > without[0] + 1e-3, "the loss must be part of the step"


def test_only_the_reference_has_the_norm_of_transformers(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def slow(self, h):
        raise AssertionError

    monkeypatch.setattr(LlamaRMSNorm, "forward", slow)
    shared = {}
    for variant in (steps.OURS, steps.WITHOUT, steps.Variant("sdpa"), loss_memory.WITH, loss_memory.WITHOUT):
        losses(PACKED.padded() if variant.norm == "ours" else PACKED, variant, shared, 1)
    with pytest.raises(AssertionError):
        losses(PACKED.padded(), steps.REFERENCE, shared, 1)


def test_our_norm_without_the_loss_is_the_same_norm():
    setting, shared = dataclasses.replace(PACKED, lengths=(12, 12), packed=False), {}
    with_loss = losses(setting, dataclasses.replace(loss_memory.WITH, weight=None), shared, 1)
    assert losses(setting, loss_memory.WITHOUT, shared, 1) == pytest.approx(with_loss, rel=1e-6)


def test_less_memory_with_the_loss_is_an_error(monkeypatch):
    rows, peaks = [], iter([200.0, 100.0])
    monkeypatch.setattr(loss_memory, "peak_memory", lambda step, device: next(peaks))
    setting = dataclasses.replace(PACKED, lengths=(12, 12), packed=False)
    loss_memory.measure(Bench(torch.device("cpu"), 0.0, rows.append), setting)
    assert rows[0]["verdict"].startswith("error: less memory")


@pytest.mark.parametrize("module", [training_step, loss_memory])
def test_the_claims_run_on_the_cpu(module, monkeypatch):
    rows = []
    monkeypatch.setitem(module.MODELS, "smollm2-135m", TINY)
    module.run(Bench(torch.device("cpu"), 0.0, rows.append, least_rounds=1), layers=2)
    assert rows and all(row["ratio"] and not row["verdict"].startswith("error") for row in rows), rows
    assert {row["claim"] for row in rows} == {claim.name for claim in module.CLAIMS}
