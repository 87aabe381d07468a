"""SinkStats: what is made of the attention received, and how the backends find it out."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, HALF, TRITON, Problem, exact, on

import flashsink


@pytest.mark.parametrize("case", ["17 tokens, GQA 3", "odd D", "packed"])
@pytest.mark.parametrize(("eps", "min_queries"), [(0.3, 1), (0.1, 8), (0.6, 3), (0.1, 0)])
def test_sink_rate(case, eps, min_queries):
    problem = Problem(case, spread=2.0)
    _, stats = flashsink.attention(*problem.qkv, **problem.layout, backend="reference", return_stats=True)
    want = exact(case, spread=2.0)
    mean, queries = want["mean_received"], want["queries"]
    assert (mean - eps).abs().min() > 1e-5  # no coin toss at the threshold
    rate = stats.sink_rate(eps=eps, min_queries=min_queries)
    expected = ((mean > eps) & (queries >= max(min_queries, 1))[:, None]).double().mean(1)
    torch.testing.assert_close(rate.double(), expected, rtol=1e-6, atol=1e-6)
    if (eps, min_queries) == (0.3, 1):
        assert torch.equal(rate, stats.sink_rate())


def test_sink_rate_counts_a_planted_sink(backend):
    q = torch.zeros(1, 4, 12, 8, device=backend.device)
    k = torch.zeros_like(q)
    q[..., 0] = 8.0
    k[:, :3, 2, 0] = 10.0  # key 2 takes everything in three heads of four
    _, stats = flashsink.attention(q, k, torch.randn_like(q), backend=backend.name, return_stats=True)
    assert stats.sink_rate(0.9)[0, 2].item() == 0.75
    assert stats.queries[0].tolist() == list(range(12, 0, -1))
    assert stats.received[0, 0, 2].item() == pytest.approx(10.0)
    assert stats.sink_rate(0.3, min_queries=11)[0, 2].item() == 0.0


@on(BACKENDS + HALF)
@pytest.mark.parametrize("trained", [True, False])
def test_they_are_float32_without_a_graph(backend, trained):
    problem = Problem("both", backend.dtype, device=backend.device)
    leaves = problem.leaves() if trained else problem.qkv
    _, stats = flashsink.attention(*leaves, **problem.layout, backend=backend.name, return_stats=True)
    for value in (stats.received, stats.mean_received, stats.lse, stats.sink_rate()):
        assert value.dtype == torch.float32 and not value.requires_grad


@on(BACKENDS + HALF)
def test_they_are_found_out_once(backend):
    """What was read before the backward is not found out again, and a second backward of a graph adds nothing."""
    problem = Problem("odd D", backend.dtype, device=backend.device)
    out, stats = flashsink.attention(*problem.leaves(), **problem.layout, backend=backend.name, return_stats=True)
    before = stats.received
    out.nan_to_num().sum().backward()
    assert stats.received is before
    out, stats = flashsink.attention(*problem.leaves(), **problem.layout, backend=backend.name, return_stats=True)
    out.nan_to_num().sum().backward(retain_graph=True)
    captured = stats.received.clone()
    out.nan_to_num().sum().backward()
    assert torch.equal(stats.received, captured)
    torch.testing.assert_close(captured, before, rtol=1e-5, atol=1e-6)


@on(TRITON)
def test_nothing_is_held_for_them_where_they_wait_for_the_backward(backend):
    problem = Problem("17 tokens, GQA 3", device=backend.device)
    out, stats = flashsink.attention(*problem.leaves(), backend=backend.name, return_stats=True)
    stats.wait_for_backward()
    with pytest.raises(RuntimeError, match="after the backward"):
        _ = stats.received
    out.sum().backward()
    want = exact("17 tokens, GQA 3")["received"]
    torch.testing.assert_close(stats.received.cpu().double(), want, rtol=1e-5, atol=1e-5)
