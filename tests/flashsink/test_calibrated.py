"""calibrated_attention against the literal ACT algorithm on materialised probabilities in float64."""

from __future__ import annotations

import pytest
import torch

import flashsink

LAYOUTS = {
    "no padding": {},
    "right padding": {"lengths": [13, 6, 1]},
    "left padding": {"starts": [0, 4, 12]},
    "both": {"starts": [2, 4, 0], "lengths": [9, 5, 11]},
    "rows without tokens": {"starts": [0, 13, 3], "lengths": [0, 0, 8]},
}


def make(layout, queries=13, dtype=torch.float32, share=0.3):
    g = torch.Generator().manual_seed(5)
    q = torch.randn(3, 6, queries, 7, generator=g).to(dtype)
    k = torch.randn(3, 2, 13, 7, generator=g).to(dtype)
    v = torch.randn(3, 2, 13, 7, generator=g).to(dtype)
    sinks = torch.rand(3, 6, 13, generator=g) < share
    return q, k, v, sinks, {name: torch.tensor(value) for name, value in layout.items()}


def literal(oracle, q, k, v, sinks, beta, layout):
    probs = oracle.Attention(q, k, v, **layout).probs
    return oracle.weigh(oracle.act(probs, sinks, oracle.runs(k.shape[0], k.shape[2], **layout), beta), v)


def first_tokens(layout, rows=3):
    return layout.get("starts", torch.zeros(rows, dtype=torch.long)).clamp(max=12)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_literal_algorithm(oracle, backend, layout, beta):
    q, k, v, sinks, layout = make(LAYOUTS[layout])
    out = flashsink.calibrated_attention(q, k, v, sinks, beta=beta, **layout, backend=backend)
    want = literal(oracle, q, k, v, sinks, beta, layout)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("layout", ["no padding", "left padding"])
def test_fewer_queries_than_keys(oracle, backend, layout):
    q, k, v, sinks, layout = make(LAYOUTS[layout], queries=1)
    out = flashsink.calibrated_attention(q, k, v, sinks, **layout, backend=backend)
    want = literal(oracle, q, k, v, sinks, 0.4, layout)
    torch.testing.assert_close(out.double(), want, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beta_one_and_no_sinks_are_plain_attention(backend, layout):
    q, k, v, sinks, layout = make(LAYOUTS[layout])
    plain = flashsink.attention(q, k, v, **layout, backend=backend)
    one = flashsink.calibrated_attention(q, k, v, sinks, beta=1.0, **layout, backend=backend)
    none = flashsink.calibrated_attention(q, k, v, torch.zeros_like(sinks), **layout, backend=backend)
    torch.testing.assert_close(one, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(none, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bos_in_the_mask_has_no_effect(backend, layout):
    q, k, v, sinks, layout = make(LAYOUTS[layout])
    row, bos = torch.arange(3), first_tokens(layout)
    without, with_bos = sinks.clone(), sinks.clone()
    without[row, :, bos] = False
    with_bos[row, :, bos] = True
    a = flashsink.calibrated_attention(q, k, v, without, **layout, backend=backend)
    b = flashsink.calibrated_attention(q, k, v, with_bos, **layout, backend=backend)
    assert torch.equal(a, b)
    plain = flashsink.attention(q, k, v, **layout, backend=backend)
    assert not torch.allclose(a, plain)  # the other sinks do have one


@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_still_sum_to_one(backend, layout, beta):
    q, k, v, sinks, layout = make(LAYOUTS[layout])
    out = flashsink.calibrated_attention(q, k, torch.ones_like(v), sinks, beta=beta, **layout, backend=backend)
    first = layout.get("starts", torch.zeros(3, dtype=torch.long))
    length = layout.get("lengths", 13 - first)
    position = torch.arange(13)
    valid = (position >= first[:, None]) & (position < (first + length)[:, None])
    torch.testing.assert_close(out, valid[:, None, :, None].expand(out.shape).float())


# the scores' gap between the sinks and the rest: up to where the rest underflows to 0 in float32
@pytest.mark.parametrize("gap", [10.0, 20.0, 60.0, 86.0, 87.5, 90.0, 95.0, 100.0, 110.0, 1000.0])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_a_row_with_all_its_mass_on_sinks(backend, gap, beta):
    q = torch.ones(1, 1, 6, 1)
    k = torch.tensor([0.0, 0.0, gap, gap, 0.0, 0.0]).view(1, 1, 6, 1).requires_grad_()
    sinks = torch.zeros(1, 1, 6, dtype=torch.bool)
    sinks[..., 2:4] = True
    out = flashsink.calibrated_attention(q, k, torch.ones(1, 1, 6, 1), sinks, beta=beta, backend=backend)
    assert out.isfinite().all()
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gap", [1.0, 10.0, 30.0, 60.0, 95.0, 1000.0])
def test_its_gradient_is_right_and_always_finite(oracle, backend, gap):
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, 6, 3, generator=g) for _ in range(3))
    q[..., 0], k[..., 0], k[..., 2:4, 0] = 3**0.5, 0.0, gap
    sinks = torch.zeros(1, 1, 6, dtype=torch.bool)
    sinks[..., 2:4] = True
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    flashsink.calibrated_attention(*mine, sinks, backend=backend).square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in mine)
    if gap > 30.0:
        return
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].mT / 3**0.5
    probs = scores.masked_fill(torch.ones(6, 6).triu(1) > 0, float("-inf")).softmax(-1)
    oracle.weigh(oracle.act(probs, sinks, [[(0, 6)]], 0.4), exact[2]).square().sum().backward()
    for leaf, reference in zip(mine, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(oracle, backend, dtype):
    q, k, v, sinks, layout = make(LAYOUTS["both"], dtype=dtype)
    out = flashsink.calibrated_attention(q, k, v, sinks, **layout, backend=backend)
    want = literal(oracle, q, k, v, sinks, 0.4, layout)
    assert out.dtype == dtype
    # plain PyTorch: probabilities, their correction and the product in the dtype
    rows = oracle.runs(3, 13, **layout)
    rounded = oracle.act(oracle.Attention(q, k, v, **layout).probs.to(dtype), sinks, rows, 0.4).to(dtype)
    plain = rounded @ v.repeat_interleave(3, 1)
    assert (out.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "no padding"])
def test_poison_in_padding_reaches_nothing(backend, layout):
    q, k, v, sinks, layout = make(LAYOUTS[layout])
    clean = flashsink.calibrated_attention(q, k, v, sinks, **layout, backend=backend)
    first = layout.get("starts", torch.zeros(3, dtype=torch.long))
    length = layout.get("lengths", 13 - first)
    position = torch.arange(13)
    padding = ((position < first[:, None]) | (position >= (first + length)[:, None]))[:, None, :, None]
    leaves = [x.masked_fill(padding, float("nan")).requires_grad_() for x in (q, k, v)]
    out = flashsink.calibrated_attention(*leaves, sinks, **layout, backend=backend)
    torch.testing.assert_close(out, clean)
    out.sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert not leaf.grad.masked_select(padding.expand(leaf.shape)).any()


def test_strided_inputs(oracle, backend):
    q, k, v, sinks, layout = make(LAYOUTS["both"])
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    mask = sinks.transpose(1, 2).contiguous().transpose(1, 2)
    assert not moved[0].is_contiguous() and not mask.is_contiguous()
    out = flashsink.calibrated_attention(*moved, mask, **layout, backend=backend)
    torch.testing.assert_close(out.double(), literal(oracle, q, k, v, sinks, 0.4, layout), rtol=5e-6, atol=5e-6)
