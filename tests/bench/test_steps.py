"""Whole steps of tiny models: all variants compute the same loss from the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.claims import loss_memory, training_step
from bench.run import measure
from bench.runner.measure import Bench
from bench.workloads import llm_steps as steps
from bench.workloads import speech_steps
from bench.workloads.shapes import Model

pytestmark = pytest.mark.integration

TINY = Model("tiny", 4, 2, 16, 64, 3, 96, 50)
PACKED = steps.Setting(TINY, 3, (20, 9, 14), True, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def losses(setting, variant, shared, count=3):
    step = steps.make_step(setting, variant, shared)
    return [float(step()) for _ in range(count)]


def test_all_variants_share_weights_and_agree():
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
    peaks = iter([200.0, 100.0])
    monkeypatch.setattr(loss_memory, "peak_memory", lambda step, device: next(peaks))
    setting = dataclasses.replace(PACKED, lengths=(12, 12), packed=False)
    row = loss_memory.measured(Bench(torch.device("cpu"), 0.0, print), setting)
    assert row["verdict"].startswith("error: less memory")


@pytest.mark.parametrize("module", [training_step, loss_memory])
def test_the_claims_run_on_the_cpu(module, monkeypatch):
    rows = []
    monkeypatch.setitem(module.MODELS, "smollm2-135m", TINY)
    bench = Bench(torch.device("cpu"), 0.0, rows.append, least_rounds=1, layers=2)
    measure(bench, [module.__name__.rpartition(".")[2]], float("inf"), lambda name: None)
    assert rows and all(row["ratio"] and not row["verdict"].startswith("error") for row in rows), rows
    assert {row["claim"] for row in rows} == {claim.name for claim in module.CLAIMS}


# ---- avsr's model

UNEVEN = speech_steps.Setting(TINY, 3, ((40, 3), (80, 6), (16, 1)), torch.device("cpu"), torch.float32)


def test_all_variants_of_speech_steps_agree():
    shared = {}
    want = float(speech_steps.make_step(UNEVEN, speech_steps.Variant(), shared)())
    for variant in (
        speech_steps.Variant(packed=False),
        speech_steps.Variant(packed=False, all_logits=True),
        speech_steps.Variant(checkpointing="selective"),
        speech_steps.Variant(checkpointing="true"),
        speech_steps.Variant(cross_entropy="chunked"),
    ):
        assert float(speech_steps.make_step(UNEVEN, variant, shared)()) == pytest.approx(want, rel=1e-5), variant


def test_batches_are_neighbours_in_length():
    rows = speech_steps.neighbours(8192)
    setting = speech_steps.Setting(TINY, 3, rows, torch.device("cpu"), torch.float32)
    assert 0.9 * 8192 < setting.tokens <= max(setting.lengths) * len(rows) <= 8192
    assert UNEVEN.lengths[1] == speech_steps.FIXED + 80 // speech_steps.RATE + 6 and len(speech_steps.demo_rows()) == 8
