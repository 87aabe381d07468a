"""RMSNorm with the decorrelation sum and the largest activations in one pass, against float64."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from cases import BACKENDS, LEVELS, STATES, States, on, relative

EPS, FACTOR = 1e-3, 3.0


def weight_of(features, dtype=torch.float32):
    return (1.0 + 0.3 * torch.randn(features, generator=torch.Generator().manual_seed(5))).to(dtype)


def noise(shape):
    """Of few bits: the gradient of a half precision result is rounded to it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).bfloat16()


def backward(out, total, leaves, factor=FACTOR):
    """Gradients of <out, noise> + factor * total."""
    value = (out.double() * noise(out.shape).to(out.device)).sum()
    return torch.autograd.grad(value if total is None else value + factor * total, leaves)


def run(backend, states, h, weight, *, loss=True, margin=0.0, factor=FACTOR):
    """(what comes out, gradient of h, of weight)."""
    leaves = [x.detach().to(backend.device).requires_grad_() for x in (h, weight)]
    normed = backend.module.rms_norm(*leaves, EPS, states.layout, states.spans if loss else None, margin)
    return normed, *backward(normed.out, normed.total, leaves, factor)


def by_oracle(states, h, weight, *, loss=True, margin=0.0, factor=FACTOR):
    """(out, total, gradient of h, of weight) in float64."""
    leaves = [x.detach().cpu().double().requires_grad_() for x in (h, weight)]
    out = oracle.rms_norm(*leaves, EPS)
    # the oracle gives the mean over counted tokens
    count = int((states.spans - 1).clamp(min=0).sum())
    total = oracle.decorrelation(leaves[:1], states.spans.tolist(), **states.where(), margin=margin) * count
    return out.detach(), total.detach(), *backward(out, total if loss else None, leaves, factor)


@functools.cache
def exact(case, features, dtype, margin, loss=True):
    states = States(case)
    return by_oracle(states, states.states(features, dtype), weight_of(features, dtype), loss=loss, margin=margin)


def plain(h, weight):
    """What Llama's norm gives in PyTorch, in the dtype of h."""
    h, weight = (x.detach().cpu().requires_grad_() for x in (h, weight))
    unit = h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + EPS)
    out = weight * unit.to(h.dtype)
    return out.detach(), *backward(out, None, (h, weight))


def check(backend, states, found, want, h, weight, loss=True):
    """At most twice as far from float64 as plain PyTorch in h's own dtype."""
    normed, *gradients = found
    baseline, naive = plain(h, weight), by_oracle(states, h, weight, loss=False)
    naive = (naive[0], *naive[2:])
    for i, (got, other) in enumerate(zip((normed.out, *gradients), (want[0], *want[2:]), strict=True)):
        assert got.dtype == baseline[i].dtype and got.shape == baseline[i].shape
        bar = (baseline[i].double() - naive[i]).abs().max()
        error = (got.detach().cpu().double() - other).abs().max()
        ulp = torch.finfo(h.dtype).eps * float(other.abs().max())
        assert error <= 2 * bar + (ulp if h.element_size() == 2 else 4 * ulp)
    if loss:
        assert normed.total.shape == () and normed.total.dtype == torch.float32
        torch.testing.assert_close(normed.total.cpu().double(), want[1], rtol=1e-5, atol=1e-9)
    else:
        assert normed.total is None
    assert not normed.max_abs.requires_grad
    alone = backend.module.activation_stats([h.detach().to(backend.device)], states.layout, False)
    assert torch.equal(normed.max_abs, alone.max_abs[0]) and torch.equal(normed.feature, alone.feature[0])


@on(LEVELS)
@pytest.mark.parametrize(
    ("features", "dtype", "margin", "loss"),
    [(64, None, 0.0, True), (11, None, 0.2, True), (24, None, 0.0, False), (65, torch.bfloat16, 0.1, True)],
)
@pytest.mark.parametrize("case", STATES)
def test_every_layout(backend, case, features, dtype, margin, loss):
    dtype = dtype or backend.dtype
    states, want = States(case, backend.device), exact(case, features, dtype, margin, loss)
    h, weight = states.states(features, dtype), weight_of(features, dtype)
    check(backend, states, run(backend, states, h, weight, margin=margin, loss=loss), want, h, weight, loss)


@on(LEVELS)
@pytest.mark.parametrize("features", [1, 3, 31, 576, 4096, 5000])
def test_any_number_of_features(backend, features):
    states = States("nothing counted", backend.device)
    states.spans = torch.tensor([5, 3], device=backend.device)
    h, weight = states.states(features) + 0.5, weight_of(features)
    normed, of_h, of_weight = run(backend, states, h, weight, margin=0.1, factor=1000.0)
    out, total, *gradients = by_oracle(states, h, weight, margin=0.1, factor=1000.0)
    assert normed.total.item() == pytest.approx(total.item(), rel=1e-6)
    bound = 3e-6 if backend.device == "cpu" else 1e-5
    assert relative(normed.out, out) < bound and relative(of_weight, gradients[1]) < bound
    if features > 1:  # with one it is 0 but for eps
        assert relative(of_h, gradients[0]) < bound


@on(LEVELS)
@pytest.mark.parametrize("case", ["long", "packed", "packed crowd"])
def test_the_loss_alone(backend, case):
    """Its gradient on its own, not added to one a hundred times as large; it changes no bit of the norm."""
    states = States(case, backend.device)
    h, weight = states.states(16).requires_grad_(), weight_of(16).to(backend.device)
    normed = backend.module.rms_norm(h, weight, EPS, states.layout, states.spans, 0.1)
    twin = h.detach().cpu().double().requires_grad_()
    count = int((states.spans - 1).clamp(min=0).sum())
    want = oracle.decorrelation([twin], states.spans.tolist(), **states.where(), margin=0.1) * count
    torch.testing.assert_close(normed.total.cpu().double(), want, rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(normed.total, h)
    (other,) = torch.autograd.grad(want, twin)
    torch.testing.assert_close(got.cpu().double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert not got.cpu()[other == 0.0].any()  # tokens that do not count get nothing from it
    without, silent = (run(backend, states, h, weight, loss=loss, factor=0.0) for loss in (False, True))
    assert torch.equal(without[0].out, silent[0].out)
    assert all(torch.equal(a, b) for a, b in zip(without[1:], silent[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_weight_makes_a_float32_result(backend, dtype):
    states = States("right padding", backend.device)
    h, weight = states.states(24, dtype), weight_of(24)
    found = run(backend, states, h, weight)
    assert found[0].out.dtype == torch.float32
    check(backend, states, found, by_oracle(states, h, weight), h, weight)


@on(BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float64, (torch.float32, torch.float64)])
def test_float64_is_the_references(backend, dtype):
    states = States("starts")
    h, weight = (make(8) for make in (states.states, weight_of))
    h, weight = h.to(dtype[0] if isinstance(dtype, tuple) else dtype), weight.double()
    mine, other = (run(b, states, h, weight, margin=0.1) for b in (backend, BACKENDS[0]))
    assert all(torch.equal(a, b) for a, b in zip((*mine[0], *mine[1:]), (*other[0], *other[1:]), strict=True))


@on(LEVELS)
def test_the_rounding_of_the_normalised_states(backend):
    """Nearly every number is bit for bit plain PyTorch's; the others differ in the last place."""
    states = States("long", backend.device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        h, weight = states.states(576, dtype), weight_of(576, dtype)
        got, want = run(backend, states, h, weight)[0].out.detach().cpu(), plain(h, weight)[0]
        assert (got == want).float().mean() > (0.5 if dtype == torch.float32 else 0.99)
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0)


@on(BACKENDS[1:])
def test_the_gradients_are_rounded_once(backend):
    """dh is within half a step of the exact sum, though each of its terms is ten times as large."""
    dtype, states = torch.bfloat16, States("long", backend.device)
    h, weight = states.states(64, dtype), weight_of(64, dtype)
    want = by_oracle(states, h, weight, margin=0.1, factor=30.0)[2]
    got = run(backend, states, h, weight, margin=0.1, factor=30.0)[1].cpu().double()
    assert ((got - want).abs() <= want.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 2e-6).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_weight_and_frozen_states(backend, frozen):
    states = States("right padding", backend.device)
    h, weight = states.states(16), weight_of(16).to(backend.device)
    whole = run(backend, states, h, weight)[1:]
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate((h, weight))]
    normed = backend.module.rms_norm(*leaves, EPS, states.layout, states.spans, 0.0)
    (got,) = backward(normed.out, normed.total, leaves[1 - frozen])
    torch.testing.assert_close(got, whole[1 - frozen], rtol=1e-5, atol=1e-6)


@on(BACKENDS[1:])
def test_only_h_is_kept_for_the_backward(backend):
    """Beside it three numbers for every token (float64 in C++), a row for every sequence, and the weight."""
    states = States("long", backend.device)
    h = states.states(64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        backend.module.rms_norm(h, weight_of(64).to(backend.device), EPS, states.layout, states.spans, 0.0)
    assert any(x.data_ptr() == h.data_ptr() for x in kept)
    others = sum(x.numel() for x in kept if x.data_ptr() != h.data_ptr())
    assert others <= 3 * states.rows * states.tokens + states.rows * 64 + 64 + 2 * states.rows


@on(LEVELS)
@pytest.mark.parametrize("factor", [1.0, 65536.0])
def test_near_parallel_massive_activations(backend, factor):
    """As in test_decorrelation.py: BOS with spikes of 2e4 and tokens nearly parallel to it; with a loss scale."""
    g = torch.Generator().manual_seed(4)
    states = States("one token", backend.device)
    states.spans = torch.tensor([8, 0], device=backend.device)
    states.layout = states.layout._replace(lengths=states.spans, tokens=8)
    h = torch.randn(2, 8, 2048, generator=g)
    h[:, 0, 507], h[:, 0, 100] = 2e4, -3e3
    for token in range(1, 8):  # of several lengths, so that the ratios round differently
        h[:, token] = (0.5 + token / 8) * h[:, 0] + 8.0 * torch.randn(2048, generator=g)
    h = h.to(backend.device).requires_grad_()
    total = backend.module.rms_norm(h, torch.ones_like(h[0, 0]), EPS, states.layout, states.spans, 0.0).total
    twin = h.detach().cpu().double().requires_grad_()
    want = oracle.decorrelation([twin], [8, 0]) * 7
    torch.testing.assert_close(total.cpu().double(), want, rtol=1e-6, atol=0)
    (got,), (other,) = torch.autograd.grad(factor * total, h), torch.autograd.grad(factor * want, twin)
    bound = {"cpu": 1e-4 if backend.level == 0 else 2e-6}.get(backend.name, 1e-3)
    for token in range(8):
        assert relative(got[0, token], other[0, token]) < bound


@on(LEVELS)
@pytest.mark.parametrize("case", ["starts", "packed, empty sequences and a tail"])
def test_poison_in_padding_stays_there(backend, case):
    states = States(case, backend.device)
    h, weight = states.states(40), weight_of(40)
    clean, gradient, _ = run(backend, states, h, weight, margin=0.1)
    h = h.masked_fill(~states.valid[..., None], float("nan"))
    normed, poisoned, _ = run(backend, states, h, weight, margin=0.1)
    for got, want in zip(normed[1:], clean[1:], strict=True):
        assert torch.equal(got, want)
    assert torch.equal(normed.out[states.valid], clean.out[states.valid])
    assert torch.equal(poisoned[states.valid], gradient[states.valid])
    assert normed.out[~states.valid].isnan().all()  # all tokens are normalised


@on([b for b in LEVELS if getattr(b, "name", "") == "cpu"])
def test_a_token_with_no_gradient_gives_none_whatever_it_holds(backend):
    """In C++: so what padding holds does not get out through the norm either."""
    states = States("starts")
    h, weight = states.states(40), weight_of(40)
    upstream = noise(h.shape).float().masked_fill(~states.valid[..., None], 0.0)
    found = []
    for poison in (0.0, float("nan")):
        leaves = h.masked_fill(~states.valid[..., None], poison).requires_grad_(), weight.clone().requires_grad_()
        normed = backend.module.rms_norm(*leaves, EPS, states.layout, states.spans, 0.1)
        found.append(torch.autograd.grad([normed.out, normed.total], leaves, [upstream, torch.tensor(FACTOR)]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not found[1][0][~states.valid].any()


@on(LEVELS)
def test_nan_and_zeros_where_they_count(backend):
    states = States("right padding", backend.device)
    h = states.states(40)
    h[0, 0] = 0.0
    normed, gradient, _ = run(backend, states, h, weight_of(40))
    assert not normed.out[0, 0].any() and normed.feature[0, 0] == 0 and gradient.isfinite().all()
    h[1, 2, 3] = float("nan")
    normed, gradient, _ = run(backend, states, h, weight_of(40))
    assert normed.total.isnan() and normed.max_abs[1, 2].isnan() and normed.feature[1, 2] == 3
    assert gradient[1, 0].isnan().any() and gradient[1, 2].isnan().all() and gradient[0].isfinite().all()
