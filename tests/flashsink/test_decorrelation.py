"""decorrelation_loss against definition 4, token by token in float64."""

from __future__ import annotations

import pytest
import torch

import flashsink

L, B, S, C = 2, 3, 9, 11


def states(dtype=torch.float32, shape=(L, B, S, C), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(oracle, hidden, spans, backend, **options):
    """Loss and gradient of flashsink and of the oracle."""
    mine = hidden.clone().requires_grad_()
    exact = hidden.double().requires_grad_()
    spans = torch.as_tensor(spans)
    loss = flashsink.decorrelation_loss(mine, spans, backend=backend, **options)
    want = oracle.decorrelation(exact.unbind(0), spans, **options)
    loss.backward()
    want.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert mine.grad.dtype == hidden.dtype
    return loss.detach(), want.detach(), mine.grad, exact.grad


def agree(result, tolerance=1e-5):
    loss, want, grad, exact = result
    torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=1e-9)
    torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()) + 1e-12)


def relative(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.5])
@pytest.mark.parametrize(
    "spans",
    [[9, 9, 9], [4, 4, 4], [2, 9, 5], [0, 1, 6], [1, 0, 2], [0, 0, 3]],
    ids=lambda s: "-".join(map(str, s)),
)
def test_spans_and_margins(oracle, backend, spans, margin):
    hidden = states()
    hidden[:, :, 1::2] += 0.6 * hidden[:, :, :1]  # every second state leans to BOS, above and below 0.5
    result = both(oracle, hidden, spans, backend, margin=margin)
    assert result[1] > 0 or margin == 0.5
    agree(result)


@pytest.mark.parametrize("margin", [0.0, 0.02])
@pytest.mark.parametrize(("starts", "spans"), [([0, 4, 8], [9, 3, 1]), ([2, 0, 5], [3, 4, 4]), ([9, 3, 1], [0, 6, 8])])
def test_starts(oracle, backend, starts, spans, margin):
    agree(both(oracle, states(), spans, backend, margin=margin, starts=torch.tensor(starts)))


@pytest.mark.parametrize(
    ("bounds", "spans"),
    [([0, 9], [6]), ([0, 1, 4, 9], [1, 3, 4]), ([0, 0, 5, 5, 8], [0, 5, 0, 2]), ([0, 3, 7], [0, 4])],
)
def test_packed(oracle, backend, bounds, spans):
    hidden = states(shape=(L, 1, S, C))
    agree(both(oracle, hidden, spans, backend, margin=0.02, cu_seqlens=torch.tensor(bounds)))


def test_packed_equals_rows(backend):
    rows = states()
    lengths, spans = [9, 4, 6], torch.tensor([5, 4, 1])
    packed = torch.cat([rows[:, b : b + 1, :n] for b, n in enumerate(lengths)], dim=2)
    a = flashsink.decorrelation_loss(rows, spans, backend=backend)
    b = flashsink.decorrelation_loss(packed, spans, cu_seqlens=torch.tensor([0, 9, 13, 19]), backend=backend)
    torch.testing.assert_close(a, b)


def test_stacked_list_and_tuple_are_the_same(backend):
    hidden, spans = states(), torch.tensor([9, 3, 5])
    losses, grads = [], []
    for make in (lambda x: x, lambda x: list(x.unbind(0)), lambda x: tuple(x.unbind(0))):
        leaf = hidden.clone().requires_grad_()
        losses.append(flashsink.decorrelation_loss(make(leaf), spans, backend=backend))
        losses[-1].backward()
        grads.append(leaf.grad)
    assert losses[0] > 0
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(grad, grads[0])


def test_strided_inputs(oracle, backend):
    hidden, spans = states(), torch.tensor([9, 3, 5])
    want = oracle.decorrelation(hidden.unbind(0), spans)
    time_first = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((L, B, S, 2 * C), float("nan"))
    wide[..., ::2] = hidden
    expanded = hidden[:, :1].expand(L, B, S, C)
    for strided, expected in (
        (time_first, want),
        (wide[..., ::2], want),
        (expanded, oracle.decorrelation(expanded.unbind(0), spans)),
    ):
        assert not strided.is_contiguous()
        loss = flashsink.decorrelation_loss(strided, spans, backend=backend)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_accumulate_in_float32(oracle, backend, dtype):
    loss, want, grad, exact = both(oracle, states(dtype, (L, B, S, 64)), [9, 3, 5], backend)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert relative(grad, exact) < torch.finfo(dtype).eps  # the one rounding of the result


def test_float64(oracle, backend):
    _, _, grad, exact = both(oracle, states(torch.float64), [9, 3, 5], backend)
    assert relative(grad, exact) < 1e-10


def near_parallel(dtype):
    """BOS with spikes of 2e4 and -3e3 and a token that differs from it by a relative 1e-3: 1 - cos^2 = 1e-6."""
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 1, 6, 576, generator=g)
    hidden[..., 0, 507], hidden[..., 0, 100] = 2e4, -3e3
    hidden[..., 1, :] = 0.8 * hidden[..., 0, :] + 0.7 * torch.randn(576, generator=g)
    return hidden.to(dtype)


def naive(hidden, span):
    """The loss as the reference system has it: normalise, product, square, mean, in the dtype of the states."""
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    return (unit[:, :, :1] * unit[:, :, 1:span]).sum(-1).square().mean()


@pytest.mark.parametrize("span", [2, 6])
def test_near_parallel_massive_activations(oracle, backend, span):
    hidden = near_parallel(torch.bfloat16)
    a, h = hidden[0, 0, 0].double(), hidden[0, 0, 1].double()
    gap = 1 - float((a @ h) ** 2 / ((a @ a) * (h @ h)))
    assert 2e-7 < gap < 5e-6
    loss, want, grad, exact = both(oracle, hidden.float(), [span], backend)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for token in range(min(span, 2)):  # BOS and its shadow, each against its own size
        assert relative(grad[:, :, token], exact[:, :, token]) < 1e-3
    # the same states in bf16: only the rounding of the gradient is added; the naive chain is off by tens of percent
    narrow, _, grad, exact = both(oracle, hidden, [span], backend)
    chain = hidden.clone().requires_grad_()
    naive(chain, span).backward()
    torch.testing.assert_close(narrow, loss)
    assert relative(grad[:, :, 1], exact[:, :, 1]) < 6e-3
    assert relative(chain.grad[:, :, 1], exact[:, :, 1]) > 20 * relative(grad[:, :, 1], exact[:, :, 1])


def test_massive_activations_in_float16_do_not_overflow(oracle, backend):
    hidden = states(torch.float16, (2, 2, 5, 64))
    hidden[:, :, :2, 7] = 2e4  # its square is beyond float16
    loss, want, grad, exact = both(oracle, hidden, [5, 3], backend)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert grad.isfinite().all()


@pytest.mark.parametrize("zero", ["bos", "token", "both", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_vectors_count_as_zero(oracle, backend, zero, dtype):
    hidden = states(dtype)
    where = {"bos": [0], "token": [2], "both": [0, 2], "all": range(S)}[zero]
    hidden[:, 1, list(where)] = 0.0
    loss, want, grad, exact = both(oracle, hidden, [9, 9, 0], backend)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert grad.isfinite().all()
    # a zero vector has no direction to push it in or to be pushed by
    assert not grad[:, 1, list(where)].any()
    if zero == "all":
        alone = flashsink.decorrelation_loss(hidden[:, 1:2], torch.tensor([9]), backend=backend)
        assert alone.item() == 0.0


@pytest.mark.parametrize("spans", [[0, 0, 0], [1, 1, 1], [0, 1, 0]])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_nothing_counted_gives_exactly_zero(backend, spans, margin):
    leaf = states().requires_grad_()
    loss = flashsink.decorrelation_loss(leaf, torch.tensor(spans), margin=margin, backend=backend)
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    loss.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_equal_spans_are_llama_avsrs_mean(backend):
    hidden = states(torch.float64)
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    span = 6
    layers = [(unit[i, :, :1] @ unit[i, :, 1:span].transpose(1, 2)).square().mean() for i in range(L)]
    loss = flashsink.decorrelation_loss(hidden, torch.full((B,), span), backend=backend)
    torch.testing.assert_close(loss.double(), torch.stack(layers).mean(), rtol=1e-6, atol=0)


def test_unequal_spans_are_averaged_over_tokens_not_rows(backend):
    """Row 0 has one counted token with cos^2 1, row 1 four with 0: the mean is 1/5, not 1/2."""
    hidden = torch.zeros(1, 2, 5, 2)
    hidden[..., 0] = 1.0
    hidden[0, 1, 1:] = torch.tensor([0.0, 1.0])
    loss = flashsink.decorrelation_loss(hidden, torch.tensor([2, 5]), backend=backend)
    assert loss.item() == pytest.approx(0.2)


def test_gradient_reaches_bos_and_nothing_outside_the_span(oracle, backend):
    _, _, grad, exact = both(oracle, states(), [4, 2, 0], backend)
    assert grad[:, 0, :4].norm(dim=-1).min() > 0 and grad[:, 1, :2].norm(dim=-1).min() > 0
    assert torch.equal(grad[:, 0, 4:], torch.zeros_like(grad[:, 0, 4:]))
    assert torch.equal(grad[:, 1, 2:], torch.zeros_like(grad[:, 1, 2:]))
    assert torch.equal(grad[:, 2], torch.zeros_like(grad[:, 2]))
    assert relative(grad[:, :, 0], exact[:, :, 0]) < 1e-5


def test_margin_pushes_only_states_above_it(oracle, backend):
    hidden = torch.zeros(1, 1, 3, 2)
    hidden[0, 0] = torch.tensor([[1.0, 0.0], [3.0, 1.0], [1.0, 3.0]])  # cos^2 with BOS: 0.9 and 0.1
    loss, want, grad, exact = both(oracle, hidden, [3], backend, margin=0.5)
    assert loss.item() == pytest.approx(0.2) and want.item() == pytest.approx(0.2)
    assert not grad[0, 0, 2].any() and grad[0, 0, 1].any()
    assert relative(grad, exact) < 1e-5


def test_poison_in_padding_reaches_nothing(backend):
    hidden, spans = states(), torch.tensor([4, 2, 5])
    starts = torch.tensor([2, 5, 4])
    clean = flashsink.decorrelation_loss(hidden, spans, starts=starts, backend=backend)
    position = torch.arange(S)
    outside = (position < starts[:, None]) | (position >= (starts + spans)[:, None])
    leaf = hidden.masked_fill(outside[:, :, None], float("nan")).requires_grad_()
    loss = flashsink.decorrelation_loss(leaf, spans, starts=starts, backend=backend)
    loss.backward()
    assert torch.equal(loss.detach(), clean)
    assert leaf.grad.isfinite().all() and not leaf.grad[:, outside].any()
