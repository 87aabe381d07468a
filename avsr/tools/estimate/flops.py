"""How much a training step has to compute, however it is implemented: the numerator of MFU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avsr.tools.estimate.memory import Sizes

FORMULA = (
    "MFU = model FLOPs / (seconds x peak FLOP/s); model FLOPs = 4 x frozen + 6 x trained matrix entries per token, "
    "12 x heads x head dim x sum of S^2 / 2 per layer for causal attention (forward 4, backward 8), and 4 x hidden x "
    "vocabulary per label; recomputation by activation checkpointing, frozen encoders and element-wise work count zero"
)


@dataclass(frozen=True)
class Rows:
    """The input of a step."""

    lengths: Sequence[int]  # tokens of every utterance, prompt and text
    speech: int  # tokens from the projectors
    labels: int


def step_flops(sizes: Sizes, rows: Rows) -> float:
    """Model FLOPs of one step (Narayanan et al. 2021, for frozen weights): a frozen matrix costs 2 FLOPs per entry and
    token in the forward and 2 in the backward, a trained one 2 more."""
    width = sizes.heads * sizes.head_dim
    total = sum(rows.lengths) * (4.0 * sizes.layers * sizes.layer + 6.0 * sizes.lora)
    total += 12.0 * sizes.layers * width * sum(n * n for n in rows.lengths) / 2
    total += 4.0 * rows.labels * sizes.hidden * sizes.vocabulary
    return total + 6.0 * rows.speech * sizes.projectors
