"""The C++ kernels: which calls they serve, their exponential, and that threads change nothing."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from cases import LEVELS, Backend, Problem, States, compare, exact, on, run

import flashsink
from flashsink import dispatch, reference
from flashsink.cpu import attention as native
from flashsink.cpu import backend as cpu
from flashsink.cpu import library
from flashsink.types import Layout, Pattern

CPU = [b for b in LEVELS if isinstance(b, Backend) and b.name == "cpu"]


@on(CPU[:1])
def test_which_calls_are_the_kernels_and_which_the_references(backend, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the reference ran")

    q = torch.randn(1, 2, 6, 8)
    layout = Layout(torch.tensor([0]), torch.tensor([6]), 1, 6, False)
    logits, sinks = torch.zeros(2), torch.ones(1, 2, 6, dtype=torch.bool)
    for name in ("attention", "calibrated_attention", "probabilities", "visible", "decorrelation_sums", "rms_norm"):
        monkeypatch.setattr(reference, name, refuse)
    monkeypatch.setattr(reference, "activation_stats", refuse)
    for packed in (False, True):
        for causal in (True, False):
            where = layout._replace(packed=packed)
            cpu.attention(q, q, q, where, causal=causal, scale=1.0, counted=[None], sink_logits=logits)
    cpu.calibrated_attention(q, q, q, sinks, layout, beta=0.4, scale=1.0)
    h, spans = q[0], torch.tensor([6, 2])
    rows = Layout(torch.tensor([0, 0]), torch.tensor([6, 6]), 2, 6, False)
    flashsink.decorrelation_loss([h], spans)  # the default on CPU tensors
    flashsink.activation_stats([h])
    cpu.rms_norm(h, torch.ones(8), 1e-5, rows, spans, 0.0)
    learned = q.clone().requires_grad_()
    for options in ({"sink_logits": logits}, {"pattern": Pattern(window=2)}, {"softcap": 3.0}):
        cpu.attention(learned, q, q[..., :5], layout, causal=True, scale=1.0, counted=[None], **options)
    for x in (q.double(), q[:, :, :0]):
        with pytest.raises(AssertionError, match="the reference ran"):
            cpu.attention(x, q, q, layout, causal=True, scale=1.0)
    for x, options in (
        *((x, {}) for x in (q.double(), learned)),
        *((q, x) for x in ({"sink_logits": logits}, {"softcap": 3.0}, {"pattern": Pattern(2)}, {"causal": False})),
    ):
        with pytest.raises(AssertionError, match="the reference ran"):
            cpu.calibrated_attention(x, x, x, sinks, layout, beta=0.4, scale=1.0, **options)
    for dtype in (torch.float16, torch.float64):
        for call in (
            lambda x: cpu.decorrelation_sums([x], spans, rows, 0.0),
            lambda x: cpu.activation_stats([x], rows, False),
            lambda x: cpu.rms_norm(x, torch.ones(8, dtype=x.dtype), 1e-5, rows, spans, 0.0),
        ):
            with pytest.raises(AssertionError, match="the reference ran"):
                call(h.to(dtype))
    with pytest.raises(AssertionError, match="the reference ran"):
        flashsink.decorrelation_loss([h], spans, backend="reference")
    with pytest.raises(ValueError, match=r"backend.*'cpu'"):
        dispatch.select("cpu", "cuda")


def ratios(x, **options):
    """(n,) float64: what a key with the product x (n,) receives from a query, by what another with 0 does."""
    k = torch.stack([x, torch.zeros(len(x))], 1)[:, None, :, None]
    _, stats = flashsink.attention(torch.ones(len(x), 1, 1, 1), k, k, **options, return_stats=True, backend="cpu")
    return stats.received[:, 0, 0].double() / stats.received[:, 0, 1].double()


@on(CPU)
def test_exponential(backend):
    x = torch.cat([torch.linspace(-86.0, 0.0, 20001), torch.linspace(-1e-3, 0.0, 99), -torch.rand(999)])
    assert ((ratios(x) - x.double().exp()) / x.double().exp()).abs().max() < 3e-7
    assert not ratios(torch.tensor([-88.0, -100.0, -1e30, -float("inf")])).any()
    assert ratios(torch.tensor([float("nan")])).isnan().all()


@on(CPU)
def test_hyperbolic_tangent(backend):
    x = torch.cat([torch.linspace(-30.0, 30.0, 3001), torch.linspace(-1.0, 1.0, 999), torch.logspace(-30, 0, 99)])
    want = (2.0 * (x.double() / 2.0).tanh()).exp()
    assert ((ratios(x, softcap=2.0) - want) / want).abs().max() < 1e-6


@on(CPU)
@pytest.mark.parametrize("few", [0, 1000])
def test_query_heads_of_a_key_head_together_and_apart(backend, monkeypatch, few):
    monkeypatch.setattr(native, "FEW", few)
    for case in ("150 tokens", "33 tokens, two groups", "packed with empty sequences and a tail"):
        compare(run(backend, Problem(case)), exact(case), torch.float32)


@on(CPU)
def test_threads_change_no_bit(backend, threads):
    states = States("long")
    h = [states.states(2080, dtype) for dtype in (torch.float32, torch.bfloat16)]
    problems = [Problem(case) for case in ("150 tokens", "150 tokens packed", "300 tokens")]
    results = []
    for number in (1, 2, 3):
        threads(number)
        found = [x for problem in problems for x in run(backend, problem).values()]
        for x in h:
            leaf, weight = x.clone().requires_grad_(), torch.ones(2080, dtype=x.dtype).requires_grad_()
            sums = cpu.decorrelation_sums([leaf], states.spans, states.layout, 0.1)
            normed = cpu.rms_norm(leaf, weight, 1e-5, states.layout, states.spans, 0.1)
            found += torch.autograd.grad(sums.sum() + normed.out.sum() + normed.total, (leaf, weight))
            found += [sums.detach(), *normed, *cpu.activation_stats([x], states.layout, False).__dict__.values()]
        results.append([x for x in found if x is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on(CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floating_point_unit_is_left_as_it_was(backend, dtype):
    """MMX registers share theirs with x87, whose next operation is NaN unless their state is cleared."""
    states = torch.randn(2, 3, 70, 100, dtype=dtype, requires_grad=True)
    spans = torch.full((3,), 60)
    calls = [
        lambda: flashsink.activation_stats(states.detach(), backend="cpu"),
        lambda: flashsink.decorrelation_loss(states, spans, backend="cpu").backward(),
        lambda: flashsink.attention(*torch.randn(3, 2, 2, 70, 8, dtype=dtype), backend="cpu", return_stats=True),
    ]
    for call in calls:
        call()
        assert (np.arange(8, dtype=np.longdouble) + 1).sum() == 36


@torch.no_grad()
@on(CPU[:1])
def test_wider_vectors_are_faster(backend):
    """Where the compiler keeps them in registers: vectors twice as wide as AVX2's took six times as long."""
    q, k = torch.randn(1, 4, 512, 64), torch.randn(1, 2, 512, 64)
    levels = [level for level in range(3) if library.library().flashsink_limit_isa(level) == level]
    best = dict.fromkeys(levels, np.inf)
    try:
        for level in levels * 7:
            library.library().flashsink_limit_isa(level)
            began = time.process_time()
            flashsink.attention(q, k, k, backend="cpu")
            best[level] = min(best[level], time.process_time() - began)
    finally:
        library.library().flashsink_limit_isa(2)
    assert all(best[wide] < 0.9 * best[level] for level, wide in itertools.pairwise(levels)), best
