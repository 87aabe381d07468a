"""The decorrelation loss, alone and in the norm, on random shapes and layouts; skipped without hypothesis."""

from __future__ import annotations

import os

import pytest
import torch

from flashsink import reference
from flashsink.triton import activations, decorrelation, launch, norm
from flashsink.types import Layout

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poison")

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@st.composite
def problems(draw):
    """(h (B, S, C), spans, layout, margin): dense rows with starts, or a packed row with a tail."""
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
        rows, tokens = 1, max(sum(lengths) + draw(st.integers(0, 4)), 1)
        starts, packed = torch.tensor([0, *lengths[:-1]]).cumsum(0), True
    else:
        rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 19))
        first = draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
        lengths = [draw(st.integers(0, tokens - s)) for s in first]
        starts, packed = torch.tensor(first), False
    spans = torch.tensor([draw(st.integers(0, n)) for n in lengths], device=DEVICE)
    layout = Layout(starts.to(DEVICE), torch.tensor(lengths, device=DEVICE), rows, tokens, packed)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    h = torch.randn(rows, tokens, draw(st.integers(2, 33)), generator=generator).to(DEVICE)
    h = h + draw(st.sampled_from([0.0, 1.0]))  # directions at random, or all alike
    return h, spans, layout, draw(st.sampled_from([0.0, 0.3]))


def close(got, want, tolerance=5e-5):
    atol = tolerance * float(want.abs().max()) + 1e-12
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=atol)


def check(problem):
    h, spans, layout, margin = problem
    h = h.masked_fill(~layout.valid()[..., None], 7.0)
    weight = torch.linspace(0.5, 1.5, h.shape[-1], device=DEVICE)
    mine, exact = h.clone().requires_grad_(), h.double().requires_grad_()
    scale, exact_scale = weight.requires_grad_(), weight.detach().double().requires_grad_()

    sums = decorrelation.decorrelation_sums([mine, 2.0 * mine], spans, layout, margin)
    want = reference.decorrelation_sums([exact, 2.0 * exact], spans, layout, margin)
    close(sums.detach(), want.detach())
    close(*(torch.autograd.grad(x[0] + 3.0 * x[1], y)[0] for x, y in ((sums, mine), (want, exact))))

    results = []
    for function, x, w in ((norm.rms_norm, mine, scale), (reference.rms_norm, exact, exact_scale)):
        normed = function(x, w, 1e-5, layout, spans, margin)
        value = normed.out.square().sum() + 3.0 * normed.total
        results.append((normed, *torch.autograd.grad(value, (x, w))))
    (got, *gradients), (wanted, *exact_gradients) = results
    close(got.out.detach(), wanted.out.detach())
    close(got.total.detach(), wanted.total.detach().double())
    for a, b in zip(gradients, exact_gradients, strict=True):
        close(a, b)
    stats = activations.activation_stats([mine], layout, False)
    for top, feature in ((got.max_abs, got.feature), (stats.max_abs[0], stats.feature[0])):
        assert torch.equal(top, wanted.max_abs) and torch.equal(feature, wanted.feature)


@settings(max_examples=25, **SETTINGS)
@given(problem=problems())
def test_random_problems(problem):
    check(problem)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=int(os.environ.get("FLASHSINK_FUZZ", "2000")), **SETTINGS)
@given(problem=problems())
def test_very_many_random_problems(problem):
    check(problem)
