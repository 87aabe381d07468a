"""Attention mass between kinds of tokens and the entropy of every query, against the oracle."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from cases import BACKENDS, LONG, PATTERNS, TOLERANCE, Backend, Problem, compare, exact, on, run, sink_logits

import flashsink
from flashsink import dispatch, sdpa
from flashsink.checks import MOST_SEGMENTS, resolve_layout
from flashsink.types import Segments

TAKE = [b for b in BACKENDS if not isinstance(b, Backend) or b.name != "sdpa"]
CPU = [b for b in TAKE if isinstance(b, Backend) and b.name == "cpu"]
LEVELS = [*TAKE, *(Backend("cpu", level=n) for _ in CPU for n in (1, 0))]
CASES = ["one token", "17 tokens, GQA 3", "both", "queries in padding", "packed with empty sequences and a tail"]


def ids_of(problem, count=4):
    """Tokens of some and of no segment; the last has none. Padding holds what cannot be a number."""
    ids = torch.randint(-1, count - 1, problem.padding.shape, generator=torch.Generator().manual_seed(5))
    return ids.masked_fill(problem.padding, 10**9)


@functools.cache
def wanted(case, counted, sink, pattern, causal, dtype):
    problem = Problem(case, dtype)
    options, first = {} if pattern is None else problem.pattern(pattern), problem.first if counted else None
    options |= problem.layout | {"causal": causal, "query_starts": first}
    attended = oracle.Attention(*problem.qkv, **options, sink_logits=None if sink is None else sink_logits(case, sink))
    rows = oracle.runs(*problem.padding.shape, **problem.layout)
    return options, attended, attended.by_segment(ids_of(problem), 4, rows, first)


def check(backend, case, counted=False, sink=None, pattern=None, causal=True, dtype=torch.float32):
    problem = Problem(case, dtype)
    options, attended, want = wanted(case, counted, sink, pattern, causal, dtype)
    options = options | {"sink_logits": None if sink is None else sink_logits(case, sink)}
    given = options | {"segments": ids_of(problem).int()}
    given = {key: x.to(backend.device) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    qkv = [x.to(backend.device) for x in problem.qkv]
    out, stats = flashsink.attention(*qkv, **given, return_stats=True, backend=backend.name, num_segments=4)
    received, mass, queries, entropy = want
    found = {
        "segment_received": received,
        "segment_mass": mass,
        "mean_segment_mass": mass / queries.clamp(min=1)[:, None, :, None],
        "entropy": entropy,
        "received": attended.received,
    }
    assert torch.equal(stats.segment_queries.cpu(), queries)
    for name, value in found.items():
        got = getattr(stats, name)
        assert got.dtype == torch.float32 and got.shape == value.shape and not got.requires_grad, name
        torch.testing.assert_close(got.cpu().double(), value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    tolerance = TOLERANCE.get(dtype, 1e-12)
    torch.testing.assert_close(out.cpu().double(), attended.out, rtol=tolerance, atol=tolerance)


@on(LEVELS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", [*CASES, *(case for case in LONG if "150" in case)])
def test_mass_queries_and_entropy(backend, case, causal):
    check(backend, case, counted="packed" not in case, causal=causal)


@on(LEVELS)
@pytest.mark.parametrize("pattern", [name for name in PATTERNS if "mask" not in name])
@pytest.mark.parametrize("case", ["both", "packed with empty sequences and a tail"])
def test_with_patterns_and_sink_logits(backend, case, pattern):
    check(backend, case, pattern=pattern, sink=2.0 if pattern in ("window", "all") else None)


@on(TAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(backend, dtype):
    if not backend.takes(dtype):
        pytest.skip("not for these kernels")
    check(backend, "both", sink=-1.0, dtype=dtype)


@on(LEVELS)
def test_out_gradients_and_received_are_those_without(backend):
    for pattern in (None, "all"):
        problem = Problem("both")
        options = {} if pattern is None else problem.pattern(pattern)
        found = run(backend, problem, segments=ids_of(problem), **options)
        compare(found, exact("both", pattern=pattern), torch.float32)


@on(TAKE)
def test_what_they_mean(backend):
    """Equal scores: the entropy of n keys is log n, a row's mass is spread evenly, and all of it is in some segment."""
    q, k, v = torch.zeros(1, 2, 6, 8), torch.zeros(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    options = {"backend": backend.name, "return_stats": True}
    _, stats = flashsink.attention(q, k, v, **options, segments=torch.tensor([[0, 1, 1, 1, 2, 2]]))
    torch.testing.assert_close(stats.entropy[0, 0], torch.arange(1, 7).log())
    torch.testing.assert_close(
        stats.mean_segment_mass[0, 1, 2], torch.tensor([1 / 5 + 1 / 6, 3 / 5 + 3 / 6, 1 / 5 + 2 / 6]) / 2
    )
    torch.testing.assert_close(stats.mean_segment_mass.sum(-1), torch.ones(1, 2, 3))
    torch.testing.assert_close(stats.segment_received.sum(2), stats.received)
    _, with_sink = flashsink.attention(
        q, k, v, **options, sink_logits=torch.zeros(2), segments=torch.zeros(1, 6).long()
    )
    p = 1.0 / torch.arange(2, 8)  # of every key
    torch.testing.assert_close(with_sink.entropy[0, 1], -torch.arange(1, 7) * p * p.log())
    _, without = flashsink.attention(q, k, v, **options)
    assert without.segment_mass is without.entropy is without.mean_segment_mass is None


@on([b for b in TAKE if b not in TAKE[:1]])
def test_a_sharp_query_keeps_the_digits_of_its_entropy(backend):
    """Scores around 1,000, of which one stands out: lse - sum of p x would be a rounding error."""
    q, k = torch.ones(1, 1, 9, 1), torch.full((1, 1, 9, 1), 1000.0)
    k[0, 0, 0] = 1006.0
    ids = torch.zeros(1, 9, device=backend.device).long()
    options = {"scale": 1.0, "return_stats": True, "backend": backend.name, "segments": ids, "num_segments": 1}
    _, stats = flashsink.attention(*(x.to(backend.device) for x in (q, k, k)), **options)
    p = torch.softmax(k[0, 0, :, 0].double(), 0)
    torch.testing.assert_close(stats.entropy[0, 0, -1].cpu().double(), -(p * p.log()).sum(), rtol=1e-5, atol=0.0)


@on(TAKE)
def test_a_negative_scale_is_that_of_negative_queries(backend):
    q, k, v = torch.randn(3, 1, 2, 21, 16, generator=torch.Generator().manual_seed(1)).to(backend.device)
    ids = torch.arange(21, device=backend.device)[None] % 3
    options = {"return_stats": True, "backend": backend.name, "segments": ids, "num_segments": 3}
    (_, want), (_, got) = (flashsink.attention(x, k, v, **options, scale=s) for x, s in ((-q, 0.7), (q, -0.7)))
    torch.testing.assert_close(got.entropy, want.entropy)
    torch.testing.assert_close(got.segment_mass, want.segment_mass)


@on(TAKE)
def test_scores_that_are_not_finite(backend):
    """A visible score of -inf is a probability of 0, whose p ln p is 0; NaN makes its query's entropy NaN alone."""
    q, k = torch.ones(1, 1, 9, 1), torch.zeros(1, 1, 9, 1)
    k[0, 0, 3], k[0, 0, 7] = -torch.inf, torch.nan
    ids = torch.zeros(1, 9, device=backend.device).long()
    options = {"scale": 1.0, "return_stats": True, "backend": backend.name, "segments": ids, "num_segments": 1}
    _, stats = flashsink.attention(*(x.to(backend.device) for x in (q, k, torch.ones_like(k))), **options)
    want = torch.tensor([1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 6.0, torch.nan, torch.nan]).log()
    torch.testing.assert_close(stats.entropy[0, 0].cpu(), want, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segments": torch.zeros(2, 5)}, r"segments: expected integers \(2, 5\), got \(2, 5\) torch.float32"),
        ({"segments": torch.zeros(5).long()}, r"segments: expected integers \(2, 5\)"),
        ({"segments": [0] * 5}, "segments: .*got list"),
        ({"segments": torch.tensor([[0] * 5, [0, 1, 2, 3, 9]]), "num_segments": 9}, "segments: .*below 9, got 9"),
        ({"segments": torch.full((2, 5), MOST_SEGMENTS)}, "segments: .*below 64, got 64"),
        ({"segments": torch.zeros(2, 5).long(), "num_segments": 0}, "num_segments: expected 1 to 64, got 0"),
        ({"num_segments": True}, "num_segments: .*got True"),
        ({"segments": torch.zeros(2, 5).long(), "return_stats": False}, "segments: .*return_stats=True"),
        ({"segments": torch.zeros(2, 5, device="meta").long()}, "segments: .*cpu, got meta"),
    ],
)
def test_bad_input(options, words):
    x = torch.randn(2, 1, 5, 8)
    with pytest.raises(ValueError, match=words):
        flashsink.attention(x, x, x, **({"return_stats": True} | options))


def test_sdpa_refuses_by_name(monkeypatch):
    monkeypatch.setattr(dispatch, "_state", lambda name: "usable")
    q, layout = torch.randn(1, 2, 9, 8).bfloat16(), resolve_layout(1, 9, torch.device("cpu"))
    kinds = Segments(torch.zeros(1, 9).long(), 1)
    with pytest.raises(ValueError, match="backend: 'sdpa' cannot be used: .*does not take segments"):
        dispatch.select("sdpa", "cuda", q, q, segments=True)
    with pytest.raises(ValueError, match="does not take segments"):
        sdpa.attention(q, q, q, layout, causal=True, scale=1.0, counted=[None], segments=kinds)
    monkeypatch.setattr(dispatch, "_failed", lambda *_: "")
    assert dispatch.select(None, "cuda", q, q, segments=True) == "triton"


@on(TAKE)
@pytest.mark.integration
def test_compiled_gives_the_same(backend, tracing):
    """With their number, which a graph cannot read from the ids."""
    problem = Problem("both", poison=0.0)
    ids = ids_of(problem).clamp(max=3)

    def attend(q, k, v, **more):
        given = problem.layout | more | {"return_stats": True, "backend": backend.name, "segments": ids}
        stats = flashsink.attention(q, k, v, **given)[1]
        return stats.segment_mass, stats.segment_queries, stats.entropy

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    want = attend(*problem.qkv, num_segments=4)
    torch.testing.assert_close(compiled(*problem.qkv, num_segments=4), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(Exception, match="num_segments: expected beside"):
        compiled(*problem.qkv)
