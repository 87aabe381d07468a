"""Triton's kernels over patterns of visible keys: what they refuse, and that they load no more than they need."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import TRITON, on

import flashsink
from flashsink import dispatch
from flashsink.checks import resolve_layout
from flashsink.triton import attention as triton_attention
from flashsink.triton.patterns import block_bounds
from flashsink.types import Layout

pytestmark = pytest.mark.integration


def test_triton_refuses_values_that_are_too_wide(monkeypatch):
    monkeypatch.setattr(importlib.import_module("flashsink.dispatch"), "_state", lambda name: "usable")
    layout = resolve_layout(1, 9, torch.device("cpu"))
    for dtype, most in ((torch.bfloat16, 256), (torch.float32, 128)):
        q, v = torch.randn(1, 2, 9, 64, dtype=dtype), torch.randn(1, 2, 9, most + 8, dtype=dtype)
        words = rf"'triton' cannot be used: its attention takes head dims up to {most} in {dtype}, not {most + 8}"
        with pytest.raises(ValueError, match=words):
            dispatch.select("triton", "cuda", q, v)
        with pytest.raises(ValueError, match=words):
            triton_attention.attention(q, q, v, layout, causal=True, scale=1.0)
        with pytest.raises(ValueError, match=words):
            triton_attention.calibrated_attention(q, q, v, q[..., 0] > 0, layout, beta=0.4, scale=1.0)
        assert dispatch.select(None, "cuda", q, v) == "reference"
        assert dispatch.select("triton", "cuda", q, v[..., :most]) == "triton"


@on(TRITON)
@pytest.mark.parametrize(
    ("options", "far"),
    [
        ({"window": 20}, 60),
        ({"chunk": 40}, 80),
        ({"window": 20, "prefix": torch.tensor([40])}, 60),
        ({"window": 20, "blocks": torch.arange(112)[None] // 28}, 60),
    ],
)
def test_keys_out_of_reach_are_not_loaded(backend, options, far):
    """NaN in the first ``far`` keys and values would reach what multiplies them by 0; the queries are the last 16 of
    112, and tiles 16 wide."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 16, generator=g).to(backend.device) for n in (16, 112, 112))
    options = {name: x.to(backend.device) if torch.is_tensor(x) else x for name, x in options.items()}
    wanted = [x.detach().cpu() for x in trained(backend, q, k, v, options)]
    v[:, :, :far], k[:, :, :far] = torch.nan, torch.nan
    found = trained(backend, q, k, v, options)
    for got, want in zip(found, wanted, strict=True):
        got = got.detach().cpu()
        begin = far if got.shape[2] == 112 else 0  # the keys that are not NaN
        assert not want[:, :, :begin].any() and want.any()
        assert torch.equal(got[:, :, begin:], want[:, :, begin:])


def trained(backend, q, k, v, options):
    """out, received and the gradients."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, stats = flashsink.attention(*leaves, **options, backend=backend.name, return_stats=True)
    return [out, *torch.autograd.grad(out.sum(), leaves), stats.received.unsqueeze(-1)]


@on(TRITON)
@pytest.mark.parametrize("options", [{"window": 20}, {"chunk": 40}])
def test_queries_out_of_reach_are_not_loaded(backend, options):
    """The gradients of the first 16 keys, and what they receive, do not depend on the last 16 queries of 64."""
    g = torch.Generator().manual_seed(0)
    q, k, v, up = (torch.randn(1, 1, 64, 16, generator=g).to(backend.device) for _ in range(4))
    results = []
    for poison in (0.0, torch.nan):
        q[:, :, 48:], up[:, :, 48:] = poison, poison
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, stats = flashsink.attention(*leaves, **options, backend=backend.name, return_stats=True)
        _, dk, dv = torch.autograd.grad(out, leaves, up)
        with torch.no_grad():
            passed = flashsink.attention(*leaves, **options, backend=backend.name, return_stats=True)[1].received
        results.append([dk[:, :, :16], dv[:, :, :16], stats.received[..., :16], passed[..., :16]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].any()


@pytest.mark.parametrize("packed", [False, True])
def test_bounds_of_blocks(packed):
    bounds = (torch.tensor([0, 11]), torch.tensor([11, 9])) if packed else (torch.tensor([2, 0]), torch.tensor([9, 20]))
    layout = Layout(*bounds, 1 if packed else 2, 23, packed)
    blocks = torch.randint(-2, 4, (layout.rows, 23)) * 2**60
    starts, ends = block_bounds(blocks, layout)
    segment = layout.segments()
    for b in range(layout.rows):
        for i in range(23):
            own = [j for j in range(23) if segment[b, j] == segment[b, i] >= 0 and blocks[b, j] == blocks[b, i] >= 0]
            assert (int(starts[b, i]), int(ends[b, i])) == ((own[0], own[-1] + 1) if own else (-1, 0))
    for empty in block_bounds(torch.zeros(2, 0).long(), layout._replace(tokens=0, rows=2, packed=False)):
        assert empty.shape == (2, 0)


@on(TRITON)
def test_the_first_query_behind_a_prefix_sees_its_window_alone(backend):
    """Where order is all that counts it would see the prefix in any case."""
    q, k, v = (torch.randn(1, 1, 20, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    options = {"window": 3, "prefix": torch.tensor([8]), "return_stats": True}
    want, stats = flashsink.attention(q, k, v, **options, backend="reference")
    moved = {name: x.to(backend.device) if torch.is_tensor(x) else x for name, x in options.items()}
    out, found = flashsink.attention(*(x.to(backend.device) for x in (q, k, v)), **moved, backend=backend.name)
    torch.testing.assert_close(out.cpu(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.received.cpu(), stats.received, rtol=1e-4, atol=1e-5)
