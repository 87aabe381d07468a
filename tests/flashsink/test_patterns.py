"""Windows, chunks, prefixes, blocks, masks, capped scores and values of another head dim, against the oracle and
against torch's flex attention; which backends take them; and the memory they need."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path

import oracle
import pytest
import torch
from cases import BACKENDS, PATTERNS, TRITON, Backend, Problem, compare, exact, on, run, sink_logits

import flashsink
from flashsink import dispatch, reference, sdpa
from flashsink.checks import resolve_layout
from flashsink.types import Layout, Pattern

pytestmark = pytest.mark.integration

TAKE = [b for b in BACKENDS if isinstance(b, Backend) and b.name in ("reference", "cpu")]
CPU = [b for b in TAKE if b.name == "cpu"]
LEVELS = [*TAKE, *(Backend("cpu", level=n) for _ in CPU for n in (1, 0))]
PUBLIC = [name for name in PATTERNS if "mask" not in name]
CASES = ["17 tokens, GQA 3", "both", "queries at the end", "packed with empty sequences and a tail"]
ALL = [*LEVELS, *TRITON]
# what the interpreter is given time for: (case, pattern, causal), every pattern and case in both orders
CHOSEN = {
    *(("both", x, True) for x in ("window", "blocks")),
    *(("both", x, False) for x in ("chunk", "all")),
    *(("17 tokens, GQA 3", x, True) for x in ("own token", "softcap")),
    ("17 tokens, GQA 3", "image", False),
    *(("queries at the end", x, True) for x in ("prefix", "image")),
    *(("queries at the end", x, False) for x in ("window", "softcap")),
    *((CASES[3], x, True) for x in ("chunk", "prefix", "all")),
    *((CASES[3], x, False) for x in ("own token", "blocks", "prefix")),
}


@on(ALL)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("pattern", PUBLIC)
@pytest.mark.parametrize("case", CASES)
def test_out_statistics_and_gradients(backend, case, pattern, causal):
    """Padding holds NaN or infinity, and the gradients of padded queries are NaN: they change nothing."""
    if backend.interpreted and (case, pattern, causal) not in CHOSEN:
        pytest.skip("slow in the interpreter")
    problem = Problem(case, backend.dtype, device=backend.device, poison=float("nan" if causal else "inf"))
    counted = case in ("both", "queries at the end")
    found = run(backend, problem, causal=causal, counted=counted, **problem.pattern(pattern))
    compare(found, exact(case, causal, backend.dtype, counted=counted, pattern=pattern), backend.dtype)
    assert not found["out"].transpose(1, 2)[problem.silent].any() and not found["queries"][problem.padding].any()
    assert not found["lse"].transpose(1, 2)[problem.silent].any()
    assert not any(found[name].transpose(1, 2)[problem.padding].any() for name in ("dk", "dv", "received"))


@on(TAKE)
@pytest.mark.parametrize("pattern", ["window", "all"])
@pytest.mark.parametrize("case", ["150 tokens", "150 tokens, 101 queries", "150 tokens packed"])
def test_several_blocks(backend, case, pattern):
    problem = Problem(case)
    compare(run(backend, problem, **problem.pattern(pattern)), exact(case, pattern=pattern), torch.float32)


@on(ALL)
@pytest.mark.parametrize("pattern", ["window", "all"])
@pytest.mark.parametrize("size", [-3.0, 95.0])
@pytest.mark.parametrize("case", CASES)
def test_sink_logits_and_their_gradient(backend, case, size, pattern):
    if backend.interpreted and (case, size, pattern) not in ((CASES[0], 95.0, "window"), (CASES[2], -3.0, "all")):
        pytest.skip("slow in the interpreter")
    problem, logits = Problem(case, backend.dtype, device=backend.device), sink_logits(case, size)
    found = run(backend, problem, sink_logits=logits, **problem.pattern(pattern))
    compare(found, exact(case, dtype=backend.dtype, sink=size, pattern=pattern), backend.dtype, 2.0)


@on([*TAKE, *TRITON])
@pytest.mark.parametrize("pattern", [None, "all"])
@pytest.mark.parametrize(("case", "features"), [("both", 5), ("queries at the end", 24), ("packed", 3)])
def test_values_of_another_head_dim(backend, case, pattern, features):
    if backend.interpreted and (case, pattern) not in (("both", None), ("queries at the end", None), ("packed", "all")):
        pytest.skip("slow in the interpreter")
    problem = Problem(case, backend.dtype, device=backend.device, features=features)
    options = {} if pattern is None else problem.pattern(pattern)
    found = run(backend, problem, **options)
    assert found["out"].shape[3] == features
    compare(found, exact(case, dtype=backend.dtype, pattern=pattern, features=features), backend.dtype)


@on(ALL)
@pytest.mark.parametrize("pattern", ["mask", "mask of rows"])
@pytest.mark.parametrize("case", [*CASES, "150 tokens"])
def test_masks(backend, case, pattern):
    """Exactly the pairs of the mask, within a row or sequence; queries that see nothing give 0."""
    if backend.interpreted and (case, pattern) not in ((CASES[0], "mask"), (CASES[2], "mask of rows")):
        pytest.skip("slow in the interpreter")
    problem, want = (
        Problem(case, backend.dtype, device=backend.device),
        exact(case, dtype=backend.dtype, pattern=pattern),
    )
    leaves, options = problem.leaves(), problem.pattern(pattern)
    softcap = options.pop("softcap", None)
    layout = resolve_layout(*problem.padding.shape, leaves[0].device, **problem.layout)
    out, [stats] = backend.module.attention(
        *(*leaves, layout),
        **{"causal": True, "scale": leaves[0].shape[3] ** -0.5, "counted": [None], "softcap": softcap},
        pattern=Pattern(**options),
    )
    silent = problem.silent[:, None, :, None].to(out.device)
    upstream = problem.upstream.masked_fill(silent, 0.0).to(out.dtype)
    found = {"out": out.detach(), "lse": stats.lse, "received": stats.received, "queries": stats.queries}
    found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, upstream), strict=True))
    compare(found, want, backend.dtype)
    blind = (want["lse"] == 0.0) & ~problem.silent[:, None]
    assert blind.any() and not out[blind].any()


@on(ALL)
@pytest.mark.parametrize("sink", [None, 0.5])
def test_scores_of_minus_infinity_under_a_mask(backend, sink):
    """All that a query sees being -inf is NaN, or what a sink logit takes; where all is hidden it is 0."""
    q, k, v = (x.to(backend.device) for x in torch.randn(3, 1, 2, 21, 16, generator=torch.Generator().manual_seed(2)))
    k, mask = k.abs() + 0.1, torch.ones(21, 21).tril().bool()
    mask[4], mask[9, 2:] = False, False
    layout = resolve_layout(1, 21, q.device)
    options = {"causal": True, "scale": 0.2, "counted": [None], "pattern": Pattern(mask=mask[None, None].to(q.device))}
    options["sink_logits"] = None if sink is None else torch.full((2,), sink, device=q.device)
    want, [want_stats] = backend.module.attention(q, k, v, layout, **options)
    given = q.clone()
    given[0, :, [4, 7, 9, 20], 3] = -torch.inf
    out, [stats] = backend.module.attention(given, k, v, layout, **options)
    lost = torch.tensor([7, 9, 20])
    if sink is None:
        assert out[:, :, lost].isnan().all() and not stats.lse[:, :, lost].isfinite().any()
    else:
        assert not out[:, :, lost].any() and bool((stats.lse[:, :, lost] == sink).all())
    assert not out[:, :, 4].any() and not stats.lse[:, :, 4].any()
    rest = [i for i in range(21) if i not in (7, 9, 20)]
    torch.testing.assert_close((out[:, :, rest], stats.lse[:, :, rest]), (want[:, :, rest], want_stats.lse[:, :, rest]))


@on([*TAKE, *(b for b in TRITON if b.interpreted)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pattern", ["window", "all"])
def test_other_dtypes(backend, dtype, pattern):
    if not backend.takes(dtype) or (backend.interpreted and pattern == "window"):
        pytest.skip("not for these kernels, or slow in the interpreter")
    problem = Problem("both", dtype)
    found = run(backend, problem, **problem.pattern(pattern))
    want = exact("both", dtype=dtype, pattern=pattern)
    assert found["out"].dtype == dtype and found["dv"].dtype == dtype
    if dtype == torch.float64:
        assert all((found[n] - want[n]).abs().max() < 1e-12 for n in ("out", "dq", "dk", "dv"))
        return
    compare(found, want, dtype)
    if backend.name == "triton":
        return
    rounded = want["out"].to(dtype)  # computed in float32: one rounding
    assert (found["out"] - rounded).abs().max() <= torch.finfo(dtype).eps * rounded.abs().max()


def test_large_scores_stay_finite_under_a_cap():
    q, k, v = (200.0 * torch.randn(1, 2, 70, 8) for _ in range(3))
    for backend in (b.name for b in [*TAKE, *TRITON] if b.device == "cpu"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = flashsink.attention(*leaves, softcap=50.0, window=20, backend=backend)
        want = oracle.Attention(q, k, v, softcap=50.0, window=20).out
        torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-2)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


@on([*TAKE, *TRITON])
@pytest.mark.parametrize("options", [{"window": 17}, {"chunk": 400}, {"window": 33, "chunk": 17}])
def test_what_leaves_nothing_out_is_no_pattern(backend, options):
    """The same bits, hence the same kernel."""
    problem = Problem("17 tokens, GQA 3", backend.dtype, device=backend.device)
    wanted = flashsink.attention(*problem.qkv, backend=backend.name)
    assert torch.equal(flashsink.attention(*problem.qkv, **options, backend=backend.name), wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_visible_cut_into_rows_is_the_whole_cut(packed):
    bounds = (torch.tensor([0, 11]), torch.tensor([11, 9])) if packed else (torch.tensor([2, 0]), torch.tensor([9, 20]))
    layout = Layout(*bounds, 1 if packed else 2, 23, packed)
    blocks = torch.randint(-1, 3, (layout.rows, 23))
    for pattern in (None, Pattern(), Pattern(4, 6, torch.tensor([3, 8]), blocks)):
        whole = reference.visible(layout, 23, True, pattern)
        parts = [reference.visible(layout, 23, True, pattern, slice(n, n + 5)) for n in range(0, 23, 5)]
        assert torch.equal(torch.cat(parts, dim=2), whole)
        assert torch.equal(layout.query_counts(23, True, None, pattern), whole.sum(dim=(1, 2)))


# ---- ACT


@functools.cache
def literal(pattern, size):
    """(random sinks, out of the literal algorithm, mass of every row before it)."""
    problem = Problem("both", poison=0.0)
    options, logits = problem.pattern(pattern), None if size is None else sink_logits("both", size)
    probs = oracle.Attention(*problem.qkv, **problem.layout, **options, sink_logits=logits).probs
    sinks = torch.rand(3, 3, 33, generator=torch.Generator().manual_seed(0)) < 0.4
    calibrated = oracle.act(probs, sinks, oracle.runs(3, 33, **problem.layout), 0.4)
    return sinks, oracle.weigh(calibrated, problem.qkv[2]), probs.sum(-1, keepdim=True)


@on([*TAKE, *(b for b in TRITON if b.interpreted)])
@pytest.mark.parametrize("size", [None, 2.0])
@pytest.mark.parametrize("pattern", ["window", "all"])
def test_calibrated_attention(backend, pattern, size):
    """With a sink logit the keys keep the mass they have together."""
    problem, logits = Problem("both"), None if size is None else sink_logits("both", size)
    q, k, v = problem.qkv
    options, (sinks, want, mass) = problem.pattern(pattern), literal(pattern, size)
    softcap = options.pop("softcap", None)
    layout = resolve_layout(3, 33, torch.device("cpu"), **problem.layout)
    for values, wanted in ((v, want), (torch.ones_like(v), mass)):
        out = backend.module.calibrated_attention(
            *(q, k, values, sinks, layout),
            **{"beta": 0.4, "scale": 0.25, "pattern": Pattern(**options), "softcap": softcap, "sink_logits": logits},
        )
        torch.testing.assert_close(out.double(), wanted.expand(out.shape), rtol=1e-5, atol=1e-5)


# ---- which backends


def test_sdpa_refuses_by_name(monkeypatch):
    monkeypatch.setattr(importlib.import_module("flashsink.dispatch"), "_state", lambda name: "usable")
    q, v = torch.randn(1, 2, 9, 24).bfloat16(), torch.randn(1, 2, 9, 16).bfloat16()
    everything = Pattern(3, 4, torch.tensor([2]), torch.zeros(1, 9).long(), torch.ones(1, 1, 9, 9).bool())
    for options, words in (
        ({"pattern": Pattern(window=8)}, "does not take window"),
        ({"pattern": everything}, "window, chunk, prefix, blocks, mask"),
        ({"softcap": 2.0}, "does not take softcap"),
        ({"v": v}, "v's head dim 16 unlike 24"),
    ):
        given = {"x": q, "v": q} | options
        with pytest.raises(ValueError, match=f"backend: 'sdpa' cannot be used: .*{words}"):
            dispatch.select("sdpa", "cuda", **given)
        assert dispatch.select(None, "cuda", **given) == dispatch.select("triton", "cuda", **given) == "triton"
        assert dispatch.select(None, "cpu", **given) == "cpu"
    for nothing in (None, Pattern(), Pattern(window=9, chunk=9)):
        assert dispatch.select("sdpa", "cuda", q, q, nothing) == "sdpa"


def test_and_so_do_its_functions():
    q, layout = torch.randn(1, 2, 9, 8), resolve_layout(1, 9, torch.device("cpu"))
    for options in ({"pattern": Pattern(window=2)}, {"softcap": 1.0}):
        with pytest.raises(ValueError, match="does not take"):
            sdpa.attention(q, q, q, layout, causal=True, scale=1.0, **options)
        with pytest.raises(ValueError, match="does not take"):
            sdpa.calibrated_attention(q, q, q, q[..., 0] > 0, layout, beta=0.4, scale=1.0, **options)
    with pytest.raises(ValueError, match="unlike"):
        sdpa.attention(q, q, q[..., :4], layout, causal=True, scale=1.0)


@on(CPU)
@pytest.mark.integration
def test_compiled_gives_the_same(backend, tracing):
    """The reference runs in the graph, over any window."""
    problem = Problem("both", poison=0.0)

    options = problem.pattern("all") | problem.layout | {"return_stats": True, "backend": backend.name}

    def attend(q, k, v, window):
        out, stats = flashsink.attention(q * 2.0, k, v, **(options | {"window": window}))
        return out, stats.lse, stats.received, stats.queries

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for window in (4, 7):
        leaves = problem.leaves()
        got, want = compiled(*leaves, window), attend(*leaves, window)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(x[0].sum(), leaves) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- against others


@on([*TAKE, *(b for b in TRITON if b.interpreted)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [96, 41])
def test_equals_torchs_flex_attention(backend, queries):
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    if backend.interpreted and queries == 96:
        pytest.skip("slow in the interpreter")

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, d, generator=g) for h, n, d in ((4, queries, 16), (2, 96, 16), (2, 96, 24)))
    blocks, prefix = torch.randint(-1, 4, (2, 96), generator=g), torch.tensor([5, 0])

    def mask(b, h, i, j):
        i = i + 96 - queries
        near = (j <= i) & (i - j < 11) & (i // 30 == j // 30)
        return near | ((blocks[b, i] == blocks[b, j]) & (blocks[b, i] >= 0)) | ((i < prefix[b]) & (j < prefix[b]))

    seen = create_mask(mask, 2, 1, queries, 96, device="cpu")

    def score(s, b, h, i, j):
        return torch.where(seen[b, 0, i, j], 2.0 * torch.tanh(s / 2.0), -float("inf"))

    want, lse = flex_attention(q, k, v, score_mod=score, enable_gqa=True, return_lse=True)
    options = {"window": 11, "chunk": 30, "softcap": 2.0, "prefix": prefix, "blocks": blocks}
    out, stats = flashsink.attention(q, k, v, **options, backend=backend.name, return_stats=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.lse, lse, rtol=1e-5, atol=1e-5)


def test_windows_and_chunks_are_those_of_transformers():
    masks = pytest.importorskip("transformers.masking_utils")
    layout = resolve_layout(1, 40, torch.device("cpu"), starts=torch.tensor([3]))
    i, j = torch.arange(40)[:, None], torch.arange(40)
    for pattern, function in (
        (Pattern(window=7), masks.sliding_window_causal_mask_function(7)),
        (Pattern(chunk=7), masks.chunked_causal_mask_function(7, torch.tensor([3]))),
    ):
        want = function(0, 0, i, j) & (j >= 3) & (i >= 3)
        assert torch.equal(reference.visible(layout, 40, True, pattern)[0, 0], want)


# ---- memory


@on(CPU)
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux resets the peak")
def test_memory_is_linear_in_the_tokens(backend):
    tokens = 8192
    q, k, v = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))

    def step():
        out, stats = flashsink.attention(q, k, v, window=128, backend="cpu", return_stats=True)
        torch.autograd.grad(out.sum(), (q, k, v))
        return stats.received, stats.mean_received

    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident("VmRSS")
    step()
    assert resident("VmHWM") - before < tokens * tokens * 4 / 8


def resident(name):
    """Bytes, from Linux."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024
