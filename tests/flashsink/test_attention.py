"""flashsink.attention on every backend against the oracle: out, statistics and gradients."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import (
    ATTENTION,
    BACKENDS,
    HALF,
    KERNELS,
    LONG,
    TOLERANCE,
    TRITON,
    Problem,
    compare,
    exact,
    on,
    run,
    sink_logits,
)

import flashsink

FEW = ["17 tokens, GQA 3", "both", "packed with empty sequences and a tail"]


@on(KERNELS + HALF)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", ATTENTION | LONG)
def test_out_statistics_and_gradients(backend, case, causal):
    """Padding holds NaN or infinity in q, k and v, and the gradients of padded queries are NaN: they change nothing."""
    if not backend.takes(backend.dtype, ATTENTION.get(case, (0,) * 6)[5]) or (backend.interpreted and case in LONG):
        pytest.skip("not for these kernels, or slow in the interpreter")
    problem = Problem(case, backend.dtype, device=backend.device, poison=float("nan" if causal else "inf"))
    counted = case in ("both", "queries at the end", "queries in padding", "150 tokens, 101 queries")
    found = run(backend, problem, causal=causal, counted=counted)
    compare(found, exact(case, causal, backend.dtype, counted=counted), backend.dtype)
    # and exactly 0 at padding
    assert not found["out"].transpose(1, 2)[problem.silent].any() and not found["queries"][problem.padding].any()
    assert not found["lse"].transpose(1, 2)[problem.silent].any()
    for name, where in (("received", problem.padding), ("early", problem.padding), ("dq", problem.silent)):
        assert not found[name].transpose(1, 2)[where].any(), name
    assert not any(found[name].transpose(1, 2)[problem.padding].any() for name in ("dk", "dv"))


@on(KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["33 tokens, two groups", "both", "packed", "queries at the end"])
def test_half_precision_error_is_at_most_twice_that_of_plain_pytorch(backend, case, dtype):
    if not backend.takes(dtype) or backend.level is not None:
        pytest.skip("not for these kernels, or widened before them")
    spread = 1.5
    problem = Problem(case, dtype, device=backend.device, spread=spread)
    found, want = run(backend, problem), exact(case, dtype=dtype, spread=spread)
    plain = Problem(case, dtype, spread=spread, poison=0.0)
    leaves = plain.leaves()
    q, k, _ = leaves
    mask = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    for b, row in enumerate(oracle.runs(q.shape[0], k.shape[2], **plain.layout)):
        for i in range(q.shape[2]):
            mask[b, 0, i, oracle.keys_of(row, k.shape[2] - q.shape[2] + i, True)] = True
    out = oracle.plain_attention(*leaves, mask)
    baseline = [out.detach(), *torch.autograd.grad(out, leaves, plain.upstream.to(dtype))]
    for name, other in zip(("out", "dq", "dk", "dv"), baseline, strict=True):
        error, bar = ((x.cpu().double() - want[name]).abs().max() for x in (found[name], other))
        assert error <= 2 * bar, name
    compare(found, want, dtype, spread**2)


@on(KERNELS + HALF)
@pytest.mark.parametrize("scale", [2.5, -0.5, 0.0, 1e-30, -1e-30])
@pytest.mark.parametrize("case", ["odd D", "both", "300 tokens", "264 features"])
def test_scale(backend, case, scale):
    """With 0 every visible key gets the same; with a negative scale the order of the scores is reversed."""
    if backend.level is not None or backend.device != "cpu" or (backend.interpreted and case in LONG):
        pytest.skip("where the scale comes in is covered by the others")
    if scale > 1.0 and case in LONG:
        pytest.skip("scores so large that float32 is not exact enough")
    for causal in (True, False) if scale < 1.0 else (True,):
        found = run(backend, Problem(case, backend.dtype), scale=scale, causal=causal)
        want = exact(case, causal, backend.dtype, scale=scale)
        # a score is rounded with the scale, and so is the gradient that goes back to it
        compare(found, want, backend.dtype, 10.0 if backend.dtype == torch.float32 else max(1.0, scale**2))


@on(KERNELS)
@pytest.mark.parametrize("scale", [1e3, -1e3])
@pytest.mark.parametrize("case", ["both", "packed", "queries at the end"])
def test_scores_of_ten_thousand(backend, case, scale):
    """Float32 then knows a score to a thousandth: so exact are the probabilities, and the gradients of the scores."""
    if backend.level is not None or backend.device != "cpu":
        pytest.skip("where the scale comes in is covered by the others")
    for causal in (True, False):
        found, want = run(backend, Problem(case), scale=scale, causal=causal), exact(case, causal, scale=scale)
        for name in ("dq", "dk"):
            error = (found.pop(name) - want[name]).abs().max()
            assert error < 1e-2 * abs(scale), name  # also where it is NaN
        compare(found, want, torch.float32, 1e3)


@on(KERNELS + HALF)
@pytest.mark.parametrize("size", [-3.0, 4.0])
@pytest.mark.parametrize("case", FEW)
def test_sink_logits_and_their_gradient(backend, case, size):
    if backend.level is not None:
        pytest.skip("the kernels do not see them")
    problem, logits = Problem(case, backend.dtype, device=backend.device), sink_logits(case, size)
    want = exact(case, dtype=backend.dtype, sink=size)
    compare(run(backend, problem, sink_logits=logits), want, backend.dtype)
    with torch.no_grad():  # another way on the CPU
        options = problem.layout | {"backend": backend.name, "return_stats": True}
        out, stats = flashsink.attention(*problem.qkv, **options, sink_logits=logits.to(backend.device))
    compare({"out": out, "lse": stats.lse, "received": stats.received, "queries": stats.queries}, want, backend.dtype)


def test_float64_and_wide_heads(backend):
    problem = Problem("left padding", torch.float64)
    if backend.name == "triton":
        with pytest.raises(ValueError, match=r"backend.*triton.*float64"):
            flashsink.attention(*problem.qkv, **problem.layout, backend="triton")
        wide = torch.randn(1, 1, 4, 264, device=backend.device)
        with pytest.raises(ValueError, match=r"backend.*triton.*head dims up to 128"):
            flashsink.attention(wide, wide, wide, backend="triton")
        assert flashsink.attention(wide, wide, wide).isfinite().all()  # the default chooses another
        return
    out = flashsink.attention(*problem.qkv, **problem.layout, backend=backend.name)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, exact("left padding", dtype=torch.float64)["out"], rtol=1e-12, atol=1e-12)


@on(BACKENDS + HALF)
def test_a_sequence_gives_the_same_alone_padded_and_packed(backend):
    """In half precision but for the rounding of probabilities: the largest score so far divides them, and the parts in
    which that is found differ."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 9, 8, generator=g).to(backend.device, backend.dtype) for n in (4, 2, 2))
    alone, stats = flashsink.attention(q, k, v, backend=backend.name, return_stats=True)
    fill = [torch.randn(1, n, 16, 8, generator=g).to(backend.device, backend.dtype) for n in (4, 2, 2)]
    eps = torch.finfo(backend.dtype).eps
    rtol, atol = (1e-5, 1e-6) if backend.dtype == torch.float32 else (eps, eps)
    for first, layout in (
        (0, {"lengths": [9]}),
        (3, {"starts": [3], "lengths": [9]}),
        (3, {"cu_seqlens": [0, 3, 12, 16]}),
    ):
        inside = slice(first, first + 9)
        rows = [x.clone() for x in fill]
        for big, small in zip(rows, (q, k, v), strict=True):
            big[:, :, inside] = small
        where = {name: torch.tensor(value, dtype=torch.int32, device=backend.device) for name, value in layout.items()}
        out, more = flashsink.attention(*rows, **where, backend=backend.name, return_stats=True)
        torch.testing.assert_close(out[:, :, inside], alone, rtol=rtol, atol=atol)
        torch.testing.assert_close(more.received[:, :, inside], stats.received, rtol=1e-5, atol=1e-6)
        assert torch.equal(more.queries[:, inside], stats.queries)


@on(KERNELS)
@pytest.mark.parametrize("sink", [None, 0.5])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_infinite_scores(backend, causal, sink):
    """A score of inf gives NaN, and so do scores that are all -inf, unless a sink logit takes what there is; other rows
    are as they were."""
    q, k, v = (x.to(backend.device) for x in torch.randn(3, 2, 2, 21, 16, generator=torch.Generator().manual_seed(2)))
    k = k.abs() + 0.1
    options = {"causal": causal, "backend": backend.name, "return_stats": True}
    if sink is not None:
        options["sink_logits"] = torch.full((2,), sink, device=backend.device)
    want, want_stats = flashsink.attention(q, k, v, **options)
    for value in (torch.inf, -torch.inf):
        given = q.clone()
        given[0, 1, 7, 3] = value
        out, stats = flashsink.attention(given, k, v, **options)
        lost, lse = out[0, 1, 7].clone(), stats.lse[0, 1, 7].clone()
        out[0, 1, 7], stats.lse[0, 1, 7] = want[0, 1, 7], want_stats.lse[0, 1, 7]
        torch.testing.assert_close((out, stats.lse), (want, want_stats.lse))
        if value < 0.0 and sink is not None:
            assert not lost.any() and float(lse) == sink
        else:
            assert lost.isnan().all() and not lse.isfinite()


@on(TRITON)
@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite(backend, value, scale, dim=16):
    """A key whose scores are NaN or infinite is lost for the queries that see it and the keys that these see, and for
    no other query, key or sequence."""
    q, k, v = torch.randn(3, 1, 2, 44, dim, generator=torch.Generator().manual_seed(3)).to(backend.dtype)
    q[..., 2:4], k[..., 2:4] = 1e25, 0.0  # what is 0 in the sums stays 0 times these
    bounds, lost = torch.tensor([0, 21, 44], device=backend.device), 24
    found = []
    for spoil in (False, True):
        key = k.clone()
        if spoil:
            key[..., lost, 2] = 1e25 if scale > 0.0 else -1e25
            key[..., lost, 3] = key[..., lost, 2] * (0 if value == torch.inf else -1)
        leaves = [x.to(backend.device).requires_grad_() for x in (q, key, v)]
        options = {"cu_seqlens": bounds, "scale": scale, "backend": backend.name, "return_stats": True}
        out, stats = flashsink.attention(*leaves, **options)
        of_q, *of_keys = torch.autograd.grad(out.float().sin().sum(), leaves)
        queries, keys = [out, of_q, stats.lse[..., None]], [*of_keys, stats.received[..., None]]
        found.append(([x.cpu() for x in queries], [x.cpu() for x in keys]))
    for first, clean, spoiled in ((lost, found[0][0], found[1][0]), (21, found[0][1], found[1][1])):
        for want, got in zip(clean, spoiled, strict=True):
            assert torch.equal(got[:, :, :first], want[:, :, :first]) and want.isfinite().all()
            assert got[:, :, first:].isnan().all()


@on(KERNELS)
def test_a_sink_logit_of_minus_infinity_is_none(backend):
    problem = Problem("both", backend.dtype, device=backend.device)
    found, want = run(backend, problem, sink_logits=torch.full((3,), -torch.inf)), exact("both", dtype=backend.dtype)
    assert not found.pop("dsink").any()
    compare(found, want, backend.dtype)


@on(BACKENDS + HALF)
def test_large_scores_and_an_extreme_loss_scale(backend):
    """Scores of several hundred stay finite; a loss scaled by 65,536 gives gradients scaled by it."""
    problem = Problem("both", backend.dtype, device=backend.device, spread=20.0)
    results = []
    for factor in (1.0, 65536.0):
        leaves = problem.leaves()
        out, stats = flashsink.attention(*leaves, **problem.layout, backend=backend.name, return_stats=True)
        (out.sin().sum() * factor).backward()
        results.append([x.grad for x in leaves])
    want = exact("both", dtype=backend.dtype, spread=20.0)
    tolerance = max(5e-3, TOLERANCE[backend.dtype])
    torch.testing.assert_close(out.detach().cpu().double(), want["out"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats.lse.cpu().double(), want["lse"], rtol=1e-5, atol=1e-3)
    for plain, scaled in zip(*results, strict=True):
        assert plain.isfinite().all()
        torch.testing.assert_close(scaled / 65536.0, plain, rtol=1e-6, atol=1e-30)


@on(BACKENDS + HALF)
@pytest.mark.parametrize("case", ["odd D", "packed"])
def test_twice_is_the_same_bits_with_or_without_statistics(backend, case):
    problem = Problem(case, backend.dtype, device=backend.device)
    results = []
    for stats in (False, True, True):
        leaves = problem.leaves()
        options = problem.layout | {"backend": backend.name, "return_stats": stats}
        found = flashsink.attention(*leaves, **options)
        out = found[0] if stats else found
        out.nan_to_num(0.0).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_default_backend_is_one_of_them():
    problem = Problem("packed")
    out = flashsink.attention(*problem.qkv, **problem.layout)
    torch.testing.assert_close(out.double(), exact("packed")["out"], rtol=5e-6, atol=5e-6)
