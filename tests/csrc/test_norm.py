"""RMSNorm with the loss and the statistics in C++, against float64 and against its separate parts."""

from __future__ import annotations

import pytest
import torch

from flashsink import reference
from flashsink.cpu import library as native
from flashsink.cpu import norm as native_norm
from flashsink.types import Layout

pytestmark = pytest.mark.usefixtures("library")
EPS = 1e-5


def dense(starts, lengths, tokens):
    return Layout(torch.tensor(starts), torch.tensor(lengths), len(starts), tokens, False)


LAYOUTS = {
    "dense": (dense([0, 3, 70, 0], [70, 60, 0, 70], 70), torch.tensor([70, 55, 0, 1])),
    "packed": (
        Layout(torch.tensor([0, 1, 1, 80, 82]), torch.tensor([1, 0, 79, 2, 8]), 1, 95, True),
        [1, 0, 75, 2, 4],
    ),
}


def case(name, features, dtype=torch.float32):
    layout, spans = LAYOUTS[name]
    g = torch.Generator().manual_seed(1)
    h = torch.randn(layout.rows, layout.tokens, features, generator=g)
    h[:, 1::2] += 0.7 * h[:, :1]
    weight = 1.0 + 0.3 * torch.randn(features, generator=g)
    upstream = torch.randn(h.shape, generator=g)
    return h.to(dtype), weight.to(dtype), layout, torch.as_tensor(spans), upstream.to(dtype)


def run(module, h, weight, layout, spans, upstream, margin=0.1, factor=3.0):
    """(out, total, max_abs, feature, dh, dweight) for the loss <out, upstream> + factor * total."""
    leaves = h.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()
    normed = module.rms_norm(*leaves, EPS, layout, spans, margin)
    loss = (normed.out * upstream).sum()
    if spans is not None:
        loss = loss + factor * normed.total
    loss.backward()
    total = None if spans is None else normed.total.detach()
    return normed.out.detach(), total, normed.max_abs, normed.feature, leaves[0].grad, leaves[1].grad


def wide(h, weight, layout, spans, upstream, **options):
    """The same in float64, without the rounding of the normalised states."""
    return run(reference, h.double(), weight.double(), layout, spans, upstream.double(), **options)


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 3, 31, 64, 65, 576])
@pytest.mark.parametrize("name", LAYOUTS)
def test_against_float64(isa, name, features, dtype):
    arguments = case(name, features, dtype)
    out, total, max_abs, feature, dh, dweight = run(native_norm, *arguments)
    want = wide(*arguments)
    bound = 3e-6 if dtype == torch.float32 else 6e-3
    assert out.dtype == dh.dtype == dweight.dtype == dtype and total.dtype == torch.float32
    assert error(out, want[0]) < bound and error(dweight, want[5]) < bound
    assert float(total) == pytest.approx(float(want[1]), rel=1e-6) and total > 0
    if features > 1:  # one feature: dh is 0 but for eps
        assert error(dh, want[4]) < bound
    own = native.activation_stats([arguments[0]], arguments[2], False)
    assert torch.equal(max_abs, own.max_abs[0]) and torch.equal(feature, own.feature[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rounding_of_the_normalised_states(isa, name, dtype):
    """Nearly every number is bit for bit plain PyTorch's; the others differ in the last place."""
    h, weight, layout, spans, _ = case(name, 576, dtype)
    got = native_norm.rms_norm(h, weight, EPS, layout, spans, 0.0).out
    want = reference.rms_norm(h, weight, EPS, layout, spans, 0.0).out
    assert (got == want).float().mean() > (0.5 if dtype == torch.float32 else 0.99)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=4 * step, atol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_loss_is_the_standalone_one_and_changes_no_bit_of_the_norm(isa, name):
    h, weight, layout, spans, upstream = case(name, 100)
    plain = run(native_norm, h, weight, layout, None, upstream)
    both = run(native_norm, h, weight, layout, spans, upstream, factor=0.0)
    assert all(torch.equal(plain[i], both[i]) for i in (0, 2, 3, 4, 5))
    alone = h.clone().requires_grad_()
    total = native.decorrelation_sums([alone], spans, layout, 0.1)[0]
    total.backward()
    silent = run(native_norm, h, weight, layout, spans, torch.zeros_like(upstream), factor=1.0)
    assert torch.equal(silent[1], total.detach())
    torch.testing.assert_close(silent[4], alone.grad, rtol=1e-5, atol=1e-7)
    assert not silent[5].any()


def test_the_gradients_are_rounded_once():
    """bf16 dh is within half a step of the exact sum, though each of its terms is ten times as large."""
    h, weight, layout, spans, upstream = case("dense", 64, torch.bfloat16)
    want = wide(h, weight, layout, spans, upstream, factor=30.0)[4]
    got = run(native_norm, h, weight, layout, spans, upstream, factor=30.0)[4]
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 * 1.01 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_nearly_parallel_to_bos(isa, dtype):
    g = torch.Generator().manual_seed(3)
    h = torch.randn(1, 8, 2048, generator=g)
    h[0, 0, 507], h[0, 0, 100] = 2e4, -3e3
    for token in range(1, 8):
        h[0, token] = (0.5 + token / 8) * h[0, 0] + 8.0 * torch.randn(2048, generator=g)
    h = h.to(dtype)
    layout, spans = dense([0], [8], 8), torch.tensor([8])
    weight, upstream = torch.ones(2048, dtype=dtype), torch.zeros(1, 8, 2048, dtype=dtype)
    got = run(native_norm, h, weight, layout, spans, upstream, margin=0.0, factor=1e6)
    want = wide(h, weight, layout, spans, upstream, margin=0.0, factor=1e6)
    for token in range(8):
        bound = (2e-6 if isa else 1e-4) if dtype == torch.float32 else 4e-3
        assert error(got[4][:, token], want[4][:, token]) < bound


@pytest.mark.parametrize("name", LAYOUTS)
def test_poison_in_padding_reaches_nothing(isa, name):
    h, weight, layout, spans, upstream = case(name, 40)
    padding = ~layout.valid().unsqueeze(-1)
    upstream = upstream.masked_fill(padding, 0.0)
    clean = run(native_norm, h, weight, layout, spans, upstream)
    got = run(native_norm, h.masked_fill(padding, float("nan")), weight, layout, spans, upstream)
    for i in (1, 2, 3, 4, 5):
        assert torch.equal(got[i], clean[i])
    assert torch.equal(got[0].masked_fill(padding, 0.0), clean[0].masked_fill(padding, 0.0))
    assert not got[4].masked_select(padding).any() and (got[3][~layout.valid()] == -1).all()


def test_nan_in_a_valid_token_is_seen(isa):
    h, weight, layout, spans, upstream = case("dense", 40)
    h[0, 3, 5] = float("nan")
    got = run(native_norm, h, weight, layout, spans, upstream)
    assert torch.isnan(got[1]) and torch.isnan(got[0][0, 3]).all() and torch.isnan(got[4][0, 3]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_threads_change_no_bit(isa, threads, name, dtype):
    # large enough for three threads
    layout, spans = LAYOUTS[name]
    h, weight, layout, spans, upstream = case(name, 2080, dtype)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(run(native_norm, h, weight, layout, spans, upstream))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_any_strides(isa):
    h, weight, layout, spans, upstream = case("dense", 48)
    want = run(native_norm, h, weight, layout, spans, upstream)
    moved = h.transpose(0, 1).contiguous().transpose(0, 1)
    across = upstream.mT.contiguous().mT
    for other in (moved, h.mT.contiguous().mT):
        assert not other.is_contiguous()
        got = run(native_norm, other, weight, layout, spans, across)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_frozen_weight_and_frozen_states():
    h, weight, layout, spans, upstream = case("dense", 48)
    both = run(native_norm, h, weight, layout, spans, upstream)
    for frozen in (0, 1):
        leaves = h.clone().requires_grad_(frozen != 0), weight.clone().requires_grad_(frozen != 1)
        normed = native_norm.rms_norm(*leaves, EPS, layout, spans, 0.1)
        ((normed.out * upstream).sum() + 3.0 * normed.total).backward()
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, both[5 - frozen])


def test_kept_for_the_backward():
    """h itself, the weight and a few numbers a token: no second tensor of h's size."""
    h, weight, layout, spans, _ = case("dense", 576)
    h, weight = h.requires_grad_(), weight.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        native_norm.rms_norm(h, weight, EPS, layout, spans, 0.0)
    large = [x for x in kept if x.numel() >= h.numel() // 4]
    assert {x.data_ptr() for x in large} == {h.data_ptr()}


def test_a_second_derivative_is_refused():
    h, weight, layout, spans, _ = case("dense", 48)
    h.requires_grad_()
    total = native_norm.rms_norm(h, weight, EPS, layout, spans, 0.0).total
    (once,) = torch.autograd.grad(total, h, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        once.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_the_references(dtype):
    h, weight, layout, spans, _ = case("dense", 48, dtype)
    for w in (weight, weight.float()):
        got = native_norm.rms_norm(h, w, EPS, layout, spans, 0.1)
        want = reference.rms_norm(h, w, EPS, layout, spans, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_opcheck(name, dtype):
    h, weight, layout, spans, upstream = case(name, 16, dtype)
    ops = torch.ops.flashsink
    for own in (spans, None):
        for learns in (True, False):
            leaves = h.clone().requires_grad_(), weight.clone().requires_grad_(learns)
            arguments = (*leaves, EPS, layout.starts, layout.lengths, own, layout.packed, 0.1)
            torch.library.opcheck(ops.rms_norm.default, arguments)
            *_, rstd, scalars, bos = ops.rms_norm(h, weight, *arguments[2:])
            arguments = (h, weight, layout.starts, own, layout.packed, rstd, scalars, bos, learns)
            torch.library.opcheck(ops.rms_norm_backward.default, (upstream, torch.tensor(2.0), *arguments))


def test_compiled_gives_the_same():
    h, weight, layout, spans, upstream = case("dense", 48)
    h, weight = h.requires_grad_(), weight.requires_grad_()

    def loss(x, w):
        normed = native_norm.rms_norm(x * 2.0, w, EPS, layout, spans, 0.1)
        return (normed.out * upstream).sum() + normed.total * 3.0 + normed.max_abs.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(loss(h, weight), (h, weight))
    got = torch.autograd.grad(compiled(h, weight), (h, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_refuse_what_they_would_misread():
    h, weight, layout, spans, _ = case("dense", 16)
    run_op = torch.ops.flashsink.rms_norm
    for bad in (weight[:8], weight.double(), torch.ones(32)[::2]):
        with pytest.raises(ValueError, match="weight"):
            run_op(h, bad, EPS, layout.starts, layout.lengths, spans, False, 0.0)
    for bad in (spans[:2], spans.int()):
        with pytest.raises(ValueError, match="spans"):
            run_op(h, weight, EPS, layout.starts, layout.lengths, bad, False, 0.0)
