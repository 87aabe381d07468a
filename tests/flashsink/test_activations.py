"""activation_stats against definition 3, number by number."""

from __future__ import annotations

import pytest
import torch

import flashsink

LAYOUTS = {
    "no padding": {},
    "right padding": {"lengths": [8, 3, 1]},
    "left padding": {"starts": [0, 5, 7]},
    "both": {"starts": [2, 5, 0], "lengths": [4, 2, 8]},
    "rows without tokens": {"starts": [8, 0, 3], "lengths": [0, 0, 5]},
}


def make(layout, features=10, dtype=torch.float32):
    hidden = torch.randn(2, 3, 8, features, generator=torch.Generator().manual_seed(6)).to(dtype)
    return hidden, {name: torch.tensor(value) for name, value in layout.items()}


def valid(layout):
    first = layout.get("starts", torch.zeros(3, dtype=torch.long))
    length = layout.get("lengths", 8 - first)
    position = torch.arange(8)
    return (position >= first[:, None]) & (position < (first + length)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [10, 7, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_definition(oracle, backend, layout, features, dtype):
    hidden, layout = make(LAYOUTS[layout], features, dtype)
    stats = flashsink.activation_stats(hidden, **layout, median=True, backend=backend)
    top, feature, median = oracle.activations(hidden, **layout)
    assert stats.max_abs.dtype == stats.median.dtype == torch.float32 and stats.feature.dtype == torch.int32
    assert stats.max_abs.tolist() == top
    assert stats.feature.tolist() == feature
    assert stats.median.tolist() == median


@pytest.mark.parametrize("layout", LAYOUTS)
def test_median_is_torch_median_of_the_valid_tokens(backend, layout):
    hidden, layout = make(LAYOUTS[layout])
    stats = flashsink.activation_stats(hidden, **layout, median=True, backend=backend)
    keep = valid(layout)
    for layer in range(2):
        for row in range(3):
            own = hidden[layer, row][keep[row]].abs()
            expected = own.median() if own.numel() else torch.tensor(0.0)
            assert stats.median[layer, row] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_zero_and_minus_one_whatever_it_holds(backend, layout):
    hidden, layout = make(LAYOUTS[layout])
    clean = flashsink.activation_stats(hidden, **layout, median=True, backend=backend)
    padding = ~valid(layout)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = hidden.masked_fill(padding[:, :, None], poison)
        stats = flashsink.activation_stats(dirty, **layout, median=True, backend=backend)
        assert torch.equal(stats.max_abs, clean.max_abs)
        assert torch.equal(stats.feature, clean.feature)
        assert torch.equal(stats.median, clean.median)
    assert not clean.max_abs[:, padding].any()
    assert (clean.feature[:, padding] == -1).all()
    assert (clean.feature[:, ~padding] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [5, 64, 1000])
def test_ties_give_the_lowest_feature(backend, features, dtype):
    hidden = torch.zeros(1, 1, 4, features, dtype=dtype)
    hidden[0, 0, 1, [2, 4]] = 3.0
    hidden[0, 0, 2, [1, features - 1]] = torch.tensor([-3.0, 3.0], dtype=dtype)
    hidden[0, 0, 3] = -1.5
    stats = flashsink.activation_stats(hidden, backend=backend)
    assert stats.feature[0, 0].tolist() == [0, 2, 1, 0]
    assert stats.max_abs[0, 0].tolist() == [0.0, 3.0, 3.0, 1.5]


def test_values_are_exact_where_bfloat16_steps_are_wide(backend):
    hidden = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    hidden[..., 5], hidden[..., 6] = -20096.0, 19968.0
    stats = flashsink.activation_stats(hidden, backend=backend)
    assert (stats.max_abs.item(), stats.feature.item()) == (20096.0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_is_the_largest_and_the_first_one_is_named(backend, dtype):
    """The feature is one that exists, whatever else the token holds."""
    nan, inf = float("nan"), float("inf")
    hidden = torch.tensor([[2.0, 9.0, 1.0], [2.0, nan, 1.0], [inf, 1.0, nan], [-nan, nan, inf], [nan] * 3]).to(dtype)
    stats = flashsink.activation_stats(hidden[None, None], lengths=torch.tensor([4]), backend=backend)
    assert stats.feature[0, 0].tolist() == [1, 1, 2, 0, -1]
    assert stats.max_abs[0, 0].isnan().tolist() == [False, True, True, True, False]


def test_no_rows(backend):
    stats = flashsink.activation_stats(torch.zeros(2, 0, 3, 8), median=True, backend=backend)
    assert stats.max_abs.shape == stats.feature.shape == (2, 0, 3) and stats.median.shape == (2, 0)


def test_list_and_strided_inputs(backend):
    hidden, layout = make(LAYOUTS["both"])
    want = flashsink.activation_stats(hidden, **layout, median=True, backend=backend)
    strided = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (list(hidden.unbind(0)), tuple(hidden.unbind(0)), strided, hidden.mT.contiguous().mT):
        stats = flashsink.activation_stats(other, **layout, median=True, backend=backend)
        assert torch.equal(stats.max_abs, want.max_abs)
        assert torch.equal(stats.feature, want.feature)
        assert torch.equal(stats.median, want.median)


def test_no_median_unless_asked_and_no_graph(backend):
    hidden = make({})[0].requires_grad_()
    stats = flashsink.activation_stats(hidden, backend=backend)
    assert stats.median is None and not stats.max_abs.requires_grad
    assert not flashsink.activation_stats(hidden, median=True, backend=backend).median.requires_grad
