"""RMSNorm with the decorrelation sum and the largest activations in Triton, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from flashsink import reference
from flashsink.triton import norm
from flashsink.types import Layout

pytestmark = pytest.mark.usefixtures("poison")

FORWARD, PARTS, BACKWARD = "norm_forward", "bos_gradient", "norm_backward"
EPS, SCALE = 1e-3, 3.0


def weight_of(h, seed=5):
    return torch.randn(h.shape[-1], generator=torch.Generator().manual_seed(seed)).to(h.dtype).to(h.device)


def run(function, h, weight, layout, spans, margin=0.0, scale=SCALE):
    """(what comes out, (gradient of h, of weight)) for sum(out * noise) + scale * total."""
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    normed = function(h, weight, EPS, layout, spans, margin)
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(9)).to(h.device, normed.out.dtype)
    value = (normed.out * noise).sum(dtype=torch.float64)
    if normed.total is not None:
        value = value + scale * normed.total
    return normed, torch.autograd.grad(value, (h, weight))


def agree(h, weight, layout, spans, margin=0.0, scale=SCALE):
    """Triton is at most twice as far from the float64 definition as the definition in h's own dtype."""
    mine = run(norm.rms_norm, h, weight, layout, spans, margin, scale)
    plain = run(reference.rms_norm, h, weight, layout, spans, margin, scale)
    exact = run(reference.rms_norm, h.double(), weight.double(), layout, spans, margin, scale)
    assert mine[0].out.dtype == plain[0].out.dtype
    for got, low, want in zip(
        (mine[0].out, *mine[1]), (plain[0].out, *plain[1]), (exact[0].out, *exact[1]), strict=True
    ):
        assert got.dtype == low.dtype and got.shape == low.shape
        ulp = torch.finfo(h.dtype).eps * float(want.detach().abs().max())
        error, bar = ((x.double() - want).abs().max() for x in (got, low))
        assert error <= 2 * bar + ulp
    if spans is None:
        assert mine[0].total is None
    else:
        assert mine[0].total.shape == () and mine[0].total.dtype == torch.float32
        torch.testing.assert_close(mine[0].total.double(), exact[0].total.double(), rtol=1e-5, atol=1e-9)
    assert torch.equal(mine[0].max_abs, plain[0].max_abs) and torch.equal(mine[0].feature, plain[0].feature)
    assert not mine[0].max_abs.requires_grad
    return mine


@pytest.mark.parametrize(("margin", "features"), [(0.0, 64), (0.2, 11)])
def test_every_layout(case, launched, margin, features, dtype):
    h = case.states(features, dtype)
    agree(h, weight_of(h), case.layout, case.spans, margin)
    assert launched == [FORWARD, PARTS, BACKWARD]


def test_without_the_loss(case, launched):
    h = case.states(24)
    agree(h, weight_of(h), case.layout, None)
    assert launched == [FORWARD, BACKWARD]


@pytest.mark.parametrize("name", ["long", "packed, empty sequences and a tail", "packed crowd"])
def test_the_loss_alone(cases, name):
    """Its gradient exactly, not beside one a hundred times as large."""
    case = cases(name)
    h = case.states(16).requires_grad_()
    twin = h.detach().double().requires_grad_()
    total = norm.rms_norm(h, weight_of(h.detach()), EPS, case.layout, case.spans, 0.1).total
    want = reference.decorrelation_sums([twin], case.spans, case.layout, 0.1)[0]
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(total, h)
    (exact,) = torch.autograd.grad(want, twin)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    # tokens that do not count get nothing from it
    assert not got[exact == 0.0].any()


@pytest.mark.parametrize("programs", [1, 512])
def test_long_and_short_chunks(cases, monkeypatch, programs):
    monkeypatch.setattr(norm, "_PROGRAMS", programs)
    monkeypatch.setattr(norm, "_BLOCK_N", 2)  # the search for a chunk's sequences takes several blocks
    for name in ("long", "packed", "packed crowd"):
        case = cases(name)
        h = case.states(16)
        agree(h, weight_of(h), case.layout, case.spans, 0.1)


def test_many_features(device):
    """Not a power of two, and more than one warp's worth."""
    layout = Layout(torch.tensor([0, 1], device=device), torch.tensor([3, 2], device=device), 2, 3, False)
    h = torch.randn(2, 3, 5000, generator=torch.Generator().manual_seed(1)).to(device) + 0.5
    agree(h, weight_of(h), layout, layout.lengths)


@pytest.mark.parametrize("kind", ["time first", "expanded", "sliced"])
def test_strides(cases, kind):
    case = cases("starts")
    h = case.states(16)
    wide = torch.full((*h.shape[:2], 32), float("nan"), device=h.device)
    wide[..., ::2] = h
    h = {
        "time first": h.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": h[:1].expand(h.shape),
        "sliced": wide[..., ::2],
    }[kind]
    assert not h.is_contiguous()
    agree(h, weight_of(h), case.layout, case.spans, 0.1)


def test_a_float32_weight_makes_a_float32_result(cases, dtype):
    case = cases("right padding")
    h = case.states(24, dtype)
    out = agree(h, weight_of(h.float()), case.layout, case.spans)[0].out
    assert out.dtype == torch.float32


def test_float64_is_the_references(cases, launched):
    case = cases("starts")
    h = case.states(8, torch.float64)
    mine, exact = (run(f, h, weight_of(h), case.layout, case.spans, 0.1) for f in (norm.rms_norm, reference.rms_norm))
    assert torch.equal(mine[0].out, exact[0].out) and torch.equal(mine[1][0], exact[1][0])
    assert launched == []


def test_too_many_features(cases):
    case = cases("one token")
    h = case.states(8193)
    with pytest.raises(ValueError, match="hidden_states.*8192.*8193"):
        norm.rms_norm(h, weight_of(h), EPS, case.layout, None, 0.0)


def test_a_frozen_weight_costs_nothing(cases):
    from flashsink.triton import launch

    case = cases("right padding")
    h, seen = case.states(16).requires_grad_(), []
    with launch.observe(lambda one: seen.append(one) or True):
        normed = norm.rms_norm(h, weight_of(h.detach()), EPS, case.layout, case.spans, 0.0)
        (normed.out.sum() + normed.total).backward()
    assert seen[-1].arguments["WEIGHT"] is False and seen[-1].arguments["dweight"] is None
    twin = h.detach().double().requires_grad_()
    exact = reference.rms_norm(twin, weight_of(h.detach()).double(), EPS, case.layout, case.spans, 0.0)
    (exact.out.sum() + exact.total).backward()
    torch.testing.assert_close(h.grad.double(), twin.grad, rtol=1e-5, atol=1e-6)


def test_only_h_is_kept(cases):
    """For the backward: h itself, a row for every sequence, and three numbers for every token."""
    case = cases("long")
    h = case.states(64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        norm.rms_norm(h, weight_of(h.detach()), EPS, case.layout, case.spans, 0.0)
    assert any(x.data_ptr() == h.data_ptr() for x in kept)
    others = sum(x.numel() for x in kept if x.data_ptr() != h.data_ptr())
    rows, tokens, features = h.shape
    assert others <= 3 * rows * tokens + rows * features + features + 2 * rows


def test_near_parallel_massive_activations(device):
    """As in test_decorrelation.py: BOS with spikes of 2e4 and a token nearly parallel to it; with a loss scale."""
    g = torch.Generator().manual_seed(4)
    h = torch.randn(1, 6, 576, generator=g)
    h[:, 0, 507], h[:, 0, 100] = 2e4, -3e3
    h[:, 1] = 0.8 * h[:, 0] + 0.7 * torch.randn(576, generator=g)
    h = h.bfloat16().float().to(device).requires_grad_()
    layout = Layout(torch.tensor([0], device=device), torch.tensor([6], device=device), 1, 6, False)
    spans = torch.tensor([3], device=device)
    twin = h.detach().double().requires_grad_()
    total = norm.rms_norm(h, weight_of(h.detach()), EPS, layout, spans, 0.0).total
    want = reference.decorrelation_sums([twin], spans, layout, 0.0)[0]
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=0)
    (got,) = torch.autograd.grad(65536.0 * total, h)
    (exact,) = torch.autograd.grad(65536.0 * want, twin)
    for token in range(3):
        error = (got[0, token].double() - exact[0, token]).norm() / exact[0, token].norm()
        assert error < 1e-3


@pytest.mark.parametrize("name", ["starts", "packed, empty sequences and a tail"])
def test_poison_in_padding_stays_there(cases, name):
    case = cases(name)
    h = case.states(16)
    padding = ~case.layout.valid()
    assert padding.any()
    clean, (clean_gradient, _) = run(norm.rms_norm, h, weight_of(h), case.layout, case.spans, 0.1)
    h = h.masked_fill(padding[..., None], float("nan"))
    normed, (gradient, _) = run(norm.rms_norm, h, weight_of(h), case.layout, case.spans, 0.1)
    assert torch.equal(normed.total, clean.total)
    assert torch.equal(normed.out[~padding], clean.out[~padding])
    assert torch.equal(gradient[~padding], clean_gradient[~padding])
    assert torch.equal(normed.max_abs, clean.max_abs) and torch.equal(normed.feature, clean.feature)
    assert normed.out[padding].isnan().all()  # all tokens are normalised


def test_nan_where_it_counts_is_seen(cases):
    case = cases("right padding")
    h = case.states(16)
    h[1, 2, 3] = float("nan")
    normed, (gradient, _) = run(norm.rms_norm, h, weight_of(h), case.layout, case.spans)
    assert normed.total.isnan() and normed.max_abs[1, 2].isnan() and normed.feature[1, 2] == 3
    assert gradient[1, 0].isnan().any() and gradient[1, 2].isnan().any() and gradient[0].isfinite().all()


def test_zero_vectors(cases):
    case = cases("right padding")
    h = case.states(16)
    h[0, 0], h[1, 2] = 0.0, 0.0
    normed, (gradient, _) = agree(h, weight_of(h), case.layout, case.spans)
    assert not normed.out[0, 0].any() and normed.feature[0, 0] == 0 and gradient.isfinite().all()


def test_runs_are_bitwise_the_same(cases):
    case = cases("packed, empty sequences and a tail")
    h = case.states(24)
    first, second = (run(norm.rms_norm, h, weight_of(h), case.layout, case.spans) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "loss"), [("starts", False), ("packed crowd", True)])
def test_opcheck(cases, name, loss, monkeypatch):
    monkeypatch.undo()  # the poison is not for tracing
    case = cases(name)
    spans = case.spans if loss else None
    h = case.states(8).requires_grad_()
    weight = weight_of(h.detach()).requires_grad_()
    arguments = (h, weight, case.layout.starts, case.layout.lengths, spans, case.layout.packed, EPS, 0.1)
    forward = torch.ops.flashsink.triton_rms_norm.default
    torch.library.opcheck(forward, arguments)
    out, total, _, _, *kept = (output.detach() for output in forward(*arguments))
    back = torch.ops.flashsink.triton_rms_norm_backward.default
    plain = (h.detach(), weight.detach(), case.layout.starts, spans, case.layout.packed)
    torch.library.opcheck(back, (torch.rand_like(out), torch.rand_like(total), *plain, *kept, True))


def test_compiles_whole(cases, monkeypatch):
    monkeypatch.undo()

    def step(h, weight, layout, spans):
        normed = norm.rms_norm(2.0 * h, weight, EPS, layout, spans, 0.1)
        return normed.out.square().sum() + normed.total, normed.max_abs

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")  # of any size from the second on
    for name in ("starts", "long"):
        case = cases(name)
        h = case.states(8).requires_grad_()
        weight = weight_of(h.detach()).requires_grad_()
        got, want = (f(h, weight, case.layout, case.spans) for f in (compiled, step))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x[0], (h, weight)) for x in (got, want)))


def test_checkpointing(cases):
    """Non-reentrant: the forward runs twice and the gradient is the same."""
    from torch.utils.checkpoint import checkpoint

    case = cases("starts")
    h = case.states(16)
    weight = weight_of(h)

    def step(h):
        normed = norm.rms_norm(h, weight, EPS, case.layout, case.spans, 0.1)
        return normed.out.square().sum() + normed.total

    gradients = []
    for call in (step, lambda x: checkpoint(step, x, use_reentrant=False)):
        leaf = h.clone().requires_grad_()
        gradients.append(torch.autograd.grad(call(leaf), leaf)[0])
    assert torch.equal(*gradients)


def test_bos_from_the_cache_is_the_same(device):
    """Rows of 4096 float32 do not keep BOS in registers."""
    starts = torch.tensor([0, 3], device=device)
    layout = Layout(starts, torch.tensor([3, 2], device=device), 1, 6, True)
    h = torch.randn(1, 6, 4096, generator=torch.Generator().manual_seed(1)).to(device) + 0.5
    agree(h, weight_of(h), layout, torch.tensor([2, 2], device=device), 0.1, 1000.0)
