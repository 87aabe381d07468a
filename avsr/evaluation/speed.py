"""RTFx, seconds of audio per second of decoding, as the Open ASR Leaderboard counts it: the sum of all durations
divided by the sum of all times from sound to text, without the loading of the model.

An encoder whose features are cached does not run, so only the reading of its cache is in the time. The reading of clips
is in it, which the leaderboard has in memory: the number here is a little lower. What warms up is left out, here the
first batch of a process, unless there is no other.

Of many ranks every one measures its own decoding, and the times are summed: RTFx is the speed of one rank, comparable
with that of one process on one such device. N ranks together are N times as fast, less what they wait for the last one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from avsr.runtime.rows import Row

Item = TypeVar("Item")
TIMES = ("took", "warm", "cached")  # keys of rows that differ between two runs of the same


def timed(found: Iterable[Item]) -> Iterator[tuple[Item, float]]:
    """Every item with the seconds that were waited for it. The first of a batch takes those of its batch."""
    started = time.perf_counter()
    for item in found:
        yield item, time.perf_counter() - started
        started = time.perf_counter()


def rtfx(rows: Sequence[Row]) -> float | None:
    """RTFx of decoded utterances, which may be of several processes; None if there are none.

    Args:
        rows: with keys seconds (of audio), took (seconds of decoding), and warm (False in a first batch).
    """
    counted = [row for row in rows if row["warm"]] or rows
    took = sum(row["took"] for row in counted)
    return sum(row["seconds"] for row in counted) / took if took > 0 else None
