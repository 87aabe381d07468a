"""The grid: every training of the study, by name."""

from __future__ import annotations

from dataclasses import dataclass

from bench.study.penalty import Penalty

HIGH, LOW = 32, 8  # encoder frames a token: 1.6 and 6.3 tokens a second
SEEDS = (1, 2, 3, 4, 5)
START, INFERENCE = "start ", "inference "  # of the key of an arm before training, and of one changed after it


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        name: what is changed; rate and seed follow from the others.
        rate: frames a token.
        seed: of the delimiters, LoRA and the order of the data.
        weight: lambda.
        margin: of the product's loss.
        penalty: the loss in its place, weighted by lambda.
        overrides: of the config.
        faithful: with the reference's habits (bench.study.faithful).
        sink_logits: a learnable sink a head.
        cold: the projector starts at random, as in the demo.
        steps: optimizer steps; 0 = those of the rate.
        full: only in ``study=full``.
    """

    name: str
    rate: int = HIGH
    seed: int = 1
    weight: float = 0.0
    margin: float = 0.0
    penalty: Penalty | None = None
    overrides: tuple[str, ...] = ()
    faithful: bool = False
    sink_logits: bool = False
    cold: bool = False
    steps: int = 0
    full: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}-r{self.rate}-s{self.seed}"


STEPS = {HIGH: 200, LOW: 120}


def arm_key(key: str) -> str:
    """The key of the arm that a row is about."""
    return key.removeprefix(START).removeprefix(INFERENCE)
