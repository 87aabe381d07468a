"""flashsink.attention against loops over rows, heads, queries and keys in float64."""

from __future__ import annotations

import pytest
import torch

import flashsink

# name: (B, H, Hk, Sq, Sk, D, layout)
CASES = {
    "one token": (1, 1, 1, 1, 1, 32, {}),
    "17 tokens, GQA 3": (2, 3, 1, 17, 17, 32, {}),
    "63 tokens, D 64, GQA 4": (1, 4, 1, 63, 63, 64, {}),
    "65 tokens, D 80, two groups": (1, 4, 2, 65, 65, 80, {}),
    "odd D": (2, 6, 2, 17, 17, 7, {"lengths": [11, 17]}),
    "right padding": (3, 2, 2, 17, 17, 7, {"lengths": [17, 5, 1]}),
    "left padding": (3, 2, 1, 17, 17, 7, {"starts": [0, 5, 16]}),
    "left and right padding": (3, 2, 1, 17, 17, 7, {"starts": [2, 5, 0], "lengths": [9, 12, 3]}),
    "rows without tokens": (3, 2, 1, 9, 9, 7, {"starts": [0, 4, 9], "lengths": [0, 5, 0]}),
    "one query": (2, 2, 1, 1, 17, 7, {}),
    "one query, left padding": (3, 4, 1, 1, 17, 7, {"starts": [0, 3, 16]}),
    "five queries, left padding": (3, 2, 1, 5, 17, 7, {"starts": [0, 3, 14]}),
    "five queries, right padding": (3, 2, 1, 5, 17, 7, {"lengths": [17, 14, 6]}),
    "packed": (1, 4, 2, 20, 20, 7, {"cu_seqlens": [0, 1, 8, 20]}),
    "packed with empty sequences and a tail": (1, 2, 1, 20, 20, 7, {"cu_seqlens": [0, 0, 6, 6, 6, 17, 17]}),
}


def make(case, dtype=torch.float32, spread=1.0):
    """(q, k, v, layout as tensors)."""
    b, h, hk, sq, sk, d, layout = CASES[case]
    g = torch.Generator().manual_seed(len(case))
    q = (torch.randn(b, h, sq, d, generator=g) * spread).to(dtype)
    k = (torch.randn(b, hk, sk, d, generator=g) * spread).to(dtype)
    v = torch.randn(b, hk, sk, d, generator=g).to(dtype)
    return q, k, v, {name: torch.tensor(value) for name, value in layout.items()}


def padded(oracle, case):
    """(B, Sk) bool."""
    b, _, _, _, sk, _, layout = CASES[case]
    keep = torch.zeros(b, sk, dtype=torch.bool)
    for row, sequences in enumerate(oracle.runs(b, sk, **layout)):
        for first, end in sequences:
            keep[row, first:end] = True
    return ~keep


def close(got, expected, tolerance):
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def check_stats(stats, want):
    close(stats.received, want.received, 2e-5)
    close(stats.mean_received, want.mean_received, 2e-6)
    close(stats.lse, want.lse, 5e-6)
    assert torch.equal(stats.queries, want.queries)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CASES)
def test_out_stats_and_gradients(oracle, backend, case, causal):
    q, k, v, layout = make(case)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, stats = flashsink.attention(*leaves, **layout, causal=causal, backend=backend, return_stats=True)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = oracle.Attention(*exact, **layout, causal=causal)
    close(out, want.out, 2e-6)
    assert out.dtype == torch.float32
    check_stats(stats, want)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * direction).sum().backward()
    (want.out * direction.double()).sum().backward()
    for name, leaf, reference in zip("qkv", leaves, exact, strict=True):
        expected = torch.zeros_like(reference) if reference.grad is None else reference.grad
        torch.testing.assert_close(
            leaf.grad.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"d{n}: {m}"
        )


@pytest.mark.parametrize("scale", [0.05, 1.0, 2.5])
def test_scale(oracle, backend, scale):
    q, k, v, layout = make("left and right padding")
    out, stats = flashsink.attention(q, k, v, **layout, scale=scale, backend=backend, return_stats=True)
    want = oracle.Attention(q, k, v, **layout, scale=scale)
    close(out, want.out, 5e-6)
    close(stats.received, want.received, 5e-5)


@pytest.mark.parametrize(("tokens", "features"), [(40, 16), (300, 16), (8, 264)])
@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("causal", [True, False])
def test_a_scale_of_zero_or_below_masks_the_same_keys(backend, tokens, features, scale, causal):
    """With 0 every visible key gets the same; below it the order of the scores is turned round."""
    if backend == "triton" and (features > 128 or tokens > 256):
        pytest.skip("not for these kernels, or slow in the interpreter; other paths of the cpu backend")
    g = torch.Generator().manual_seed(tokens)
    leaves = [torch.randn(2, heads, tokens, features, generator=g, requires_grad=True) for heads in (4, 2, 2)]
    lengths = torch.tensor([tokens, tokens - 3])
    up = torch.randn(2, 4, tokens, features, generator=g)
    out, stats = flashsink.attention(
        *leaves, lengths=lengths, scale=scale, causal=causal, backend=backend, return_stats=True
    )
    own = torch.autograd.grad(out, leaves, up)
    q, k, v = (x.detach().double().requires_grad_() for x in leaves)
    position = torch.arange(tokens)
    seen = (position[None, None, :] < lengths[:, None, None]) & (position[None, :, None] < lengths[:, None, None])
    if causal:
        seen = seen & (position[None, :] <= position[:, None])
    scores = q @ k.repeat_interleave(2, dim=1).mT * scale
    a = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    want = a @ v.repeat_interleave(2, dim=1)
    close(out, want, 1e-5)
    close(stats.received, a.sum(dim=2), 1e-4)
    for mine, other in zip(own, torch.autograd.grad(want, (q, k, v), up.double()), strict=True):
        close(mine, other.nan_to_num(0.0), 1e-4)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(backend, scale):
    q, k, v, layout = make("one token")
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        flashsink.attention(q, k, v, **layout, scale=scale, backend=backend)


def test_default_scale_and_float64(oracle, backend):
    q, k, v, layout = make("left padding", torch.float64)
    if backend == "triton":
        with pytest.raises(ValueError, match="backend.*triton.*float64"):
            flashsink.attention(q, k, v, **layout, backend=backend)
        return
    out = flashsink.attention(q, k, v, **layout, backend=backend)
    assert out.dtype == torch.float64
    close(out, oracle.Attention(q, k, v, **layout, scale=7**-0.5).out, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["63 tokens, D 64, GQA 4", "left and right padding", "packed", "five queries, left padding"]
)
def test_half_precision_error_is_at_most_twice_that_of_plain_pytorch(oracle, backend, case, dtype):
    q, k, v, layout = make(case, dtype, spread=1.5)
    ours, plain, exact = ([x.clone().to(t).requires_grad_() for x in (q, k, v)] for t in (dtype, dtype, torch.float64))
    want = oracle.Attention(*exact, **layout)
    out, stats = flashsink.attention(*ours, **layout, backend=backend, return_stats=True)
    mask = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    for b, row in enumerate(oracle.runs(q.shape[0], k.shape[2], **layout)):
        for i in range(q.shape[2]):
            mask[b, 0, i, oracle.keys_of(row, k.shape[2] - q.shape[2] + i, True)] = True
    baseline = oracle.plain_attention(*plain, mask)
    assert out.dtype == dtype
    assert (out.double() - want.out).abs().max() <= 2 * (baseline.double() - want.out).abs().max()
    for result in (out, baseline, want.out):
        result.sum().backward()
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.grad.dtype == dtype
        assert (a.grad.double() - c.grad).abs().max() <= 2 * (b.grad.double() - c.grad).abs().max()
    # the statistics know no half precision: they are those of the rounded inputs
    assert stats.received.dtype == stats.lse.dtype == torch.float32
    check_stats(stats, want)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][6]])
def test_poison_in_padding_reaches_nothing(oracle, backend, case, dtype, poison):
    q, k, v, layout = make(case, dtype)
    padding = padded(oracle, case)
    expected, want = flashsink.attention(q, k, v, **layout, backend=backend, return_stats=True)
    at = padding[:, None, :, None]
    leaves = [x.masked_fill(at[:, :, -x.shape[2] :], poison).requires_grad_() for x in (q, k, v)]
    out, stats = flashsink.attention(*leaves, **layout, backend=backend, return_stats=True)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    for got, clean in ((stats.received, want.received), (stats.lse, want.lse)):
        torch.testing.assert_close(got, clean)
    assert torch.equal(stats.queries, want.queries)
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[at[:, :, -leaf.shape[2] :].expand(leaf.shape)].any()
    # definition 1: out 0, received 0, lse 0 at padding
    queries = padding[:, -q.shape[2] :]
    assert not out.transpose(1, 2)[queries].any()
    assert not stats.lse.transpose(1, 2)[queries].any()
    assert not stats.received.transpose(1, 2)[padding].any()
    assert not stats.mean_received.transpose(1, 2)[padding].any()
    assert not stats.queries[padding].any()


@pytest.mark.parametrize("case", ["left and right padding", "packed", "five queries, left padding"])
def test_strided_inputs(oracle, backend, case):
    q, k, v, layout = make(case)
    want = oracle.Attention(q, k, v, **layout)

    def transposed(x):  # (B, S, heads, D) in memory, as a projection leaves it
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def every_second(x):
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]

    for change in (transposed, every_second):
        leaves = [change(x).requires_grad_() for x in (q, k, v)]
        assert any(not x.is_contiguous() for x in leaves)
        out, stats = flashsink.attention(*leaves, **layout, backend=backend, return_stats=True)
        close(out, want.out, 2e-6)
        check_stats(stats, want)
        out.sum().backward()
        assert all(leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all() for leaf in leaves)


def test_a_sequence_gives_the_same_alone_padded_and_packed(backend):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 9, 7, generator=g) for n in (4, 2, 2))
    alone, stats = flashsink.attention(q, k, v, backend=backend, return_stats=True)
    fill = [torch.randn(1, n, 16, 7, generator=g) for n in (4, 2, 2)]
    for first, layout in (
        (0, {"lengths": torch.tensor([9])}),
        (7, {"starts": torch.tensor([7])}),
        (3, {"starts": torch.tensor([3]), "lengths": torch.tensor([9])}),
        (3, {"cu_seqlens": torch.tensor([0, 3, 12, 16])}),
    ):
        inside = slice(first, first + 9)
        wide = [x.clone() for x in fill]
        for big, small in zip(wide, (q, k, v), strict=True):
            big[:, :, inside] = small
        out, more = flashsink.attention(*wide, **layout, backend=backend, return_stats=True)
        torch.testing.assert_close(out[:, :, inside], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(more.received[:, :, inside], stats.received, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(more.mean_received[:, :, inside], stats.mean_received, rtol=1e-5, atol=1e-6)
        assert torch.equal(more.queries[:, inside], stats.queries)


@pytest.mark.parametrize("case", ["left and right padding", "packed", "five queries, left padding"])
def test_stats_are_detached_float32_and_do_not_change_out(backend, case):
    q, k, v, layout = make(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plain = flashsink.attention(*leaves, **layout, backend=backend)
    out, stats = flashsink.attention(*leaves, **layout, backend=backend, return_stats=True)
    assert torch.equal(plain, out)
    for value in (stats.received, stats.mean_received, stats.lse, stats.sink_rate()):
        assert value.dtype == torch.float32
        assert not value.requires_grad
    out.sum().backward()
    grads = [x.grad.clone() for x in leaves]
    again = [x.detach().clone().requires_grad_() for x in leaves]
    flashsink.attention(*again, **layout, backend=backend).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_index_dtypes(oracle, backend, index_dtype):
    q, k, v, layout = make("left and right padding")
    out = flashsink.attention(q, k, v, **{n: x.to(index_dtype) for n, x in layout.items()}, backend=backend)
    close(out, oracle.Attention(q, k, v, **layout).out, 2e-6)


def test_column_sums_have_the_mass_of_the_queries(backend):
    q, k, v, layout = make("left and right padding")
    _, stats = flashsink.attention(q, k, v, **layout, backend=backend, return_stats=True)
    mass = layout["lengths"].float()[:, None].expand(3, 2)
    torch.testing.assert_close(stats.received.sum(-1), mass)


@pytest.mark.parametrize("case", ["17 tokens, GQA 3", "left and right padding", "packed", "odd D"])
@pytest.mark.parametrize(("eps", "min_queries"), [(0.3, 1), (0.1, 1), (0.1, 8), (0.6, 3), (0.1, 0)])
def test_sink_rate(oracle, backend, case, eps, min_queries):
    q, k, v, layout = make(case, spread=2.0)
    _, stats = flashsink.attention(q, k, v, **layout, backend=backend, return_stats=True)
    want = oracle.Attention(q, k, v, **layout)
    assert (want.mean_received - eps).abs().min() > 1e-5  # no coin toss at the threshold
    rate = stats.sink_rate(eps=eps, min_queries=min_queries)
    assert rate.shape == (q.shape[0], k.shape[2])
    close(rate, want.sink_rate(eps, min_queries), 1e-6)
    if (eps, min_queries) == (0.3, 1):
        assert torch.equal(rate, stats.sink_rate())


def test_sink_rate_counts_a_planted_sink(backend):
    q = torch.zeros(1, 4, 12, 8)
    k = torch.zeros(1, 4, 12, 8)
    q[..., 0] = 8.0
    k[:, :3, 2, 0] = 10.0  # key 2 takes everything in three heads of four
    _, stats = flashsink.attention(q, k, torch.randn(1, 4, 12, 8), backend=backend, return_stats=True)
    assert stats.sink_rate(0.9)[0, 2].item() == 0.75
    assert stats.queries[0].tolist() == list(range(12, 0, -1))
    torch.testing.assert_close(stats.received[0, 0, 2], torch.tensor(10.0))
    assert stats.sink_rate(0.3, min_queries=11)[0, 2].item() == 0.0


@pytest.mark.parametrize("case", ["17 tokens, GQA 3", "left and right padding", "five queries, left padding"])
def test_query_starts(oracle, backend, case):
    q, k, v, layout = make(case)
    first = torch.tensor([13, 9, 15])[: q.shape[0]]
    plain = flashsink.attention(q, k, v, **layout, backend=backend)
    out, stats = flashsink.attention(q, k, v, **layout, backend=backend, return_stats=True, query_starts=first)
    want = oracle.Attention(q, k, v, **layout, query_starts=first)
    assert torch.equal(out, plain)
    check_stats(stats, want)


def test_large_scores_stay_finite(oracle, backend):
    q, k, v, layout = make("left and right padding", spread=60.0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, stats = flashsink.attention(*leaves, **layout, backend=backend, return_stats=True)
    want = oracle.Attention(q, k, v, **layout)
    close(out, want.out.detach(), 5e-3)
    torch.testing.assert_close(stats.lse.double(), want.lse, rtol=1e-5, atol=1e-3)
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_the_default_backend_is_one_of_them(oracle):
    q, k, v, layout = make("packed")
    close(flashsink.attention(q, k, v, **layout), oracle.Attention(q, k, v, **layout).out, 5e-6)
