"""Attention's own backward in C++ tiles, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from flashsink import reference
from flashsink.cpu import received as native_received
from flashsink.types import Layout

pytestmark = pytest.mark.usefixtures("library", "kernel")


def dense(starts, lengths, tokens):
    return Layout(torch.tensor(starts), torch.tensor(lengths), len(starts), tokens, False)


LAYOUTS = {
    "full": dense([0, 0, 0], [150, 150, 150], 150),
    "padded": dense([0, 3, 149], [150, 66, 1], 150),
    "no tokens": dense([0, 150, 40], [0, 0, 65], 150),
    "packed": Layout(torch.tensor([0, 1, 1, 64, 129]), torch.tensor([1, 0, 63, 65, 17]), 1, 150, True),
}


def make(layout, heads, kv, queries, d=5):
    """q, k, v and an upstream gradient, 0 at padding."""
    g = torch.Generator().manual_seed(3)
    valid = layout.valid()[:, None, :, None]
    shapes = ((heads, queries), (kv, layout.tokens), (kv, layout.tokens), (heads, queries))
    return [torch.randn(layout.rows, h, n, d, generator=g) * valid[:, :, layout.tokens - n :] for h, n in shapes]


def op(q, k, v, layout, causal=True):
    return torch.ops.flashsink.attention(q, k, v, layout.starts, layout.lengths, layout.packed, causal, 0.4)


def gradients(inputs, layout, causal=True):
    *leaves, upstream = [x.clone(memory_format=torch.preserve_format) for x in inputs]
    leaves = [x.requires_grad_() for x in leaves]
    return torch.autograd.grad(op(*leaves, layout, causal)[0], leaves, upstream)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_every_layout(isa, name, causal):
    layout = LAYOUTS[name]
    for queries in (150,) if layout.packed else (150, 101, 1):
        for heads, kv in ((3, 1), (4, 4), (6, 2)):
            inputs = make(layout, heads, kv, queries)
            *exact, upstream = [x.double() for x in inputs]
            exact = [x.requires_grad_() for x in exact]
            out, _ = reference.attention(*exact, layout, causal=causal, scale=0.4)
            want = torch.autograd.grad(out, exact, upstream)
            for got, expected in zip(gradients(inputs, layout, causal), want, strict=True):
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("products", [1, 3000, 100_000])
def test_the_cut_changes_nothing_but_rounding(monkeypatch, products):
    for layout in (LAYOUTS["full"], LAYOUTS["padded"], LAYOUTS["packed"]):
        inputs = make(layout, 6, 2, 150)
        want = gradients(inputs, layout)
        with monkeypatch.context() as patch:
            patch.setattr(native_received, "PRODUCTS", products)
            got = gradients(inputs, layout)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["padded", "packed"])
def test_threads_change_no_bit(isa, threads, name):
    layout = LAYOUTS[name]
    inputs = make(layout, 6, 2, 150, 64)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(gradients(inputs, layout))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_any_strides():
    layout = LAYOUTS["padded"]
    inputs = make(layout, 6, 2, 150, 8)
    want = gradients(inputs, layout)
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    features_first = [x.mT.contiguous().mT for x in inputs]
    for moved in (heads_last, features_first):
        for a, b in zip(gradients(moved, layout), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_only_what_is_asked_for_is_returned():
    layout = LAYOUTS["full"]
    q, k, v, upstream = make(layout, 6, 2, 150)
    want = gradients((q, k, v, upstream), layout)
    v.requires_grad_()
    out, lse = op(q, k, v, layout)
    assert not lse.requires_grad
    (got,) = torch.autograd.grad(out, v, upstream)
    assert torch.equal(got, want[2])


def test_a_second_derivative_is_refused():
    layout = LAYOUTS["full"]
    q, k, v, _ = make(layout, 6, 2, 150)
    q.requires_grad_()
    (once,) = torch.autograd.grad(op(q, k, v, layout)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        once.sum().backward()


@pytest.mark.parametrize("name", ["padded", "packed"])
def test_opcheck(name):
    layout = LAYOUTS[name]
    q, k, v, upstream = make(layout, 6, 2, 150, 8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    last = (layout.starts, layout.lengths, layout.packed, True, 0.4)
    torch.library.opcheck(torch.ops.flashsink.attention.default, (*leaves, *last))
    out, lse = op(q, k, v, layout)
    torch.library.opcheck(torch.ops.flashsink.attention_backward.default, (upstream, q, k, v, out, lse, *last))


def test_compiled_gives_the_same():
    layout = LAYOUTS["full"]
    inputs = make(layout, 6, 2, 150, 8)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    compiled = torch.compile(lambda *x: (op(*x, layout)[0] * inputs[3]).sum(), backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), gradients(inputs, layout), strict=True):
        torch.testing.assert_close(a, b)
