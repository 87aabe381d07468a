"""The largest activations in Triton, against the definition: exactly."""

from __future__ import annotations

import pytest
import torch

from flashsink import reference
from flashsink.triton import activations

pytestmark = pytest.mark.usefixtures("poison")


def agree(layers, layout, median=False):
    mine = activations.activation_stats(layers, layout, median)
    want = reference.activation_stats(layers, layout, median)
    assert mine.max_abs.dtype == torch.float32 and mine.feature.dtype == torch.int32
    torch.testing.assert_close(mine.max_abs, want.max_abs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(mine.feature, want.feature)
    assert (mine.median is None) == (not median) and (not median or torch.equal(mine.median, want.median))
    return mine


@pytest.mark.parametrize("features", [11, 64])
def test_every_layout(case, launched, features, dtype):
    padding = ~case.layout.valid()
    layers = [
        case.states(features, dtype, seed).masked_fill(padding[..., None], float("nan")).requires_grad_()
        for seed in range(3)
    ]
    stats = agree(layers, case.layout)
    assert launched == ["activation_max"]  # once for all layers
    assert not stats.max_abs.requires_grad
    assert not stats.max_abs[:, padding].any() and (stats.feature[:, padding] == -1).all()


def test_medians(cases):
    case = cases("starts")
    agree([case.states(24)], case.layout, True)


def test_ties_signs_and_special_values(cases, dtype):
    case = cases("right padding")
    h = case.states(24, dtype)
    h[0, 0] = 0.0  # all features are equal
    h[0, 1, [3, 9]] = torch.tensor([-50.0, 50.0], dtype=dtype, device=h.device)
    h[0, 2, [20, 21]] = 77.0
    h[0, 3, 5] = float("inf")
    h[0, 4, 7], h[0, 4, 2] = float("-inf"), 1e4
    h[0, 5, [3, 1, 22]] = torch.tensor([float("inf"), float("nan"), -float("nan")], dtype=dtype, device=h.device)
    h.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 5, 22] |= 1  # another NaN, larger as bits
    h[0, 6, [1, 4]] = torch.tensor([float("inf"), float("nan")], dtype=dtype, device=h.device)
    h[0, 7] = 0.0
    h[0, 7, 13] = -torch.finfo(dtype).tiny
    h[0, 8] = -h[0, 8].abs()
    h[0, 9] = torch.finfo(dtype).max
    stats = agree([h], case.layout)
    assert stats.feature[0, 0, :6].tolist() == [0, 3, 20, 5, 7, 1]
    assert stats.feature[0, 0, 7] == 13


def test_the_last_of_many_features(cases, dtype):
    case = cases("one token")
    for features in (8192, 8191):
        h = torch.zeros(2, 1, features, dtype=dtype, device=case.spans.device)
        h[0, 0, -1] = -3.0
        assert agree([h], case.layout).feature[0, 0, 0] == features - 1


def test_strides_and_unlike_dtypes(cases):
    case = cases("starts")
    h = case.states(16)
    agree([h.transpose(0, 1).contiguous().transpose(0, 1), h], case.layout)
    agree([h[:1].expand(h.shape)] * 2, case.layout)
    agree([h, h.half()], case.layout)


def test_float64_is_the_references(cases, launched):
    case = cases("starts")
    agree([case.states(16, torch.float64)], case.layout)
    assert launched == []


def test_too_many_features(cases):
    case = cases("one token")
    with pytest.raises(ValueError, match="hidden_states.*8192.*8193"):
        activations.activation_stats([case.states(8193)], case.layout, False)


def test_opcheck_and_compile(cases, monkeypatch):
    monkeypatch.undo()  # the poison is not for tracing
    case = cases("packed, empty sequences and a tail")
    layers = [case.states(8, seed=seed) for seed in range(2)]
    run = torch.ops.flashsink.triton_activation_max.default
    torch.library.opcheck(run, (layers, case.layout.starts, case.layout.lengths, True))

    def top(layers, layout):
        return activations.activation_stats([2.0 * layer for layer in layers], layout, False).max_abs

    compiled = torch.compile(top, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layers, case.layout), top(layers, case.layout))
