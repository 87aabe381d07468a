"""decorrelation_loss against definition 4, token by token in float64."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from cases import LEVELS, STATES, States, on, relative

import flashsink


def make(case, features, dtype, layers, device="cpu"):
    return [States(case, device).states(features, dtype, seed) for seed in range(layers)]


@functools.cache
def exact(case, features, dtype=torch.float32, margin=0.0, layers=2):
    """(loss, gradients of the layers)."""
    states = States(case)
    leaves = [h.double().requires_grad_() for h in make(case, features, dtype, layers)]
    loss = oracle.decorrelation(leaves, states.spans.tolist(), **states.where(), margin=margin)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def run(layers, spans, backend, upstream=1.0, **options):
    """(loss, gradients of the layers)."""
    leaves = [h.detach().to(backend.device).requires_grad_() for h in layers]
    options = {k: x.to(backend.device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    spans = torch.as_tensor(spans).to(backend.device)
    loss = flashsink.decorrelation_loss(leaves, spans, **options, backend=backend.name)
    assert loss.shape == () and loss.dtype == torch.float32
    return loss.detach().cpu(), torch.autograd.grad(upstream * loss, leaves)


def both(layers, spans, backend, **options):
    """Flashsink's and the oracle's."""
    leaves = [h.detach().double().requires_grad_() for h in layers]
    want = oracle.decorrelation(leaves, spans, **options)
    return run(layers, spans, backend, **options), (want.detach(), torch.autograd.grad(want, leaves))


def agree(got, want, tolerance=1e-5):
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance, atol=1e-9)
    for mine, other in zip(got[1], want[1], strict=True):
        if mine.element_size() == 2:
            # one rounding of the result; the reference adds BOS's gradient up in the dtype
            assert relative(mine, other) < 2.0 * torch.finfo(mine.dtype).eps
            continue
        atol = tolerance * float(other.abs().max()) + 1e-12
        torch.testing.assert_close(mine.cpu().double(), other, rtol=tolerance, atol=atol)


@on(LEVELS)
@pytest.mark.parametrize(("margin", "features", "dtype"), [(0.0, 64, None), (0.2, 11, None), (0.0, 65, torch.bfloat16)])
@pytest.mark.parametrize("case", STATES)
def test_every_layout(backend, case, margin, features, dtype):
    """What is outside the spans holds NaN, and gets a gradient of exactly 0."""
    dtype = dtype or backend.dtype
    states, want = States(case, backend.device), exact(case, features, dtype, margin)
    layers = [h.masked_fill(states.outside[..., None], float("nan")) for h in make(case, features, dtype, 2)]
    got = run(layers, states.spans, backend, margin=margin, **states.options)
    agree(got, want)
    for gradient in got[1]:
        assert gradient.dtype == dtype and not gradient[states.outside].any()


@on(LEVELS)
@pytest.mark.parametrize("features", [1, 3, 31, 576, 5000])
def test_any_number_of_features(backend, features):
    h = make("right padding", features, torch.float32, 1)[0][:, :9]
    (loss, (gradient,)), (want, (exact_gradient,)) = both([h], [9, 5, 1], backend, margin=0.1)
    bound = 1e-6 if backend.device == "cpu" else 1e-5
    assert float(loss) == pytest.approx(float(want), rel=bound)
    if features > 1:  # with one all cosines are 1, and the gradient is 0
        assert relative(gradient, exact_gradient) < bound


@pytest.mark.parametrize("kind", ["time first", "expanded", "unlike strides", "unlike dtypes"])
def test_layers_of_any_strides_and_of_unlike_kinds(backend, kind):
    states = States("starts")
    h = states.states(16)
    wide = torch.full((*h.shape[:2], 32), float("nan"))
    wide[..., ::2] = h
    layers = {
        "time first": [h.transpose(0, 1).contiguous().transpose(0, 1)] * 2,
        "expanded": [h[:1].expand(h.shape)] * 2,
        "unlike strides": [h, wide[..., ::2], h.transpose(0, 1).contiguous().transpose(0, 1)],
        "unlike dtypes": [h, states.states(16, torch.bfloat16, 1)],
    }[kind]
    got, want = both(layers, states.spans.tolist(), backend, margin=0.1, **states.options)
    agree(got, want)
    assert [x.dtype for x in got[1]] == [x.dtype for x in layers]


@on(LEVELS)
def test_each_layer_has_its_own_upstream_gradient(backend):
    """The sums of the layers, one of which is frozen, are each what they are alone."""
    states = States("starts", backend.device)
    layers = [states.states(40, seed=seed).requires_grad_(seed != 3) for seed in range(4)]
    sums = backend.module.decorrelation_sums(layers, states.spans, states.layout, 0.1)
    gradients = torch.autograd.grad(sums @ torch.tensor([1.0, -2.0, 3.0, 4.0], device=sums.device), layers[:3])
    count = int((states.spans - 1).clamp(min=0).sum())
    for layer, factor, got in zip(layers, (1.0, -2.0, 3.0), gradients, strict=False):
        loss, (alone,) = run([layer], states.spans, backend, margin=0.1, **states.options)
        torch.testing.assert_close(got, factor * count * alone, rtol=1e-5, atol=1e-6)


def test_a_stacked_tensor_is_its_layers(backend):
    states = States("right padding", backend.device)
    layers = [states.states(12, seed=seed) for seed in range(2)]
    loss, gradients = run(layers, states.spans, backend)
    leaf = torch.stack(layers).requires_grad_()
    for given in (leaf, tuple(leaf.unbind(0))):
        stacked = flashsink.decorrelation_loss(given, states.spans, backend=backend.name)
        torch.testing.assert_close(stacked.cpu(), loss)
        torch.testing.assert_close(torch.autograd.grad(stacked, leaf)[0], torch.stack(gradients))


def test_float64(backend):
    """Computed by the reference."""
    states = States("starts")
    layers = [states.states(16, torch.float64)]
    got, want = both(layers, states.spans.tolist(), backend, **states.options)
    agree((got[0].double(), got[1]), (want[0].float().double(), want[1]), 1e-10)


# ---- numbers that are hard


def near_parallel():
    """BOS with spikes of 2e4 and -3e3 and tokens that differ from it by a relative 1e-3: 1 - cos^2 is about 1e-6."""
    g = torch.Generator().manual_seed(4)
    h = torch.randn(1, 8, 576, generator=g)
    h[:, 0, 507], h[:, 0, 100] = 2e4, -3e3
    for token in range(1, 8):  # of several lengths, so that the ratios round differently
        h[:, token] = (0.5 + token / 8) * h[:, 0] + 0.7 * torch.randn(576, generator=g)
    return h.bfloat16()


def naive(hidden, span):
    """The loss as the reference system has it: normalise, product, square, mean, in the dtype of the states."""
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    return (unit[:, :1] * unit[:, 1:span]).sum(-1).square().mean()


@on(LEVELS)
@pytest.mark.parametrize("span", [2, 8])
def test_near_parallel_massive_activations(backend, span):
    hidden = near_parallel()
    a, h = hidden[0, 0].double(), hidden[0, 1].double()
    assert 2e-7 < 1 - float((a @ h) ** 2 / ((a @ a) * (h @ h))) < 5e-6
    got, want = both([hidden.float()], [span], backend)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
    scaled = run([hidden.float()], [span], backend, upstream=65536.0)
    for token in range(span):  # each against its own size
        # without fused multiply-add the product rounds before the subtraction
        bound = {"cpu": 1e-4 if backend.level == 0 else 2e-6, "reference": 1e-6}.get(backend.name, 1e-3)
        assert relative(got[1][0][:, token], want[1][0][:, token]) < bound
        assert torch.equal(scaled[1][0][:, token], 65536.0 * got[1][0][:, token])  # a power of two
    # the same states in bf16: only the rounding of the gradient is added; the naive chain is off by tens of percent
    narrow = run([hidden], [span], backend)
    chain = hidden.clone().requires_grad_()
    naive(chain, span).backward()
    torch.testing.assert_close(narrow[0], got[0])
    error = relative(narrow[1][0][:, 1], want[1][0][:, 1])
    assert error < 6e-3 and relative(chain.grad[:, 1], want[1][0][:, 1]) > 20 * error


@on([b for b in LEVELS if getattr(b, "name", "") in ("reference", "cpu")])
@pytest.mark.parametrize("norm", [1e-8, 1.0, 1e25])
@pytest.mark.parametrize("margin", [0.0, 0.9999, 0.9999999])
def test_margins_near_1_and_norms_whose_squares_overflow(backend, margin, norm):
    h = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    h[:, 2:] = h[:, :1] * torch.tensor([1.0, 3.0, 0.5, 2.0])[:, None] + 2e-5 * h[:, 2:]
    got, want = both([h * norm], [6], backend, margin=margin)
    assert want[0] > 0.0
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
    if backend.name == "cpu" and norm > 1.0:
        return  # factors of the gradient are float32 in C++ and underflow
    assert relative(got[1][0] * norm, want[1][0] * norm) < (2e-3 if backend.level == 0 else 1e-5)


def test_massive_activations_in_float16_do_not_overflow(backend):
    h = States("right padding").states(64, torch.float16)
    h[:, :2, 7] = 2e4  # its square is beyond float16
    got, want = both([h], [17, 5, 1], backend)
    agree(got, want)
    assert got[1][0].isfinite().all()


@on(LEVELS)
@pytest.mark.parametrize("who", [[0], [2], [0, 2], list(range(17))], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-14])
def test_zero_vectors_count_as_zero_and_small_norms_are_clamped(backend, who, size):
    """A zero vector has no direction to push it in or to be pushed by."""
    h = States("right padding").states(16)
    h[0, who] *= size
    got, want = both([h], [17, 9, 0], backend)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-9)
    for token in range(17):
        assert relative(got[1][0][:, token], want[1][0][:, token]) < 1e-5
    assert got[1][0].isfinite().all() and (size or not got[1][0][0, who].any())


@on(LEVELS)
@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("margin", [0.0, 0.9])
def test_nan_where_it_counts_is_seen(backend, token, margin):
    h = States("right padding").states(16)
    h[1, token, 3] = float("nan")
    loss, (gradient,) = run([h], [17, 5, 1], backend, margin=margin)
    assert loss.isnan()
    assert gradient[1, token].isnan().any() and gradient[1, 0].isnan().any()
    # and stays in its row, within its span
    assert gradient[0].isfinite().all() and not gradient[1, 5:].any()


# ---- the definition, by hand


@pytest.mark.parametrize("spans", [[0, 0, 0], [1, 1, 1], [0, 1, 0]])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_nothing_counted_gives_exactly_zero(backend, spans, margin):
    h = States("right padding").states(8)
    loss, (gradient,) = run([h], spans, backend, margin=margin)
    assert loss.item() == 0.0 and torch.equal(gradient.cpu(), torch.zeros_like(h))


def test_equal_spans_are_llama_avsrs_mean(backend):
    layers, span = make("right padding", 12, torch.float32, 2), 6
    want = torch.stack([naive(h.double(), span) for h in layers]).mean()
    loss, _ = run(layers, [span] * 3, backend)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


def test_unequal_spans_are_averaged_over_tokens_not_rows(backend):
    """Row 0 has one counted token with cos^2 1, row 1 four with 0: the mean is 1/5, not 1/2."""
    hidden = torch.zeros(2, 5, 2)
    hidden[..., 0] = 1.0
    hidden[1, 1:] = torch.tensor([0.0, 1.0])
    assert run([hidden], [2, 5], backend)[0].item() == pytest.approx(0.2)


def test_margin_pushes_only_states_above_it(backend):
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 1.0], [1.0, 3.0]]])  # cos^2 with BOS: 0.9 and 0.1
    (loss, (gradient,)), (want, (exact_gradient,)) = both([hidden], [3], backend, margin=0.5)
    assert loss.item() == pytest.approx(0.2) and want.item() == pytest.approx(0.2)
    assert not gradient[0, 2].any() and gradient[0, 1].any()
    assert relative(gradient, exact_gradient) < 1e-5
