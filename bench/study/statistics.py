"""Paired hierarchical bootstrap of word error rates, the smallest detectable effect, and Holm's correction.

Both arms decode the same utterances with the same seeds, so one draw serves both (Bisani & Ney 2004): seeds are drawn
with replacement, and, once for all seeds since they share the test set, speakers and utterances of each drawn speaker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

DRAWS = 10_000
LEVEL, POWER = 0.05, 0.8

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """WER of ``other`` minus ``base`` (fractions).

    Attributes:
        base: WER of the base arm, pooled over seeds.
        other: WER of the other.
        delta: other - base.
        low, high: 95% percentile interval of ``delta``.
        p_bootstrap: two-sided, by the share of draws on the other side of 0.
        p_seeds: of a paired t test over the seeds' differences; 1 with one seed.
        smallest: the true difference that the bootstrap would detect (p < 0.05) with a power of 80%.
    """

    base: float
    other: float
    delta: float
    low: float
    high: float
    p_bootstrap: float
    p_seeds: float
    smallest: float

    @property
    def p(self) -> float:
        """The larger of both: the bootstrap of five seeds is too liberal if they differ (10% at a level of 5%)."""
        return max(self.p_bootstrap, self.p_seeds)


def compare(
    base: Sequence[Sequence[int]],
    other: Sequence[Sequence[int]],
    words: Sequence[int],
    speakers: Sequence[str],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Compares two arms.

    Args:
        base: errors by seed and utterance, (seeds, utterances).
        other: of the other arm, with the same seeds and utterances in the same order.
        words: reference words of every utterance.
        speakers: of every utterance.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: shapes differ.
    """
    errors = np.array([base, other], dtype=np.float64)  # (2, seeds, utterances)
    counts = np.array(words, dtype=np.float64)
    if errors.ndim != 3 or errors.shape[2] != len(counts) or len(counts) != len(speakers):
        raise ValueError(f"errors: expected (2, seeds, {len(counts)}), got {errors.shape}")
    random = np.random.default_rng(seed)
    seeds = np.stack([_counts(random, errors.shape[1]) for _ in range(draws)])  # (draws, seeds)
    drawn = np.stack([_utterances(random, speakers) for _ in range(draws)])  # (draws, utterances)
    totals = np.einsum("ds,asu,du->ad", seeds, errors, drawn) / (errors.shape[1] * drawn @ counts)
    deltas = totals[1] - totals[0]
    rates = errors.sum(axis=(1, 2)) / (counts.sum() * errors.shape[1])
    low, high = np.quantile(deltas, [LEVEL / 2, 1 - LEVEL / 2])
    beyond = min(np.mean(deltas <= 0), np.mean(deltas >= 0))
    normal = NormalDist()
    factor = normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)
    return Difference(
        float(rates[0]),
        float(rates[1]),
        float(rates[1] - rates[0]),
        float(low),
        float(high),
        float(min(1.0, 2 * max(beyond, 1 / draws))),
        _over_seeds(errors[1].sum(axis=1) - errors[0].sum(axis=1)),
        float(factor * deltas.std()),
    )


def _over_seeds(differences: Array) -> float:
    """p of a one-sample t test against 0; 1 where it is not defined."""
    if len(differences) < 2 or not differences.any():
        return 1.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def _counts(random: np.random.Generator, size: int) -> Array:
    """(size,): how often each of so many was drawn."""
    return np.bincount(random.integers(size, size=size), minlength=size).astype(np.float64)


def _utterances(random: np.random.Generator, speakers: Sequence[str]) -> Array:
    """(utterances,): speakers are drawn, then utterances of each."""
    names = np.array(speakers)
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(speakers)]
    weights = np.zeros(len(names))
    for group in random.integers(len(groups), size=len(groups)):
        weights[groups[group]] += _counts(random, len(groups[group]))
    return weights


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
