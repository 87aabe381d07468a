"""What the counter of a training step takes for a stop, an operator and a collective."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.step_counts import OUTSIDE, StepCounts

CPU = torch.device("cpu")


def counted(call: Callable[[torch.Tensor], object]) -> dict[str, int]:
    """``call`` gets a tensor of the device."""
    found, x = StepCounts(), torch.arange(3.0)
    with found.counting():
        call(x)
    return {kind: found.counts[kind, OUTSIDE] for kind in ("stops", "operators")}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=CPU),
        lambda x: torch.tensor([1.0]).to(CPU),
        lambda x: (torch.ones(2) + torch.zeros(2)).to(CPU),
        lambda x: torch.tensor([1.0]).to(CPU, non_blocking=True).tolist(),
    ],
)
def test_stops(call: Callable[[torch.Tensor], object]) -> None:
    assert counted(call)["stops"] == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x * 2.0 + x[1:].sum(),
        lambda x: torch.tensor([1.0, 2.0]).cumsum(0).tolist(),
        lambda x: torch.arange(3, device=CPU) < x,
        lambda x: torch.tensor([1.0]).to(CPU, non_blocking=True) + x,
        lambda x: x.to(torch.float64),
        lambda x: x[torch.tensor([0, 1]).to(CPU, non_blocking=True)],
        lambda x: torch.empty(3).copy_(x, non_blocking=True).tolist(),
    ],
)
def test_no_stops(call: Callable[[torch.Tensor], object]) -> None:
    assert counted(call)["stops"] == 0


def test_operators_are_those_of_the_device_that_are_no_views() -> None:
    assert counted(lambda x: (x[1:] * 2.0).view(2, 1))["operators"] == 1
    assert counted(lambda x: torch.ones(3) * 2.0)["operators"] == 0
