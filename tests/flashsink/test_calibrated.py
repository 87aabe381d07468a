"""calibrated_attention against the literal ACT algorithm on materialised probabilities in float64."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from cases import BACKENDS, on

import flashsink
from flashsink.checks import resolve_layout

KEYS = 19
LAYOUTS = {
    "no padding": {},
    "right padding": {"lengths": [19, 6, 1]},
    "left padding": {"starts": [0, 4, 18]},
    "both": {"starts": [2, 4, 0], "lengths": [9, 15, 17]},
    "rows without tokens": {"starts": [0, 19, 3], "lengths": [0, 0, 16]},
}


class Problem:
    """Random q, k, v and sinks; padding holds ``poison``."""

    def __init__(self, layout, queries=KEYS, dtype=torch.float32, share=0.3, poison=float("nan")):
        g = torch.Generator().manual_seed(5)
        shapes = ((4, queries), (2, KEYS), (2, KEYS))
        tensors = [torch.randn(3, heads, n, 7, generator=g).to(dtype) for heads, n in shapes]
        self.sinks = torch.rand(3, 4, KEYS, generator=g) < share
        self.layout = {name: torch.tensor(value) for name, value in LAYOUTS[layout].items()}
        self.rows = oracle.runs(3, KEYS, **self.layout)
        valid = torch.zeros(3, KEYS, dtype=torch.bool)
        for b, [(first, end)] in enumerate(self.rows):
            valid[b, first:end] = True
        self.padding = ~valid[:, None, :, None]
        self.qkv = [x.masked_fill(self.padding[:, :, -x.shape[2] :], poison) for x in tensors]

    def run(self, backend, *, v=None, sinks=None, **options):
        q, k, own = (x.to(backend.device) for x in self.qkv)
        layout = {name: x.to(backend.device) for name, x in self.layout.items()}
        sinks = (self.sinks if sinks is None else sinks).to(backend.device)
        v = own if v is None else v.to(backend.device)
        return flashsink.calibrated_attention(q, k, v, sinks, **options, **layout, backend=backend.name).cpu()


def close(backend, got, want):
    tolerance = 5e-6 if backend.device == "cpu" else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@functools.cache
def literal(layout, beta, queries=KEYS, dtype=torch.float32, share=0.3):
    problem = Problem(layout, queries, dtype, share, poison=0.0)
    probs = oracle.Attention(*problem.qkv, **problem.layout).probs
    return oracle.weigh(oracle.act(probs, problem.sinks, problem.rows, beta), problem.qkv[2])


@pytest.mark.parametrize(("layout", "beta"), [*((name, 0.4) for name in LAYOUTS), ("both", 0.0), ("both", 1.0)])
def test_equals_the_literal_algorithm(backend, layout, beta):
    """With beta 1 that is plain attention; padding reaches nothing."""
    problem = Problem(layout)
    out = problem.run(backend, beta=beta)
    assert out.dtype == torch.float32
    close(backend, out, literal(layout, beta))
    whole = problem.run(backend, beta=beta, v=torch.ones(3, 2, KEYS, 7))
    torch.testing.assert_close(whole, (~problem.padding).float().expand(whole.shape))  # rows still sum to 1


@pytest.mark.parametrize(("queries", "share"), [(1, 0.3), (11, 0.3), (KEYS, 0.9)])
def test_fewer_queries_than_keys_and_many_sinks(backend, queries, share):
    out = Problem("left padding", queries, share=share).run(backend)
    want = literal("left padding", 0.4, queries, share=share)
    close(backend, out, want)


@pytest.mark.parametrize("layout", ["both", "rows without tokens"])
def test_bos_in_the_mask_has_no_effect(backend, layout):
    problem = Problem(layout)
    without, with_bos = problem.sinks.clone(), problem.sinks.clone()
    for b, [(first, end)] in enumerate(problem.rows):
        if end > first:
            without[b, :, first], with_bos[b, :, first] = False, True
    assert torch.equal(problem.run(backend, sinks=without), problem.run(backend, sinks=with_bos))
    none = torch.zeros_like(without)
    torch.testing.assert_close(problem.run(backend, sinks=none), literal(layout, 1.0).float(), rtol=1e-5, atol=1e-5)


# the scores' gap between the sinks and the rest: up to where the rest underflows to 0 in float32
@pytest.mark.parametrize("gap", [10.0, 20.0, 60.0, 86.0, 87.5, 90.0, 95.0, 100.0, 110.0, 1000.0])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_a_row_with_all_its_mass_on_sinks(backend, gap, beta):
    q = torch.ones(1, 1, 6, 1, device=backend.device)
    k = torch.tensor([0.0, 0.0, gap, gap, 0.0, 0.0], device=backend.device).view(1, 1, 6, 1)
    sinks = torch.zeros(1, 1, 6, dtype=torch.bool, device=backend.device)
    sinks[..., 2:4] = True
    for leaf in (k, k.clone().requires_grad_()):  # with a gradient the reference runs
        out = flashsink.calibrated_attention(q, leaf, torch.ones_like(q), sinks, beta=beta, backend=backend.name)
        torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gap", [0.0, 3.0, 12.0])
@pytest.mark.parametrize("queries", [KEYS, 1])
def test_rows_with_nearly_all_mass_on_sinks(backend, gap, queries):
    problem = Problem("both", queries)
    q, k, v = problem.qkv
    q[..., 0], k[..., 0] = 7**0.5, 0.0
    k[:, :, 7, 0], problem.sinks[:, ::2, 7] = gap, True
    problem.qkv = [x.masked_fill(problem.padding[:, :, -x.shape[2] :], 0.0) for x in (q, k, v)]
    probs = oracle.Attention(*problem.qkv, **problem.layout).probs
    want = oracle.weigh(oracle.act(probs, problem.sinks, problem.rows, 0.4), problem.qkv[2])
    close(backend, problem.run(backend), want)


@pytest.mark.parametrize("gap", [1.0, 30.0, 60.0, 95.0, 1000.0])
def test_its_gradient_is_right_and_always_finite(backend, gap):
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, 6, 3, generator=g) for _ in range(3))
    q[..., 0], k[..., 0], k[..., 2:4, 0] = 3**0.5, 0.0, gap
    sinks = torch.zeros(1, 1, 6, dtype=torch.bool)
    sinks[..., 2:4] = True
    mine = [x.to(backend.device).requires_grad_() for x in (q, k, v)]
    out = flashsink.calibrated_attention(*mine, sinks.to(backend.device), backend=backend.name)
    got = torch.autograd.grad(out.square().sum(), mine)
    assert all(x.isfinite().all() for x in got)
    if gap > 30.0:
        return
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].mT / 3**0.5
    probs = scores.masked_fill(torch.ones(6, 6).triu(1) > 0, float("-inf")).softmax(-1)
    total = oracle.weigh(oracle.act(probs, sinks, [[(0, 6)]], 0.4), exact[2]).square().sum()
    for a, b in zip(got, torch.autograd.grad(total, exact), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4)


def test_padding_gets_no_gradient(backend):
    problem = Problem("both")
    leaves = [x.to(backend.device).requires_grad_() for x in problem.qkv]
    problem.qkv = leaves
    gradients = torch.autograd.grad(problem.run(backend).sum(), leaves)
    for gradient in gradients:
        assert gradient.isfinite().all() and not gradient.cpu().masked_select(problem.padding).any()


@pytest.mark.parametrize(("layout", "dtype"), [("both", torch.float16), *((name, torch.bfloat16) for name in LAYOUTS)])
def test_half_precision(backend, layout, dtype):
    problem, want = Problem(layout, dtype=dtype), literal(layout, 0.4, dtype=dtype)
    out = problem.run(backend)
    assert out.dtype == dtype
    # plain PyTorch: probabilities, their correction and the product in the dtype
    clean = Problem(layout, dtype=dtype, poison=0.0)
    probs = oracle.Attention(*clean.qkv, **clean.layout).probs
    plain = oracle.act(probs.to(dtype), clean.sinks, clean.rows, 0.4).to(dtype) @ clean.qkv[2].repeat_interleave(2, 1)
    assert (out.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max()


@on(BACKENDS[1:])
def test_packed_sequences_each_for_itself(backend):
    """In a packed row the reference runs: no kernel takes it for a dense one."""
    q, k, v = (torch.randn(1, heads, 12, 16, device=backend.device) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 12], device=backend.device)
    sinks = torch.rand(1, 4, 12, device=backend.device) < 0.4
    layout = resolve_layout(1, 12, q.device, cu_seqlens=bounds)
    got = backend.module.calibrated_attention(q, k, v, sinks, layout, beta=0.4, scale=16**-0.5)
    for part in (slice(0, 5), slice(5, 12)):
        alone = [x[:, :, part] for x in (q, k, v)]
        want = flashsink.calibrated_attention(*alone, sinks[..., part], backend="reference")
        torch.testing.assert_close(got[:, :, part], want, rtol=1e-5, atol=1e-5)
