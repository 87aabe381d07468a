"""Random shapes, layouts, lengths and tiles for the Triton attention kernels, against the reference in float64."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

from flashsink import reference
from flashsink.checks import resolve_layout
from flashsink.triton import attention as triton
from flashsink.triton import launch, tiles
from flashsink.triton.launch import Tile

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
MANY = int(os.environ.get("FLASHSINK_FUZZ", "2000"))


def problem(draw):
    """(q, k, v, layout, causal, first, tiles) drawn by hypothesis."""
    group, heads = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 2))
    d = draw(st.sampled_from([1, 7, 16, 32, 40, 64, 80]))
    packed = draw(st.booleans())
    if packed:
        sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
        keys = queries = max(sum(sizes) + draw(st.integers(0, 20)), 1)
        rows, options = 1, {"cu_seqlens": [0, *torch.tensor(sizes).cumsum(0).tolist()]}
    else:
        rows, keys = draw(st.integers(1, 3)), draw(st.integers(1, 70))
        queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
        starts = draw(st.lists(st.integers(0, keys), min_size=rows, max_size=rows))
        lengths = [draw(st.integers(0, keys - start)) for start in starts]
        options = {"starts": starts, "lengths": lengths}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10000)))
    q, k, v = (
        torch.randn(rows, h, n, d, generator=generator).to(DEVICE)
        for h, n in ((group * heads, queries), (heads, keys), (heads, keys))
    )
    layout = resolve_layout(rows, keys, q.device, **{n: torch.tensor(x, device=DEVICE) for n, x in options.items()})
    first = layout.starts + draw(st.integers(-2, 40)) if draw(st.booleans()) else None
    cuts = {
        name: Tile({"BLOCK_M": draw(st.sampled_from([16, 32])), "BLOCK_N": draw(st.sampled_from([16, 32]))}, 4, 1)
        for name in ("forward", "gradient_kv", "gradient_q", "received", "calibrate")
    }
    return q, k, v, layout, draw(st.booleans()), first, cuts


def check(q, k, v, layout, causal, first, cuts):
    results = []
    for module, dtype in ((triton, torch.float32), (reference, torch.float64)):
        leaves = [x.to(dtype).detach().clone().requires_grad_() for x in (q, k, v)]
        out, (stats,) = module.attention(*leaves, layout, causal=causal, scale=0.4, counted=[first])
        if module is triton:
            options = {"causal": causal, "scale": 0.4, "query_starts": first}
            early = module.run_received(leaves[0], leaves[1], stats.lse, layout, **options)
        out.sin().sum().backward()
        results.append([out.detach(), stats.lse, stats.received, *(x.grad for x in leaves)])
    results[0].append(early)
    results[1].append(results[1][2])
    for name, got, want in zip(("out", "lse", "received", "dq", "dk", "dv", "pass"), *results, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def run(data):
    *inputs, cuts = problem(data.draw)
    with contextlib.ExitStack() as stack:
        for name, tile in cuts.items():
            stack.enter_context(tiles.override(name, tile))
        check(*inputs, cuts)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_problems(data):
    run(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=MANY, deadline=None, derandomize=True)
@given(data=st.data())
def test_thousands_of_random_problems(data):
    run(data)
