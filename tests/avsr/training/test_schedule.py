"""The learning rate: a cosine, or constant with a line to 0 at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avsr.training.engine import learning_rate_factor
from avsr.training.metrics import read_metrics

Recipe = Callable[..., Path]
Run = Callable[..., Path]
STEPS, SHARES = st.integers(1, 400), st.floats(0.001, 1.0)


@settings(deadline=None)
@given(STEPS, SHARES)
def test_with_decay_it_is_constant_and_then_a_line_to_zero(steps: int, decay: float) -> None:
    factors = [learning_rate_factor(step, steps, 0, decay) for step in range(steps + 1)]
    line = np.interp(np.arange(steps + 1), [0.0, steps * (1 - decay), steps], [1.0, 1.0, 0.0])
    assert factors == pytest.approx(line, abs=1e-9)
    assert factors[-1] == 0.0 and learning_rate_factor(steps + 5, steps, 0, decay) == 0.0


@settings(deadline=None)
@given(STEPS, st.integers(0, 400), st.one_of(st.just(0.0), SHARES))
def test_the_warm_up_does_not_depend_on_what_follows(steps: int, warmup: int, decay: float) -> None:
    factors = [learning_rate_factor(step, steps, warmup, decay) for step in range(steps)]
    for step, factor in enumerate(factors[:warmup]):
        assert factor == (step + 1) / warmup
    rest = factors[warmup:]
    assert all(0.0 <= factor <= 1.0 for factor in factors) and rest == sorted(rest, reverse=True)
    if decay:
        assert rest == [learning_rate_factor(step, steps, 0, decay) for step in range(warmup, steps)]
    else:
        cosine = [0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup)) for step in range(warmup, steps)]
        assert rest == pytest.approx(cosine)


@pytest.mark.integration
def test_a_training_follows_it_and_a_longer_one_the_longer_schedule(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(tmp_path, **{"training.steps": 4, "training.learning_rate": 2e-3, "training.warmup": 1})
    rows = read_metrics(run(recipe, "training.decay=0.5"))
    assert [row["lr"] for row in rows] == pytest.approx([2e-3, 2e-3, 1e-3, 0.0])  # after each step
    with caplog.at_level(logging.WARNING):
        longer = read_metrics(run(recipe, "training.decay=0.5", "training.steps=8", "resume=true"))
    assert "the learning rate after step 4 is 0.002 instead of 0" in caplog.text
    assert [row["lr"] for row in longer[4:]] == pytest.approx([1.5e-3, 1e-3, 0.5e-3, 0.0])
