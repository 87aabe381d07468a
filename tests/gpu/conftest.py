"""Fixtures of the kernel tests: poisoned outputs, the record of launches, layouts. Without a GPU Triton's interpreter
runs the kernels on CPU tensors, in float32 and float16 (it computes bfloat16 wrongly)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from flashsink.triton import launch
from flashsink.types import Layout

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
SENTINEL = -77  # what unwritten integers hold

# name: (tokens, starts, lengths, spans), or with "packed" in the name (tokens, bounds, spans)
CASES = {
    "one token": (1, [0, 0], [1, 0], [1, 0]),
    "right padding": (17, [0, 0, 0], [17, 9, 1], [17, 5, 1]),
    "starts": (17, [0, 4, 15, 17], [17, 9, 2, 0], [3, 9, 2, 0]),
    "long": (65, [0, 30], [65, 34], [65, 3]),
    "nothing counted": (5, [0, 1], [5, 4], [1, 0]),
    "packed": (65, [0, 17, 40, 60], [15, 23, 9]),
    "packed, empty sequences and a tail": (65, [0, 0, 17, 17, 40, 58, 58], [0, 17, 0, 2, 18, 0]),
    "packed crowd": (33, [0, *range(1, 29, 3), 31], [1, *[3] * 9, 2]),
    "packed, one token": (1, [0, 1], [1]),
}


@dataclass(frozen=True)
class Case:
    layout: Layout
    spans: torch.Tensor

    def states(self, features, dtype=torch.float32, seed=0):
        """(B, S, C); every third token leans to its BOS, so that a margin leaves some."""
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(self.layout.rows, self.layout.tokens, features, generator=generator)
        segment = self.layout.segments().cpu()
        for n, start in enumerate(self.layout.starts.tolist()):
            row = 0 if self.layout.packed else n
            member = (segment[row] == n).nonzero().flatten()[1:]
            if len(member):
                h[row, member[1::3]] += 2.0 * h[row, start]
        return h.to(dtype).to(DEVICE)


def build(name, tokens, *lists):
    *where, spans = (torch.tensor(values, device=DEVICE) for values in lists)
    if name.startswith("packed"):
        return Case(Layout(where[0][:-1], where[0].diff(), 1, tokens, True), spans)
    return Case(Layout(where[0], where[1], len(spans), tokens, False), spans)


@pytest.fixture(params=CASES)
def case(request):
    """Every layout with its spans."""
    return build(request.param, *CASES[request.param])


@pytest.fixture
def cases():
    """The function that gives a layout by its name."""
    return lambda name: build(name, *CASES[name])


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=([] if launch.INTERPRETED else [torch.bfloat16]) + [torch.float32, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def launched():
    """The names of the kernels that were launched so far."""
    names = []

    def note(seen):
        names.append(seen.kernel.fn.__name__)
        return True

    with launch.observe(note):
        yield names


@pytest.fixture
def poison(monkeypatch):
    """What torch.empty and torch.empty_like give is full of NaN: unwritten outputs are seen."""

    def filled(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            tensor.detach().fill_(float("nan") if tensor.is_floating_point() else SENTINEL)
            return tensor

        return empty

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
