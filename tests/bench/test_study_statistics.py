"""The study's statistics, held to closed forms and to scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from bench.study.statistics import Difference, compare, holm

pytestmark = pytest.mark.integration


def errors(rate: float, random: np.random.Generator, seeds: int = 5, utterances: int = 200) -> list[list[int]]:
    return random.binomial(8, rate, (seeds, utterances)).tolist()


def compared(base: list[list[int]], other: list[list[int]], speakers: int = 8) -> Difference:
    names = [f"s{index % speakers}" for index in range(len(base[0]))]
    return compare(base, other, [8] * len(base[0]), names, draws=2000)


def test_the_same_arm_differs_by_nothing() -> None:
    base = errors(0.2, np.random.default_rng(0))
    found = compared(base, base)
    assert (found.delta, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_rates_are_errors_over_words() -> None:
    found = compare([[1, 0], [3, 2]], [[0, 0], [1, 0]], [5, 7], ["a", "b"], draws=50)
    assert found.base == pytest.approx(6 / 24) and found.other == pytest.approx(1 / 24)
    assert found.delta == pytest.approx(-5 / 24)


def test_a_plain_gain_is_seen() -> None:
    random = np.random.default_rng(1)
    found = compared(errors(0.3, random), errors(0.2, random))
    assert found.high < 0 and found.p < 0.01
    assert abs(found.delta) > found.smallest


def test_deviation_without_structure_is_that_of_the_mean() -> None:
    """One seed and one speaker: the bootstrap of a mean, whose deviation is known (the errors are unpaired)."""
    random = np.random.default_rng(2)
    base, other = errors(0.3, random, seeds=1), errors(0.3, random, seeds=1)
    found = compare(base, other, [8] * 200, ["a"] * 200, draws=4000)
    deviation = np.std((np.array(other) - np.array(base)) / 8) / np.sqrt(200)
    assert found.smallest / (1.959964 + 0.841621) == pytest.approx(deviation, rel=0.05)


def test_seeds_that_disagree_widen_the_interval() -> None:
    """A gain in one of five seeds alone is no finding, however many utterances there are."""
    random = np.random.default_rng(3)
    base = errors(0.3, random)
    other = [errors(0.1, random, seeds=1)[0], *base[1:]]
    found = compared(base, other)
    assert found.delta < 0 and found.high >= 0 and found.p > 0.05


def test_nothing_is_found_in_most_draws_of_nothing() -> None:
    """Seeds that differ by 0.04 in WER, each arm in its own way: at 5% two of 40 are to be expected."""
    found = []
    for random in map(np.random.default_rng, range(40)):
        arms = [[errors(0.2 + 0.04 * z, random, seeds=1)[0] for z in random.normal(size=5)] for _ in range(2)]
        found.append(compare(*arms, [8] * 200, [f"s{i % 8}" for i in range(200)], draws=400))
    assert sum(d.p < 0.05 for d in found) <= 5
    assert sum(d.p_seeds < 0.05 for d in found) <= sum(d.p_bootstrap < 0.05 for d in found) + 2


def test_seeds_are_compared_by_a_paired_t_test() -> None:
    base, other = [[9, 8], [7, 9], [8, 8]], [[5, 6], [6, 7], [4, 8]]
    found = compare(base, other, [10, 10], ["a", "b"], draws=50)
    expected = ttest_rel([11, 13, 12], [17, 16, 16]).pvalue
    assert found.p_seeds == pytest.approx(expected) and found.p == max(found.p_seeds, found.p_bootstrap)


def test_holm_is_that_of_the_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="errors: expected"):
        compare([[1, 2]], [[1, 2]], [5], ["a"])
