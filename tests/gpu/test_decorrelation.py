"""The decorrelation loss of all layers in Triton, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from flashsink import reference
from flashsink.triton import decorrelation
from flashsink.types import Layout

pytestmark = pytest.mark.usefixtures("poison")

FORWARD, BACKWARD = "decorrelation_forward", "decorrelation_backward"


def both(layers, spans, layout, margin=0.0, upstream=None):
    """((sums, gradients) of Triton, the same of the reference in float64)."""
    results = []
    for run, dtype in ((decorrelation.decorrelation_sums, None), (reference.decorrelation_sums, torch.float64)):
        leaves = [layer.detach().to(dtype or layer.dtype).requires_grad_() for layer in layers]
        sums = run(leaves, spans, layout, margin)
        assert sums.shape == (len(layers),) and sums.dtype == torch.promote_types(leaves[0].dtype, torch.float32)
        weights = torch.linspace(1.0, 2.0, len(layers), device=sums.device) if upstream is None else upstream
        gradients = torch.autograd.grad((sums * weights).sum(), leaves)
        results.append((sums.detach(), gradients))
    return results


def agree(mine, exact, tolerance=1e-5):
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=tolerance, atol=1e-9)
    for got, want in zip(mine[1], exact[1], strict=True):
        rounding = tolerance if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
        atol = rounding * float(want.abs().max()) + 1e-12
        torch.testing.assert_close(got.double(), want, rtol=rounding, atol=atol)


def relative(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("margin", "features"), [(0.0, 64), (0.2, 11)])
def test_every_layout(case, launched, margin, features, dtype):
    layers = [case.states(features, dtype, seed) for seed in range(2)]
    mine, exact = both(layers, case.spans, case.layout, margin)
    agree(mine, exact)
    assert launched == [FORWARD, BACKWARD]  # once for all layers
    # nothing outside the spans, exactly
    segment, offset = case.layout.segments(), case.layout.offsets()
    outside = (segment < 0) | (offset >= case.spans[segment.clamp(min=0)]) | (case.spans[segment.clamp(min=0)] < 2)
    assert not any(gradient[outside].any() for gradient in mine[1])


def test_the_oracle_agrees(cases, device):
    """The reference is held to the oracle elsewhere; once directly, token by token."""
    case = cases("right padding")
    h = case.states(7).double()
    a, b = h[0, 0], h[0, 1:17]
    want = ((b @ a) ** 2 / ((a @ a) * (b * b).sum(-1))).sum()
    case = Layout(case.layout.starts[:1], case.layout.lengths[:1], 1, 17, False)
    spans = torch.tensor([17], device=device)
    got = decorrelation.decorrelation_sums([h[:1].float()], spans, case, 0.0)
    torch.testing.assert_close(got.double(), want.reshape(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("programs", [1, 10_000])
def test_any_number_of_parts(cases, monkeypatch, programs):
    monkeypatch.setattr(decorrelation, "_PROGRAMS", programs)
    for name in ("long", "packed, empty sequences and a tail"):
        case = cases(name)
        agree(*both([case.states(24)], case.spans, case.layout, 0.2))


@pytest.mark.parametrize("kind", ["time first", "expanded", "sliced", "unlike"])
def test_strides(cases, kind):
    case = cases("starts")
    h = case.states(16)
    wide = torch.full((*h.shape[:2], 32), float("nan"), device=h.device)
    wide[..., ::2] = h
    layers = {
        "time first": [h.transpose(0, 1).contiguous().transpose(0, 1)] * 2,
        "expanded": [h[:1].expand(h.shape)] * 2,
        "sliced": [wide[..., ::2]] * 2,
        "unlike": [h, wide[..., ::2], h.transpose(0, 1).contiguous().transpose(0, 1)],
    }[kind]
    assert not all(layer.is_contiguous() for layer in layers)
    exact = reference.decorrelation_sums([layer.double() for layer in layers], case.spans, case.layout, 0.1)
    leaves = [layer.requires_grad_() for layer in layers]
    sums = decorrelation.decorrelation_sums(leaves, case.spans, case.layout, 0.1)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(sums.sum(), leaves[-1])
    want = reference.decorrelation_sums(twins := [x.detach().double().requires_grad_() for x in layers], *case_of(case))
    wanted = torch.autograd.grad(want.sum(), twins[-1])
    times = sum(layer is layers[-1] for layer in layers)  # one tensor given twice has twice the gradient
    torch.testing.assert_close(gradients[0].double(), times * wanted[0], rtol=1e-5, atol=1e-6)


def case_of(case):
    return case.spans, case.layout, 0.1


def test_layers_of_unlike_dtypes(cases):
    case = cases("right padding")
    mine, exact = both([case.states(16), case.states(16, torch.float16, 1)], case.spans, case.layout)
    agree(mine, exact)
    assert [gradient.dtype for gradient in mine[1]] == [torch.float32, torch.float16]


def test_float64_is_the_references(cases, launched):
    case = cases("right padding")
    agree(*both([case.states(16, torch.float64)], case.spans, case.layout), 1e-12)
    assert launched == []


def test_too_many_features(cases):
    case = cases("one token")
    with pytest.raises(ValueError, match="hidden_states.*8192.*8193"):
        decorrelation.decorrelation_sums([case.states(8193)], case.spans, case.layout, 0.0)


def test_long_rows(cases):
    """Not a power of two, and more than one warp's worth."""
    case = cases("one token")
    layout = Layout(case.layout.starts, case.layout.lengths * 0 + 4, 2, 4, False)
    h = torch.randn(2, 4, 5000, generator=torch.Generator().manual_seed(1)).to(case.spans.device)
    agree(*both([h, h + 1.0], torch.full_like(case.spans, 4), layout))


# ---- numbers that are hard


def near_parallel(device):
    """BOS with spikes of 2e4 and -3e3 and a token that differs from it by a relative 1e-3: 1 - cos^2 = 1e-6."""
    g = torch.Generator().manual_seed(4)
    h = torch.randn(1, 6, 576, generator=g)
    h[:, 0, 507], h[:, 0, 100] = 2e4, -3e3
    h[:, 1] = 0.8 * h[:, 0] + 0.7 * torch.randn(576, generator=g)
    return h.bfloat16().float().to(device)


@pytest.mark.parametrize("span", [2, 6])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_near_parallel_massive_activations(device, span, scale):
    h, spans = near_parallel(device), torch.tensor([span], device=device)
    layout = Layout(torch.tensor([0], device=device), torch.tensor([6], device=device), 1, 6, False)
    upstream = torch.tensor([scale], device=device)
    mine, exact = both([h], spans, layout, upstream=upstream)
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=1e-6, atol=0)
    for token in (0, 1):  # BOS and its shadow, each against its own size
        assert relative(mine[1][0][:, token], exact[1][0][:, token]) < 1e-3


def test_a_loss_scale_only_multiplies(cases):
    case = cases("starts")
    layers = [case.states(24, seed=seed) for seed in range(2)]
    device = layers[0].device
    (_, plain), _ = both(layers, case.spans, case.layout, upstream=torch.ones(2, device=device))
    (_, scaled), exact = both(layers, case.spans, case.layout, upstream=torch.full((2,), 65536.0, device=device))
    for a, b, want in zip(plain, scaled, exact[1], strict=True):
        assert torch.equal(65536.0 * a, b)  # a power of two
        assert relative(b, want) < 1e-6


def test_massive_activations_in_float16_do_not_overflow(cases):
    case = cases("right padding")
    h = case.states(64, torch.float16)
    h[:, :2, 7] = 2e4  # its square is beyond float16
    mine, exact = both([h], case.spans, case.layout)
    agree(mine, exact)
    assert mine[1][0].isfinite().all()


@pytest.mark.parametrize("zero", [[0], [2], [0, 2], list(range(17))], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-14])
def test_zero_and_clamped_vectors(cases, zero, size):
    case = cases("right padding")
    h = case.states(16)
    h[0, zero] *= size
    mine, exact = both([h], case.spans, case.layout)
    agree(mine, exact)
    if size == 0.0:
        assert not mine[1][0][0, zero].any()


# ---- NaN


def test_poison_in_padding_reaches_nothing(case):
    h = case.states(16)
    segment = case.layout.segments().clamp(min=0)
    outside = (case.layout.segments() < 0) | (case.layout.offsets() >= case.spans[segment])
    outside |= case.spans[segment] < 2
    (clean, _), _ = both([h], case.spans, case.layout, 0.2)
    (sums, (gradient,)), _ = both([h.masked_fill(outside[..., None], float("nan"))], case.spans, case.layout, 0.2)
    assert torch.equal(sums, clean)
    assert gradient.isfinite().all() and not gradient[outside].any()


@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("margin", [0.0, 0.9])
def test_nan_where_it_counts_is_seen(cases, token, margin):
    case = cases("right padding")
    h = case.states(16)
    h[1, token, 3] = float("nan")
    (sums, (gradient,)), _ = both([h, case.states(16)][:1], case.spans, case.layout, margin)
    assert sums.isnan().all()
    assert gradient[1, token].isnan().any() and gradient[1, 0].isnan().any()
    # and stays in its row, within its span
    assert gradient[0].isfinite().all() and not gradient[1, 5:].any()


# ---- an operator like any other


def arguments(case, layers=2):
    layers = [case.states(8, seed=seed).requires_grad_() for seed in range(layers)]
    return layers, case.layout.starts, case.spans, case.layout.packed, 0.1


def test_runs_are_bitwise_the_same(cases):
    case = cases("packed, empty sequences and a tail")
    layers = [case.states(24, seed=seed) for seed in range(2)]
    first, second = (both(layers, case.spans, case.layout)[0] for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("name", ["starts", "packed crowd"])
def test_opcheck(cases, name, monkeypatch):
    monkeypatch.undo()  # the poison is not for tracing
    case = cases(name)
    run = torch.ops.flashsink.triton_decorrelation_sums.default
    torch.library.opcheck(run, arguments(case))
    layers, starts, spans, packed, _ = arguments(case)
    _, *kept = (output.detach() for output in run(*arguments(case)))
    upstream = torch.rand(2, device=starts.device)
    back = torch.ops.flashsink.triton_decorrelation_sums_backward.default
    torch.library.opcheck(back, (upstream, [x.detach() for x in layers], starts, spans, packed, *kept))


def test_compiles_whole(cases, monkeypatch):
    monkeypatch.undo()

    def loss(layers, spans, layout):
        return decorrelation.decorrelation_sums([2.0 * x for x in layers], spans, layout, 0.1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # of any size from the second on
    for name in ("starts", "long"):
        case = cases(name)
        layers = [case.states(8, seed=seed).requires_grad_() for seed in range(2)]
        want = loss(layers, case.spans, case.layout)
        got = compiled(layers, case.spans, case.layout)
        torch.testing.assert_close(got, want)
        gradients = torch.autograd.grad(got, layers), torch.autograd.grad(want, layers)
        torch.testing.assert_close(*gradients)


def test_a_second_derivative_is_refused(cases):
    case = cases("starts")
    h = case.states(8).requires_grad_()
    sums = decorrelation.decorrelation_sums([h], case.spans, case.layout, 0.0)
    (gradient,) = torch.autograd.grad(sums.sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        gradient.sum().backward()
