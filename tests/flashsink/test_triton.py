"""The Triton kernels: what is launched, and that no tile or number of programs changes a result."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from cases import SHIPPED, TRITON, Problem, States, compare, exact, on, run

import flashsink
from flashsink.checks import resolve_layout
from flashsink.triton import decorrelation, device, launch, norm
from flashsink.triton.device import locate


@contextlib.contextmanager
def launched():
    """The launches inside."""
    seen = []
    with launch.observe(lambda one: seen.append(one) or True):
        yield seen


@on(TRITON)
def test_how_often_kernels_are_launched(backend):
    """Once for all layers, twice for attention's backward, and not at all for float64."""
    problem, states = Problem("17 tokens, GQA 3", device=backend.device), States("starts", backend.device)
    leaves = problem.leaves()
    with launched() as seen:
        out, stats = flashsink.attention(*leaves, backend="triton", return_stats=True)
        out.sum().backward()
        assert stats.received is not None and len(seen) == 3  # captured, not counted by a pass
    with launched() as seen:
        sinks = torch.ones(2, 3, 17, dtype=torch.bool, device=backend.device)
        flashsink.calibrated_attention(*problem.qkv, sinks, backend="triton")
        assert len(seen) == 2
    h = [states.states(16, seed=seed).requires_grad_() for seed in range(3)]
    with launched() as seen:
        decorrelation.decorrelation_sums(h, states.spans, states.layout, 0.0).sum().backward()
        assert len(seen) == 2
        backend.module.activation_stats(h, states.layout, False)
        assert len(seen) == 3
    weight = torch.ones(16, device=backend.device)
    for spans, count in ((states.spans, 3), (None, 2)):
        with launched() as seen:
            normed = norm.rms_norm(h[0], weight, 1e-5, states.layout, spans, 0.0)
            normed.out.sum().backward()
            assert len(seen) == count
            assert seen[-1].arguments["dweight"] is None  # a frozen weight costs nothing
    with launched() as seen:
        wide = [x.detach().double() for x in h]
        backend.module.decorrelation_sums(wide, states.spans, states.layout, 0.0)
        backend.module.activation_stats(wide, states.layout, False)
        backend.module.rms_norm(wide[0], weight, 1e-5, states.layout, None, 0.0)
        assert not seen


@triton.jit
def tiles_kernel(
    found, starts, lengths, segments, sequences, tokens, GROUP: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr
):
    """What every slot is given."""
    slot = tl.program_id(0)
    _, origin, count, start, end, n, tile = locate(
        slot, 0, starts, lengths, segments, sequences, tokens, tokens, GROUP, BLOCK, PACKED
    )
    found += slot * 6
    tl.store(found, origin)
    tl.store(found + 1, count)
    tl.store(found + 2, start)
    tl.store(found + 3, end)
    tl.store(found + 4, n)
    tl.store(found + 5, tile)


@on(TRITON)
@pytest.mark.parametrize(("group", "block"), [(1, 16), (3, 32), (40, 16)])
@pytest.mark.parametrize("sizes", [[0, 1, 0, 16, 2, 0, 0, 31, 15, 17, 0], [0, 0], [1] * 130], ids=len)
def test_packed_rows_are_cut_into_tiles(backend, sizes, group, block):
    """Every row of GROUP heads is in exactly one tile of its own sequence, or of what is after the last."""
    for tail in (0, 7):
        tokens, bounds = sum(sizes) + tail, torch.tensor([0, *sizes], device=backend.device).cumsum(0)
        layout = resolve_layout(1, tokens, bounds.device, cu_seqlens=bounds)
        segments = torch.ops.flashsink.triton_segments(layout.starts, layout.lengths, tokens)
        assert torch.equal(segments, layout.segments()[0])
        slots = device.slots(tokens, len(sizes), group, block, True)
        found = torch.zeros(slots, 6, dtype=torch.int64, device=bounds.device)
        tiles_kernel[(slots,)](found, layout.starts, layout.lengths, segments, len(sizes), tokens, group, block, True)
        owner = [None] * (tokens * group)
        for origin, count, start, end, n, tile in found.tolist():
            for row in range(tile * block, min((tile + 1) * block, count * group)):
                assert owner[origin * group + row] is None
                owner[origin * group + row] = (start, end, n, tile)
        for n, (low, high) in enumerate(zip(bounds.tolist(), [*bounds.tolist()[1:], tokens], strict=True)):
            own = owner[low * group : high * group]
            after = n == len(sizes)
            expected = (low, low, n - 1) if after else (low, high, n)
            assert own == [(*expected, row // block) for row in range(len(own))]


@on(SHIPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["right padding", "packed", "33 tokens, two groups"])
def test_the_shipped_tiles(backend, case, dtype):
    compare(run(backend, Problem(case, dtype, device=backend.device)), exact(case, dtype=dtype), dtype)


@on(TRITON)
@pytest.mark.parametrize("programs", [1, 10_000])
@pytest.mark.parametrize("case", ["long", "packed crowd"])
def test_any_number_of_programs(backend, monkeypatch, case, programs):
    """Sequences cut into more or fewer parts, and several steps in the search for a chunk's sequences."""
    states = States(case, backend.device)
    h = states.states(16)
    found = []
    for _ in range(2):
        leaf, weight = h.clone().requires_grad_(), torch.linspace(0.5, 1.5, 16, device=h.device).requires_grad_()
        sums = decorrelation.decorrelation_sums([leaf], states.spans, states.layout, 0.1)
        normed = norm.rms_norm(leaf, weight, 1e-3, states.layout, states.spans, 0.1)
        total = 2.0 * sums[0] + normed.out.square().sum() + 3.0 * normed.total
        found.append([sums, *normed, *torch.autograd.grad(total, (leaf, weight))])
        monkeypatch.setattr(decorrelation, "_PROGRAMS", programs)
        monkeypatch.setattr(norm, "_PROGRAMS", programs)
        monkeypatch.setattr(norm, "_BLOCK_N", 2)
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@on(TRITON)
def test_too_many_features(backend):
    states = States("one token", backend.device)
    h = states.states(8193)
    for call in (
        lambda: backend.module.decorrelation_sums([h], states.spans, states.layout, 0.0),
        lambda: backend.module.activation_stats([h], states.layout, False),
        lambda: backend.module.rms_norm(h, h[0, 0], 1e-5, states.layout, None, 0.0),
    ):
        with pytest.raises(ValueError, match=r"hidden_states.*8192.*8193"):
            call()


@on(TRITON)
def test_checkpointing(backend):
    """Non-reentrant: the forward runs twice and the gradient is the same."""
    from torch.utils.checkpoint import checkpoint

    states = States("starts", backend.device)
    h, weight = states.states(16), torch.ones(16, device=backend.device)

    def step(h):
        normed = norm.rms_norm(h, weight, 1e-3, states.layout, states.spans, 0.1)
        return normed.out.square().sum() + normed.total

    gradients = []
    for call in (step, lambda x: checkpoint(step, x, use_reentrant=False)):
        leaf = h.clone().requires_grad_()
        gradients.append(torch.autograd.grad(call(leaf), leaf)[0])
    assert torch.equal(*gradients)
