"""A part of a file, as manifests with ``offset`` name it. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple


class Cut(NamedTuple):
    """What a file holds from ``offset`` on for ``seconds``, both in seconds."""

    offset: float
    seconds: float

    def steps(self, rate: int) -> tuple[int, int]:
        """The first step, and the number of steps (at least one), of a signal with ``rate`` of them a second."""
        return round(self.offset * rate), max(1, round(self.seconds * rate))
