"""decorrelation_loss on random shapes and layouts, against the float64 oracle; skipped without hypothesis."""

from __future__ import annotations

import pytest
import torch

import flashsink

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st


def states(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(oracle, hidden, spans, backend, **options):
    """Loss and gradient agree with the oracle to 5e-5."""
    mine, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    spans = torch.as_tensor(spans)
    loss = flashsink.decorrelation_loss(mine, spans, backend=backend, **options)
    want = oracle.decorrelation(exact.unbind(0), spans, **options)
    loss.backward()
    want.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and mine.grad.dtype == hidden.dtype
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=5e-5, atol=1e-9)
    atol = 5e-5 * float(exact.grad.abs().max()) + 1e-12
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=5e-5, atol=atol)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_shapes(oracle, backend, data):
    layers, rows, tokens = (data.draw(st.integers(1, n)) for n in (3, 3, 7))
    features = data.draw(st.integers(2, 17))
    starts = data.draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
    spans = [data.draw(st.integers(0, tokens - first)) for first in starts]
    hidden = states((layers, rows, tokens, features), data.draw(st.integers(0, 1000)))
    margin = data.draw(st.sampled_from([0.0, 0.3]))
    check(oracle, hidden, spans, backend, starts=torch.tensor(starts), margin=margin)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_packed_shapes(oracle, backend, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    spans = [data.draw(st.integers(0, n)) for n in lengths]
    tail = data.draw(st.integers(0, 2))
    tokens = max(sum(lengths) + tail, 1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    hidden = states((2, 1, tokens, 5), data.draw(st.integers(0, 1000)))
    check(oracle, hidden, spans, backend, cu_seqlens=bounds)
