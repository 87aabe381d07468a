"""The statistics pass in C++: its exponential, its masks and its tiles, against float64."""

from __future__ import annotations

import pytest
import torch

from flashsink import reference
from flashsink.cpu import received as native_received
from flashsink.types import Layout

pytestmark = pytest.mark.usefixtures("library", "kernel")


def op(q, k, lse, layout, *, causal=True, scale=0.4, first=None):
    return torch.ops.flashsink.received(q, k, lse, layout.starts, layout.lengths, first, layout.packed, causal, scale)


def dense(starts, lengths, tokens):
    return Layout(torch.tensor(starts), torch.tensor(lengths), len(starts), tokens, False)


def packed(lengths, tokens):
    lengths = torch.tensor(lengths)
    return Layout(lengths.cumsum(0) - lengths, lengths, 1, tokens, True)


def make(layout, heads, kv, queries, d, dtype=torch.float32):
    """Random q, k and their exact log-sum-exp in float32, with NaN in all padding."""
    g = torch.Generator().manual_seed(3)
    q = torch.randn(layout.rows, heads, queries, d, generator=g).to(dtype)
    k = torch.randn(layout.rows, kv, layout.tokens, d, generator=g).to(dtype)
    padding = ~layout.valid()[:, None, :, None]
    behind = padding[:, :, layout.tokens - queries :]
    return q.masked_fill(behind, float("nan")), k.masked_fill(padding, float("nan"))


def exact(q, k, layout, causal, scale, first):
    a, lse = reference.probabilities(q.double(), k.double(), layout, causal=causal, scale=scale)
    received = reference.sink_stats(a, lse, layout, causal=causal, query_starts=first).received
    padding = ~layout.valid()[:, None, layout.tokens - q.shape[2] :]
    return received, lse.float().masked_fill(padding, float("nan"))


def test_exponential(isa):
    """One query with the products x: received is e^x."""
    x = torch.cat([torch.linspace(-87.0, 88.0, 20001), torch.linspace(-1e-3, 1e-3, 99), torch.randn(999)])
    layout = dense([0], [len(x)], len(x))
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
    got = op(one, x.view(1, 1, -1, 1), zero, layout, scale=1.0).flatten().double()
    want = x.double().exp()
    assert ((got - want) / want).abs().max() < 2e-7
    small = torch.tensor([-88.0, -100.0, -1e30, -float("inf"), float("nan"), 0.0])
    got = op(one, small.view(1, 1, -1, 1), zero, dense([0], [6], 6), scale=1.0).flatten()
    assert got.tolist()[:4] == [0.0] * 4 and torch.isnan(got[4]) and got[5] == 1.0


LAYOUTS = {
    "full": dense([0, 0, 0], [150, 150, 150], 150),
    "padded": dense([0, 3, 149], [150, 66, 1], 150),
    "no tokens": dense([0, 150, 40], [0, 0, 65], 150),
    "packed": packed([1, 0, 63, 65, 17], 150),
    "one": dense([0], [1], 1),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(isa, layout, causal):
    layout = LAYOUTS[layout]
    for queries in (layout.tokens,) if layout.packed or layout.tokens == 1 else (150, 101, 1):
        for first in (None, layout.starts + 70):
            for heads, kv in ((3, 1), (4, 4), (6, 2)):
                q, k = make(layout, heads, kv, queries, 5)
                want, lse = exact(q, k, layout, causal, 0.4, first)
                got = op(q, k, lse, layout, causal=causal, first=first)
                torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("products", [1, 3000, 100_000])
def test_the_cut_changes_nothing_but_rounding(monkeypatch, products):
    monkeypatch.setattr(native_received, "PRODUCTS", products)
    for layout in (LAYOUTS["full"], LAYOUTS["padded"], LAYOUTS["packed"]):
        q, k = make(layout, 6, 2, 150, 5)
        want, lse = exact(q, k, layout, True, 0.4, None)
        torch.testing.assert_close(op(q, k, lse, layout), want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_not_rounded(dtype):
    layout = LAYOUTS["padded"]
    q, k = make(layout, 6, 2, 150, 16, dtype)
    want, lse = exact(q, k, layout, True, 2.0, None)
    torch.testing.assert_close(op(q, k, lse, layout, scale=2.0), want, rtol=2e-5, atol=1e-6)


def test_any_strides():
    layout = LAYOUTS["padded"]
    q, k = make(layout, 6, 2, 150, 8)
    want, lse = exact(q, k, layout, True, 0.4, None)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    torch.testing.assert_close(op(*moved, lse.mT.contiguous().mT, layout), want, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(op(*(x.mT.contiguous().mT for x in (q, k)), lse, layout), want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_threads_change_no_bit(isa, threads, layout):
    layout = LAYOUTS[layout]
    q, k = make(layout, 6, 2, 150, 64)
    _, lse = exact(q, k, layout, True, 0.4, None)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(op(q, k, lse, layout))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["padded", "packed"])
def test_opcheck(name):
    layout = LAYOUTS[name]
    q, k = make(layout, 6, 2, 150, 8)
    q, k = q.nan_to_num(), k.nan_to_num()
    lse = torch.full(q.shape[:3], 5.0)
    for first in (None, layout.starts + 1):
        arguments = (q, k, lse, layout.starts, layout.lengths, first, layout.packed, True, 0.4)
        torch.library.opcheck(torch.ops.flashsink.received.default, arguments)


def test_the_operator_refuses_what_it_would_misread():
    layout = LAYOUTS["full"]
    q, k = make(layout, 6, 2, 150, 8)
    lse = torch.zeros(3, 6, 150)
    with pytest.raises(ValueError, match="lse"):
        op(q, k, lse.double(), layout)
    with pytest.raises(ValueError, match="k:"):
        op(q, k[:, :, :100], lse, layout)
    with pytest.raises(ValueError, match="starts"):
        op(q, k, lse, packed([150], 150))
    with pytest.raises(ValueError, match="lengths"):
        op(q, k, lse, layout._replace(lengths=layout.lengths.int()))
    far = dense([-5, 99, 200], [400, 400, 9], 150)  # out of range is cut, never read
    assert op(q, k, lse, far).isfinite().all()
