"""The study's losses against the product's and against loops in float64."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashsink
from bench.study.penalty import OUTLIER, Penalty, PenaltyProbe, penalty_loss

CLOSING = 3  # a closing delimiter and two prompt tokens


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3, 12, 16, dtype=torch.float64), torch.tensor([9, 12, 7])


def loss(penalty: Penalty, states: Tensor, spans: Tensor) -> Tensor:
    return penalty_loss(states, spans, penalty, CLOSING, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_the_plain_penalty_is_the_product(margin: float) -> None:
    states, spans = rows()
    ours, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    mine = loss(Penalty(margin=margin), ours, spans)
    product = flashsink.decorrelation_loss(theirs, spans, margin=margin, backend="reference")
    torch.testing.assert_close(mine.float(), product, rtol=1e-6, atol=0)
    mine.backward()
    product.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_no_gradient_flows_into_a_detached_anchor() -> None:
    states, spans = rows()
    states.requires_grad_()
    loss(Penalty(detach=True), states, spans).backward()
    assert states.grad is not None
    assert not states.grad[:, :, 0].any() and states.grad[:, :, 1].any()


def test_marks_are_all_but_speech() -> None:
    states, spans = rows()
    total, count = 0.0, 0
    for b, span in enumerate(spans.tolist()):
        for s in [1, *range(span - CLOSING, span)]:
            cosine = torch.cosine_similarity(states[:, b, 0], states[:, b, s], dim=-1)
            total, count = total + float((cosine**2).sum()), count + 4
    assert float(loss(Penalty(tokens="marks"), states, spans)) == pytest.approx(total / count)


def test_a_content_anchor_is_a_speech_token_and_does_not_count() -> None:
    states, spans = rows()
    value = float(loss(Penalty(anchor="content"), states, spans))
    candidates = []
    for picks in torch.cartesian_prod(*(torch.arange(2, span - CLOSING) for span in spans.tolist())).tolist():
        total, count = 0.0, 0
        for b, (pick, span) in enumerate(zip(picks, spans.tolist(), strict=True)):
            for s in range(1, span):
                if s != pick:
                    cosine = torch.cosine_similarity(states[:, b, pick], states[:, b, s], dim=-1)
                    total, count = total + float((cosine**2).sum()), count + 4
        candidates.append(total / count)
    assert min(abs(value - candidate) for candidate in candidates) < 1e-12


def test_the_norm_penalty_counts_outliers_alone() -> None:
    states, spans = rows()
    assert float(loss(Penalty(kind="norm"), states, spans)) == 0.0
    large = 100 * float(states[2, 0, 5].norm())
    states[2, 0, 5] *= 100
    ratio = large / (OUTLIER * float(states[2, 0, 1:9].norm(dim=-1).median()))
    counted = 4 * (8 + 11 + 6)
    assert float(loss(Penalty(kind="norm"), states, spans)) == pytest.approx(math.log(ratio) ** 2 / counted)


class Layer(nn.Module):
    def forward(self, states: Tensor, **options: Any) -> Tensor:
        return states


@pytest.mark.parametrize("penalty", [Penalty(kind="norm"), Penalty(), Penalty(anchor="content")])
def test_packed_rows_count_like_padded_ones(penalty: Penalty) -> None:
    states, spans = rows()
    states[:, 1, 4] *= 100  # in a row that is not the first
    lengths = torch.tensor([10, 12, 7])
    packed = torch.cat([states[:, b, :n] for b, n in enumerate(lengths.tolist())], dim=1)[:, None]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    layers = [Layer() for _ in range(len(states) + 1)]
    model: Any = SimpleNamespace(
        attach=lambda **options: SimpleNamespace(spans=lambda spans: contextlib.nullcontext()),
        decoder=SimpleNamespace(model=SimpleNamespace(layers=layers)),
        prompts={"audio": [1, 2]},
        training=True,
    )
    losses = []
    for given, options in ((states, {}), (packed, {"cu_seq_lens_q": bounds})):
        probe = PenaltyProbe(model, penalty, seed=1)
        with probe.spans(spans):
            for layer, own in zip(layers, given, strict=False):
                layer(own, **options)
        losses.append(float(probe.decorrelation_loss))
        for hook in probe._hooks:
            hook.remove()
    assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-6)
