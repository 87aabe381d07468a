"""activation_stats against definition 3, number by number."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import BACKENDS, LEVELS, STATES, States, on

import flashsink


@on(LEVELS)
@pytest.mark.parametrize(("features", "dtype"), [(11, None), (1, None), (64, torch.bfloat16), (200, torch.bfloat16)])
@pytest.mark.parametrize("case", STATES)
def test_equals_the_definition(backend, case, features, dtype):
    """Rounded, so that there are ties; padding holds NaN, and gives 0 and -1."""
    states, dtype = States(case, backend.device), dtype or backend.dtype
    layers = [(states.states(features, torch.float32, seed) * 3).round().to(dtype) for seed in range(2)]
    given = [h.masked_fill(~states.valid[..., None], float("nan")).requires_grad_() for h in layers]
    if states.packed:
        stats = backend.module.activation_stats(given, states.layout, True)
    else:
        options = {name: x.to(backend.device) for name, x in states.valid_options.items()}
        stats = flashsink.activation_stats(given, **options, median=True, backend=backend.name)
    assert stats.max_abs.dtype == stats.median.dtype == torch.float32 and stats.feature.dtype == torch.int32
    assert not stats.max_abs.requires_grad and not stats.median.requires_grad
    if states.packed:  # the oracle takes dense rows; these have no padding between the sequences
        end = max(end for _, _, end in states.bos)
        top, feature, median = oracle.activations([h.cpu() for h in layers], [end])
    else:
        top, feature, median = oracle.activations([h.cpu() for h in layers], **states.valid_options)
    assert stats.max_abs.tolist() == top and stats.feature.tolist() == feature and stats.median.tolist() == median


@on(LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties_signs_and_special_values(backend, dtype):
    nan, inf, limits = float("nan"), float("inf"), torch.finfo(dtype)
    h = torch.zeros(12, 200)
    h[1, [3, 199]] = torch.tensor([-50.0, 50.0])
    h[2, [120, 121]] = 77.0
    h[3, 5] = inf
    h[4, [7, 2]] = torch.tensor([-inf, 1e4])
    h[5, [3, 1, 150]] = torch.tensor([inf, nan, -nan])
    h[6, [1, 4]] = torch.tensor([inf, nan])
    h[7, 13] = -limits.tiny
    h[8] = -1.5
    h[9] = limits.max
    h[10, -1] = -3.0
    h[11] = nan
    h = h.to(dtype).to(backend.device)
    h.view(torch.int32 if dtype == torch.float32 else torch.int16)[5, 150] |= 1  # another NaN, larger as bits
    valid = torch.tensor([11], device=backend.device)
    stats = flashsink.activation_stats(h[None, None], lengths=valid, backend=backend.name)
    assert stats.feature[0, 0].tolist() == [0, 3, 120, 5, 7, 1, 4, 13, 0, 0, 199, -1]
    want = [0.0, 50.0, 77.0, inf, inf, nan, nan, limits.tiny, 1.5, limits.max, 3.0, 0.0]
    torch.testing.assert_close(stats.max_abs[0, 0].cpu(), torch.tensor(want), rtol=0, atol=0, equal_nan=True)


def test_values_are_exact_where_bfloat16_steps_are_wide(backend):
    hidden = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device=backend.device)
    hidden[..., 5], hidden[..., 6] = -20096.0, 19968.0
    stats = flashsink.activation_stats(hidden, backend=backend.name)
    assert (stats.max_abs.item(), stats.feature.item()) == (20096.0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_of_many_features(backend, dtype):
    for features in (8192, 8191):
        h = torch.zeros(1, 1, 1, features, dtype=dtype, device=backend.device)
        h[..., -1] = -3.0
        assert flashsink.activation_stats(h, backend=backend.name).feature.item() == features - 1


def test_no_rows(backend):
    stats = flashsink.activation_stats(
        torch.zeros(2, 0, 3, 8, device=backend.device), median=True, backend=backend.name
    )
    assert stats.max_abs.shape == stats.feature.shape == (2, 0, 3) and stats.median.shape == (2, 0)


def test_any_strides_and_unlike_dtypes(backend):
    states = States("starts", backend.device)
    h = states.states(16)
    for other in (
        h.transpose(0, 1).contiguous().transpose(0, 1),
        h.mT.contiguous().mT,
        h[:1].expand(h.shape),
        h.half(),
    ):
        stats = backend.module.activation_stats([other, h], states.layout, True)
        for layer, given in enumerate((other, h)):
            want = BACKENDS[0].module.activation_stats([given.contiguous()], states.layout, True)
            assert all(torch.equal(getattr(stats, n)[layer], getattr(want, n)[0]) for n in ("max_abs", "feature"))
            assert torch.equal(stats.median[layer], want.median[0])


def test_no_median_unless_asked(backend):
    hidden = States("right padding", backend.device).states(8)[None]
    assert flashsink.activation_stats(hidden, backend=backend.name).median is None
