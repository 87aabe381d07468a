"""Average and stack against loops over frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avsr.models.compression import compress, compressed_length, compressed_width


def loop(row: Tensor, kind: str, rate: int) -> Tensor:
    """One utterance, one token at a time."""
    tokens = []
    for first in range(0, row.shape[0], rate):
        group = [row[i] for i in range(first, min(first + rate, row.shape[0]))]
        if len(group) < rate:
            break  # an incomplete group is dropped
        tokens.append(torch.cat(group) if kind == "stack" else sum(group[1:], group[0]) / rate)
    width = compressed_width(row.shape[1], kind, rate)
    return torch.stack(tokens) if tokens else torch.zeros(0, width, dtype=row.dtype)


@pytest.mark.parametrize("kind", ["average", "stack"])
@pytest.mark.parametrize("rate", [1, 2, 3, 8])
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 24, 25])
def test_against_a_loop(kind: str, rate: int, frames: int) -> None:
    torch.manual_seed(frames)
    features = torch.randn(3, frames, 5, dtype=torch.float64)
    out = compress(features, kind, rate)
    expected = torch.stack([loop(row, kind, rate) for row in features])
    assert out.shape == (3, frames // rate, 5 * (rate if kind == "stack" else 1)) == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert compressed_length(frames, rate) == out.shape[1]
    assert compressed_width(5, kind, rate) == out.shape[2]


@pytest.mark.parametrize("kind", ["average", "stack"])
@pytest.mark.parametrize("frames", [8, 9, 10, 11])
def test_padding_never_reaches_a_valid_token(kind: str, frames: int) -> None:
    row = torch.randn(1, frames, 4)
    padded = torch.cat([row, torch.full((1, 7, 4), 1e9)], dim=1)
    count = compressed_length(frames, 4)
    assert torch.equal(compress(padded, kind, 4)[:, :count], compress(row, kind, 4))


def test_strided_input_and_gradient() -> None:
    base = torch.randn(2, 4, 9, dtype=torch.float64).transpose(1, 2).requires_grad_()  # (2, 9, 4)
    out = compress(base, "average", 2)
    torch.testing.assert_close(out[0], loop(base.detach()[0], "average", 2))
    (grad,) = torch.autograd.grad(out.sum(), base)
    assert grad[:, :8].eq(0.5).all() and grad[:, 8:].eq(0).all()
