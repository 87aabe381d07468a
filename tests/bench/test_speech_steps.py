"""Whole steps of avsr's model: every variant gives the same loss on the same weights."""

from __future__ import annotations

import pytest
import torch

from bench.shapes import Model
from bench.speech_steps import FIXED, RATE, Setting, Variant, demo_rows, make_step, neighbours

TINY = Model("tiny", 4, 2, 16, 64, 3, 96, 50)
UNEVEN = Setting(TINY, 3, ((40, 3), (80, 6), (16, 1)), torch.device("cpu"), torch.float32)


def test_all_variants_agree():
    shared = {}
    want = float(make_step(UNEVEN, Variant(), shared)())
    for variant in (
        Variant(packed=False),
        Variant(packed=False, all_logits=True),
        Variant(checkpointing="selective"),
        Variant(checkpointing="true"),
        Variant(cross_entropy="chunked"),
    ):
        assert float(make_step(UNEVEN, variant, shared)()) == pytest.approx(want, rel=1e-5), variant


def test_batches_are_neighbours_in_length():
    rows = neighbours(8192)
    setting = Setting(TINY, 3, rows, torch.device("cpu"), torch.float32)
    assert 0.9 * 8192 < setting.tokens <= max(setting.lengths) * len(rows) <= 8192
    assert UNEVEN.lengths[1] == FIXED + 80 // RATE + 6 and len(demo_rows()) == 8
