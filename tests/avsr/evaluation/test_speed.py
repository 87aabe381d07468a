"""RTFx against sums by hand, with a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from avsr.evaluation import speed
from avsr.evaluation.speed import rtfx, timed


def row(seconds: float, took: float, warm: bool = True) -> dict[str, object]:
    return {"seconds": seconds, "took": took, "warm": warm}


def test_it_is_a_rate_of_sums_and_no_mean_of_rates() -> None:
    assert rtfx([row(10.0, 1.0), row(2.0, 1.0)]) == 6.0
    assert rtfx([row(3.0, 2.0), row(3.0, 0.0), row(3.0, 0.0)]) == 4.5  # the time of a batch stands at its first


def test_first_batches_warm_up_unless_there_is_no_other() -> None:
    cold = [row(1.0, 9.0, warm=False), row(1.0, 0.0, warm=False)]
    assert rtfx([*cold, row(4.0, 2.0), *cold, row(2.0, 1.0)]) == 2.0
    assert rtfx(cold) == pytest.approx(2 / 9)
    assert rtfx([]) is None and rtfx([row(1.0, 0.0)]) is None


def test_only_what_was_waited_for_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)

    def batches() -> Iterator[str]:
        nonlocal now
        for waited, items in ((3.0, "ab"), (5.0, "c")):
            now += waited
            yield from items

    found = []
    for item, took in timed(batches()):
        found.append((item, took))
        now += 1000.0  # the reader's own time
    assert found == [("a", 3.0), ("b", 0.0), ("c", 5.0)]
