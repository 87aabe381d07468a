"""The C++ kernels on every instruction set of this machine, their operators."""

from __future__ import annotations

import os

import pytest
import torch

from flashsink import reference
from flashsink.cpu import library as native
from flashsink.types import Layout

BUILT = native.available() == "usable"
REQUIRED = os.environ.get("FLASHSINK_REQUIRE_NATIVE") == "1"

needs_library = pytest.mark.skipif(not BUILT and not REQUIRED, reason=native.available())


def rows(starts, lengths, tokens):
    return Layout(torch.tensor(starts), torch.tensor(lengths), len(starts), tokens, False)


def exact(layer, spans, layout, margin):
    """The sum and its gradient in float64 from the formula."""
    leaf = layer.detach().double().requires_grad_()
    total = (leaf[:0] * 0.0).sum()
    for n, (start, span) in enumerate(zip(layout.starts.tolist(), spans.tolist(), strict=True)):
        row = leaf[0 if layout.packed else n]
        if span < 2 or not row[start].detach().any():
            continue
        a, h = row[start], row[start + 1 : start + span]
        h = h[h.detach().any(dim=1)]  # the cosine with a zero vector is 0
        total = total + torch.relu((h @ a) ** 2 / ((a @ a) * (h * h).sum(dim=1)) - margin).sum()
    total.backward()
    return float(total.detach()), leaf.grad


def ours(layer, spans, layout, margin):
    leaf = layer.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    total = native.decorrelation_sums([leaf], spans, layout, margin)[0]
    total.backward()
    return total.detach(), leaf.grad


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def states(*shape, dtype=torch.float32, lean=0.7, seed=0):
    """Random states; every second token leans to BOS, so that a margin splits them."""
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    hidden[:, 1::2] += lean * hidden[:, :1]
    return hidden.to(dtype)


# ---- decorrelation


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("features", [1, 3, 31, 64, 65, 576])
def test_sum_and_gradient(isa, features, margin, dtype):
    layer = states(4, 70, features, dtype=dtype)
    layout = rows([0, 3, 70, 0], [70, 67, 0, 70], 70)
    spans = torch.tensor([70, 66, 0, 1])  # 70 tokens need a second unit of work
    want, want_grad = exact(layer, spans, layout, margin)
    total, grad = ours(layer, spans, layout, margin)
    assert total.dtype == torch.float32 and total.shape == () and want > 0
    assert float(total) == pytest.approx(want, rel=1e-6)
    assert grad.dtype == dtype and grad.shape == layer.shape
    if features > 1:  # one feature: all cosines are 1, the gradient is 0
        assert error(grad, want_grad) < (1e-6 if dtype == torch.float32 else 4e-3)
        assert error(grad[:, 0], want_grad[:, 0]) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert not grad[2:].any() and not grad[1, :3].any() and not grad[1, 69:].any()


@needs_library
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_packed(isa, margin):
    starts, lengths = [0, 1, 1, 80, 90], [1, 0, 79, 10, 20]
    layer = states(1, 115, 33)  # five tokens behind the last sequence
    layout = Layout(torch.tensor(starts), torch.tensor(lengths), 1, 115, True)
    spans = torch.tensor([1, 0, 75, 4, 20])
    want, want_grad = exact(layer, spans, layout, margin)
    total, grad = ours(layer, spans, layout, margin)
    assert float(total) == pytest.approx(want, rel=1e-6)
    assert error(grad, want_grad) < 1e-6


@needs_library
def test_any_strides_over_rows_and_tokens(isa):
    layer = states(3, 20, 48)
    layout, spans = rows([0, 2, 4], [20, 18, 16], 20), torch.tensor([20, 11, 5])
    want, want_grad = exact(layer, spans, layout, 0.1)
    wide = torch.full((3, 40, 61), float("nan"))
    wide[:, ::2, 7:55] = layer
    features_first = layer.mT.contiguous().mT
    for strided in (layer.transpose(0, 1).contiguous().transpose(0, 1), wide[:, ::2, 7:55], features_first):
        leaf = strided.requires_grad_()
        assert not leaf.is_contiguous()
        total = native.decorrelation_sums([leaf], spans, layout, 0.1)[0]
        (grad,) = torch.autograd.grad(total, leaf)
        assert float(total.detach()) == pytest.approx(want, rel=1e-6)
        assert error(grad, want_grad) < 1e-6
    one = layer[:1, :1].expand(3, 20, 48)
    assert float(native.decorrelation_sums([one], spans, layout, 0.0)[0]) == pytest.approx(33.0)


@needs_library
@pytest.mark.parametrize("gap", [1e-2, 1e-3, 3e-4])
def test_states_nearly_parallel_to_bos(isa, gap):
    g = torch.Generator().manual_seed(3)
    layer = torch.randn(1, 8, 2048, generator=g)
    layer[0, 0, 507], layer[0, 0, 100] = 2e4, -3e3
    size = float(layer[0, 0].norm())
    for token in range(1, 8):
        noise = torch.randn(2048, generator=g)
        layer[0, token] = (0.5 + token / 8) * (layer[0, 0] + gap * size / noise.norm() * noise)
    layout, spans = rows([0], [8], 8), torch.tensor([8])
    want, want_grad = exact(layer, spans, layout, 0.0)
    total, grad = ours(layer, spans, layout, 0.0)
    assert float(total) == pytest.approx(want, rel=1e-7)
    # without fused multiply-add the product rounds before the subtraction
    for token in range(8):
        assert error(grad[:, token], want_grad[:, token]) < (2e-6 if isa else 1e-4)


@needs_library
@pytest.mark.parametrize("zero", [[0], [2], [0, 2], list(range(9))])
def test_zero_vectors_have_no_direction(isa, zero):
    layer = states(1, 9, 40)
    layer[:, zero] = 0.0
    layout, spans = rows([0], [9], 9), torch.tensor([9])
    want, want_grad = exact(layer, spans, layout, 0.0)
    total, grad = ours(layer, spans, layout, 0.0)
    assert float(total) == pytest.approx(want, rel=1e-6) and torch.isfinite(grad).all()
    assert error(grad, want_grad) < 1e-6 and not grad[:, zero].any()


@needs_library
@pytest.mark.parametrize("who", [[0], [2], [0, 2]])
def test_norms_are_clamped_as_in_the_reference(isa, who):
    layer = states(1, 5, 40)
    layer[:, who] *= 1e-14
    layout, spans = rows([0], [5], 5), torch.tensor([5])
    leaf = layer.double().requires_grad_()
    want = reference.decorrelation_sums([leaf], spans, layout, 0.0)[0]
    want.backward()
    total, grad = ours(layer, spans, layout, 0.0)
    assert float(total) == pytest.approx(float(want.detach()), rel=1e-6)
    for token in range(5):
        assert error(grad[:, token], leaf.grad[:, token]) < 1e-6


@needs_library
def test_nan_is_seen(isa):
    layer = states(2, 6, 40)
    layer[0, 3, 5] = float("nan")
    layout = rows([0, 0], [6, 6], 6)
    assert torch.isnan(native.decorrelation_sums([layer], torch.tensor([6, 6]), layout, 0.5)[0])
    assert not torch.isnan(native.decorrelation_sums([layer], torch.tensor([3, 6]), layout, 0.5)[0])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(isa, threads, dtype):
    layer = states(3, 300, 100, dtype=dtype)
    layout, spans = rows([0, 5, 9], [300, 290, 291], 300), torch.tensor([299, 200, 13])
    results = []
    for number in (1, 2, 3):
        threads(number)
        total, grad = ours(layer, spans, layout, 0.1)
        stats = native.activation_stats([layer], layout, False)
        results.append([total, grad, stats.max_abs, stats.feature])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_upstream_gradient_scales_and_a_second_derivative_is_refused():
    layer = states(2, 9, 40).requires_grad_()
    layout, spans = rows([0, 0], [9, 9], 9), torch.tensor([9, 4])
    total = native.decorrelation_sums([layer], spans, layout, 0.0)[0]
    (once,) = torch.autograd.grad(total, layer, retain_graph=True)
    (thrice,) = torch.autograd.grad(total * -3.0, layer, create_graph=True)
    torch.testing.assert_close(thrice, -3.0 * once)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        thrice.sum().backward()


@needs_library
@pytest.mark.parametrize("mixed", [False, True])
def test_several_layers_are_each_what_they_are_alone(mixed):
    """Of unlike strides and, with the op called for each, of unlike dtypes; one of them frozen."""
    layout, spans = rows([0, 2], [9, 7], 9), torch.tensor([9, 4])
    layers = [states(2, 9, 40, seed=seed) for seed in range(4)]
    layers[1] = layers[1].transpose(0, 1).contiguous().transpose(0, 1)
    layers[2] = layers[2].bfloat16() if mixed else layers[2]
    for index in (0, 1, 2):
        layers[index].requires_grad_()
    factors = torch.tensor([1.0, -2.0, 3.0, 4.0])
    together = native.decorrelation_sums(layers, spans, layout, 0.1)
    (together * factors).sum().backward()
    for layer, total, factor in zip(layers, together.detach(), factors, strict=True):
        alone, grad = ours(layer, spans, layout, 0.1)
        assert torch.equal(total, alone)
        if layer.requires_grad:
            tolerance = 1e-6 if layer.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(layer.grad, factor * grad, rtol=tolerance, atol=1e-7)
    assert layers[3].grad is None


# ---- activations


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 7, 63, 64, 65, 576])
def test_activations_are_those_of_the_reference(isa, features, dtype):
    layer = (torch.randn(3, 70, features, generator=torch.Generator().manual_seed(1)) * 3).round().to(dtype)
    layout = rows([0, 4, 70], [70, 60, 0], 70)
    want = reference.activation_stats([layer], layout, True)
    for other in (layer, layer.transpose(0, 1).contiguous().transpose(0, 1), layer.mT.contiguous().mT):
        got = native.activation_stats([other], layout, True)
        for name in ("max_abs", "feature", "median"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
            assert getattr(got, name).dtype == getattr(want, name).dtype


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_infinity_nan_and_packed(isa, dtype):
    layer = torch.zeros(1, 6, 200, dtype=dtype)
    layer[0, 1, [199, 130, 70]] = torch.tensor([2.0, -2.0, 1.0], dtype=dtype)
    layer[0, 2, [5, 6]] = torch.tensor([1e30, -float("inf")], dtype=dtype)
    layer[0, 3, [150, 9, 151]], layer[0, 5, 9] = (
        torch.tensor([float("inf"), float("nan"), -float("nan")]).to(dtype),
        7.0,
    )
    layer.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[0, 3, 151] |= 1  # another NaN, larger as bits
    layout = Layout(torch.tensor([0, 2, 2]), torch.tensor([2, 0, 3]), 1, 6, True)
    got = native.activation_stats([layer], layout, False)
    want = reference.activation_stats([layer], layout, False)
    assert got.feature[0, 0].tolist() == want.feature[0, 0].tolist() == [0, 130, 6, 9, 0, -1]
    torch.testing.assert_close(got.max_abs, want.max_abs, rtol=0, atol=0, equal_nan=True)


# ---- operators


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(dtype, packed):
    starts = torch.tensor([0, 5] if packed else [0, 2])
    spans = torch.tensor([4, 3])
    layer = states(1 if packed else 2, 9, 16, dtype=dtype)
    ops = torch.ops.flashsink
    leaves = [layer.clone().requires_grad_(), (2.0 * layer).requires_grad_()]
    torch.library.opcheck(ops.decorrelation_sums.default, (leaves, starts, spans, packed, 0.1))
    torch.library.opcheck(ops.activation_max.default, (layer, starts, spans, packed))
    _, scalars, bos = ops.decorrelation_sums([layer, -layer], starts, spans, packed, 0.1)
    upstream = torch.tensor([2.0, 3.0])
    torch.library.opcheck(
        ops.decorrelation_sums_backward.default, (upstream, [layer, -layer], starts, spans, packed, scalars, bos)
    )


@needs_library
def test_compiled_gives_the_same():
    layout, spans = rows([0, 0], [9, 9], 9), torch.tensor([9, 4])
    layer = states(2, 9, 40).requires_grad_()

    def loss(x):
        return native.decorrelation_sums([x * 2.0], spans, layout, 0.0)[0] * 3.0

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (want,) = torch.autograd.grad(loss(layer), layer)
    (got,) = torch.autograd.grad(compiled(layer), layer)
    torch.testing.assert_close(got, want)


@needs_library
def test_operators_refuse_what_they_would_misread():
    layer, starts, spans = states(2, 9, 16), torch.tensor([0, 0]), torch.tensor([9, 9])
    op = torch.ops.flashsink.decorrelation_sums
    for bad in (layer.double(), layer.mT, layer[0]):
        with pytest.raises(ValueError, match="layer"):
            op([bad], starts, spans, False, 0.0)
    for vector in (spans.int(), spans[:1], spans[None]):
        with pytest.raises(ValueError, match="spans"):
            op([layer], starts, vector, False, 0.0)
    with pytest.raises(ValueError, match="starts"):
        op([layer], starts, spans, True, 0.0)
    with pytest.raises(ValueError, match="layers"):
        op([layer, layer.bfloat16()], starts, spans, False, 0.0)
    far = torch.tensor([-5, 99])  # out of range is cut, never read
    total, _, _ = op([layer], far, torch.tensor([99, 99]), False, 0.0)
    assert torch.isfinite(total)


@needs_library
def test_strided_index_vectors():
    pairs = torch.tensor([[0, 9], [3, 6]])
    layer = states(2, 9, 16)
    straight = native.decorrelation_sums([layer], pairs[:, 1].clone(), rows([0, 3], [9, 6], 9), 0.0)[0]
    layout = Layout(pairs[:, 0], pairs[:, 1], 2, 9, False)
    assert torch.equal(native.decorrelation_sums([layer], pairs[:, 1], layout, 0.0)[0], straight)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_the_references(dtype):
    layer, layout, spans = states(2, 9, 16, dtype=dtype), rows([0, 0], [9, 5], 9), torch.tensor([9, 4])
    for margin in (0.0, 0.3):
        want = reference.decorrelation_sums([layer], spans, layout, margin)[0]
        assert torch.equal(native.decorrelation_sums([layer], spans, layout, margin)[0], want)
    assert torch.equal(
        native.activation_stats([layer], layout, False).max_abs,
        reference.activation_stats([layer], layout, False).max_abs,
    )
