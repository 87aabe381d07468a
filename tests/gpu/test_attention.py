"""The Triton attention kernels with tiles so small that every loop runs: full blocks, the diagonal, the tail."""

from __future__ import annotations

import contextlib

import pytest
import torch

import flashsink
from flashsink import reference
from flashsink.checks import resolve_layout
from flashsink.triton import attention as triton
from flashsink.triton import launch, tiles
from flashsink.triton.launch import Tile

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
KERNELS = ("forward", "gradient_kv", "gradient_q", "received", "calibrate")

# name: (B, H, Hk, Sq, Sk, D, layout)
SHAPES = {
    "one token": (2, 4, 1, 1, 1, 32, {}),
    "17 tokens, GQA 3": (2, 3, 1, 17, 17, 32, {}),
    "63 tokens, GQA 4": (1, 4, 1, 63, 63, 64, {}),
    "65 tokens, D 80": (1, 2, 2, 65, 65, 80, {}),
    "right padding": (3, 3, 3, 33, 33, 32, {"lengths": [33, 18, 0]}),
    "left padding": (3, 4, 2, 33, 33, 32, {"starts": [0, 20, 33]}),
    "both": (3, 3, 1, 33, 33, 32, {"starts": [2, 5, 0], "lengths": [9, 28, 16]}),
    "one query": (3, 6, 2, 1, 37, 32, {"starts": [0, 20, 36]}),
    "queries at the end": (2, 4, 1, 17, 49, 32, {"starts": [0, 40]}),
    "queries in padding": (3, 4, 1, 17, 49, 32, {"lengths": [49, 36, 20]}),
    "packed": (1, 3, 1, 63, 63, 32, {"cu_seqlens": [0, 1, 17, 20, 37, 63]}),
    "packed with empty sequences and a tail": (1, 4, 2, 65, 65, 32, {"cu_seqlens": [0, 0, 20, 20, 37, 40, 40]}),
}


@pytest.fixture
def small():
    """Tiles of 16 x 16 in every kernel: several of each kind even in short sequences."""
    with contextlib.ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(tiles.override(kernel, Tile({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)))
        yield


def make(name, dtype, seed=0):
    """(q, k, v, layout options, Layout); padding holds NaN."""
    b, h, hk, queries, keys, d, options = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, heads, n, d, generator=generator).to(dtype).to(DEVICE)
        for heads, n in ((h, queries), (hk, keys), (hk, keys))
    )
    options = {key: torch.tensor(value, device=DEVICE) for key, value in options.items()}
    layout = resolve_layout(b, keys, q.device, **options)
    padding = ~layout.valid()[:, None, :, None]
    q = q.masked_fill(padding[:, :, keys - queries :], float("nan"))
    return q, k.masked_fill(padding, float("nan")), v.masked_fill(padding, float("nan")), options, layout


def both(q, k, v, layout, causal, *, first=None, sink=None, poison=True):
    """What the kernels give and what the reference gives in float64: out, lse, received, gradients."""
    results = []
    g = torch.Generator().manual_seed(5)
    upstream = torch.randn(q.shape, generator=g).to(q.device)
    # what is sent to padded queries must reach nothing
    silent = ~layout.valid()[:, None, layout.tokens - q.shape[2] :, None]
    upstream = upstream.masked_fill(silent, float("nan"))
    for module, dtype in ((triton, q.dtype), (reference, torch.float64)):
        leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (q, k, v)]
        logits = None if sink is None else sink.clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out, stats = module.attention(*leaves, layout, causal=causal, scale=0.3, counted=[first], sink_logits=logits)
        # the reference multiplies, so there zeros stand for what must not be looked at
        chosen = upstream if module is triton else upstream.nan_to_num(0.0)
        out.backward(chosen.to(dtype))
        extra = [] if logits is None else [logits.grad]
        results.append([out.detach(), stats[0].lse, stats[0].received, *(x.grad for x in leaves), *extra])
        assert torch.equal(stats[0].queries, layout.query_counts(q.shape[2], causal, first))
    return zip(("out", "lse", "received", "dq", "dk", "dv", "dsink"), *results, strict=False)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def compare(pairs, dtype):
    for name, got, want in pairs:
        tolerance = 1e-5 if name in ("lse", "received") else TOLERANCE[dtype]
        assert got.isfinite().all(), name
        torch.testing.assert_close(
            got.double(), want.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", SHAPES)
def test_everything_against_the_reference(small, poison, launched, name, causal, dtype):
    q, k, v, _, layout = make(name, dtype)
    first = layout.starts + layout.lengths // 2 if name in ("both", "packed", "queries at the end") else None
    compare(both(q, k, v, layout, causal, first=first), dtype)
    assert launched == ["forward_kernel", "delta_kernel", "gradient_kv_kernel", "gradient_q_kernel"]


@pytest.mark.parametrize("name", ["right padding", "packed", "65 tokens, D 80"])
def test_the_shipped_tiles(poison, name, dtype):
    q, k, v, _, layout = make(name, dtype)
    compare(both(q, k, v, layout, True), dtype)


@pytest.mark.parametrize("name", ["17 tokens, GQA 3", "both", "packed with empty sequences and a tail"])
@pytest.mark.parametrize("size", [-3.0, 0.0, 4.0])
def test_sink_logits_and_their_gradient(small, poison, name, size):
    q, k, v, _, layout = make(name, torch.float32)
    sink = torch.randn(q.shape[1], device=DEVICE) + size
    compare(both(q, k, v, layout, True, sink=sink), torch.float32)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_the_pass_gives_what_the_backward_captures(small, poison, launched, name, causal):
    q, k, v, _, layout = make(name, torch.float32)
    q = q.nan_to_num(0.0).requires_grad_()
    first = layout.starts + 3
    received = []
    for before in (True, False):
        out, stats = triton.attention(q, k, v, layout, causal=causal, scale=0.3, counted=[first])
        if before:
            received.append(stats[0].received)
        out.nan_to_num(0.0).sum().backward()
        received.append(stats[0].received)
    assert launched.count("received_kernel") == 1
    assert received[0] is received[1]  # found out once
    torch.testing.assert_close(received[2], received[0], rtol=1e-5, atol=1e-6)


def test_capture_changes_no_bit(small):
    q, k, v, _, layout = make("both", torch.float16)
    results = []
    for counted in ([], [None], [layout.starts + 1]):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, stats = triton.attention(*leaves, layout, causal=True, scale=0.3, counted=counted)
        out.backward(torch.ones_like(out))
        results.append([out.detach(), *(x.grad for x in leaves)])
        assert all(s.received.isfinite().all() for s in stats)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_twice_is_the_same_bits_and_two_backwards_capture_once(small):
    q, k, v, _, layout = make("both", torch.float32)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, (stats,) = triton.attention(*leaves, layout, causal=True, scale=0.3, counted=[None])
        out.backward(torch.ones_like(out), retain_graph=True)
        first = stats.received.clone()
        out.backward(torch.ones_like(out))
        assert torch.equal(stats.received, first)
        runs.append([out.detach(), first, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_statistics_hold_no_inputs_after_the_backward_or_when_they_wait_for_it(small):
    q, k, v, _, layout = make("17 tokens, GQA 3", torch.float32)
    q.requires_grad_()
    out, (stats,) = triton.attention(q, k, v, layout, causal=True, scale=0.3, counted=[None])
    stats.wait_for_backward()
    with pytest.raises(RuntimeError, match="after the backward"):
        _ = stats.received
    out.sum().backward()
    exact = reference.attention(q.double(), k.double(), v.double(), layout, causal=True, scale=0.3, counted=[None])
    torch.testing.assert_close(stats.received, exact[1][0].received, rtol=1e-5, atol=1e-5)
    assert stats._received is stats.received


def test_large_scores_and_an_extreme_loss_scale(small):
    """A loss scaled by 65,536 gives gradients scaled by it; scores of several hundred stay finite."""
    q, k, v, _, layout = make("63 tokens, GQA 4", torch.float32)
    results = []
    for factor in (1.0, 65536.0):
        leaves = [(x * s).clone().requires_grad_() for x, s in ((q, 20.0), (k, 20.0), (v, 1.0))]
        out, _ = triton.attention(*leaves, layout, causal=True, scale=0.3)
        (out.sin().sum() * factor).backward()
        results.append([x.grad for x in leaves])
    for plain, scaled in zip(*results, strict=True):
        assert plain.isfinite().all()
        torch.testing.assert_close(scaled / 65536.0, plain, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("name", ["17 tokens, GQA 3", "both", "queries at the end", "one query"])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_calibration(small, poison, launched, name, share, dtype):
    q, k, v, _, layout = make(name, dtype)
    generator = torch.Generator().manual_seed(1)
    sinks = (torch.rand(q.shape[0], q.shape[1], k.shape[2], generator=generator) < share).to(DEVICE)
    got = triton.calibrated_attention(q, k, v, sinks, layout, beta=0.4, scale=0.3)
    want = reference.calibrated_attention(q.double(), k.double(), v.double(), sinks, layout, beta=0.4, scale=0.3)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert launched == ["forward_kernel", "calibrate_kernel"]


@pytest.mark.parametrize("name", ["both", "packed"])
def test_strided_starts_and_lengths(small, name):
    """They come out of a mask that holds several numbers a row."""
    q, k, v, _, layout = make(name, torch.float32)
    pairs = torch.stack([layout.starts, layout.lengths, layout.starts + 1], dim=1)
    strided = layout._replace(starts=pairs[:, 0], lengths=pairs[:, 1])
    results = []
    for where, first in ((layout, layout.starts + 1), (strided, pairs[:, 2])):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, (stats,) = triton.attention(*leaves, where, causal=True, scale=0.3, counted=[first])
        out.backward(torch.ones_like(out))
        early = triton.run_received(q, k, stats.lse, where, causal=True, scale=0.3, query_starts=first)
        results.append([out.detach(), early, stats.received, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["both", "packed"])
def test_any_strides(small, name):
    q, k, v, _, layout = make(name, torch.float32)

    def spread(x):
        """Tokens before heads, every second one, and a gap behind the features."""
        b, h, s, d = x.shape
        room = torch.full((b, 2 * s, h, d + 3), float("nan"), device=DEVICE)
        view = room[:, ::2, :, :d].transpose(1, 2)
        view.copy_(x)
        return view

    plain = triton.attention(q, k, v, layout, causal=True, scale=0.3, counted=[None])
    for change in (spread, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
        out, stats = triton.attention(*(change(x) for x in (q, k, v)), layout, causal=True, scale=0.3, counted=[None])
        assert torch.equal(out, plain[0]) and torch.equal(stats[0].received, plain[1][0].received)


def test_what_the_kernels_do_not_take_is_refused_and_the_default_goes_on():
    wide = torch.randn(1, 1, 4, 264, device=DEVICE)
    with pytest.raises(ValueError, match="backend.*triton.*head dims up to 128"):
        flashsink.attention(wide, wide, wide, backend="triton")
    with pytest.raises(ValueError, match="backend.*triton.*float64"):
        flashsink.attention(*[wide[..., :8].double()] * 3, backend="triton")
    assert flashsink.attention(wide, wide, wide).isfinite().all()


@pytest.mark.parametrize("name", ["both", "packed"])
def test_opcheck(small, name):
    q, k, v, _, layout = make(name, torch.float32)
    q, k, v = (x.nan_to_num(0.0) for x in (q, k, v))
    ops = torch.ops.flashsink
    out, lse = ops.triton_attention(q, k, v, None, None, layout.starts, layout.lengths, None, layout.packed, True, 0.3)
    sink = torch.randn(q.shape[1], device=DEVICE)
    capture = torch.zeros(q.shape[0], q.shape[1], k.shape[2], device=DEVICE)
    where = (layout.starts, layout.lengths)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink, capture)]
    first = layout.starts + 2
    # values are compared elsewhere; here schema, fake kernels, autograd and tracing
    torch.library.opcheck(ops.triton_attention.default, (*leaves, *where, first, layout.packed, True, 0.3))
    torch.library.opcheck(
        ops.triton_attention_backward.default,
        (torch.ones_like(out), q, k, v, out, lse, sink, *where, first, layout.packed, True, 0.3, True),
    )
    torch.library.opcheck(ops.triton_received.default, (q, k, lse, *where, first, layout.packed, True, 0.3))
    if not layout.packed:
        sinks = torch.zeros(capture.shape, dtype=torch.bool, device=DEVICE)
        torch.library.opcheck(ops.triton_calibrate.default, (q, k, v, out, lse, sinks, *where, 0.4, 0.3))


def test_a_second_derivative_is_refused(small):
    q, k, v, _, layout = make("17 tokens, GQA 3", torch.float32)
    q.requires_grad_()
    out, _ = triton.attention(q, k, v, layout, causal=True, scale=0.3)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        gradient.sum().backward()
