"""What reading a clip measured, against what its line of the manifest declares."""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avsr.data.manifest import Utterance
from avsr.data.members import sha256_of, stamp
from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE
from avsr.errors import UserError, at

SHARE = 0.05  # of the declared duration by which it may be wrong, if that is more than data.max_mismatch
# factors by which durations in another unit are too large
_UNITS = {
    1000: "milliseconds",
    25: "video frames",
    16_000: "samples",
    44_100: "samples",
    48_000: "samples",
    100: "10 ms",
}


class Measured(NamedTuple):
    """The length of a clip: samples at 16 kHz and mouth frames at 25 fps, 0 of what was not read."""

    samples: int
    frames: int

    @property
    def seconds(self) -> float:
        return max(self.samples / SAMPLE_RATE, self.frames / FRAMES_PER_SECOND)


def lasting(seconds: float) -> Measured:
    """What a clip of so many seconds would measure."""
    return Measured(round(seconds * SAMPLE_RATE), round(seconds * FRAMES_PER_SECOND))


def lasting_many(seconds: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """:func:`lasting` of (N,) seconds: (N,) int64 samples and frames."""
    return tuple(np.rint(seconds * rate).astype(np.int64) for rate in (SAMPLE_RATE, FRAMES_PER_SECOND))  # type: ignore[return-value]


def refuse_other_length(utterance: Utterance, seconds: float, max_mismatch: float) -> None:
    """Compares the measured length of a clip with its ``duration``; 0 declares nothing.

    Padding of lossy codecs (up to 0.15 s), and labels that count video frames although the sound lasts longer, are no
    error.

    Raises:
        UserError: they differ by more than ``max_mismatch`` seconds and ``SHARE`` of the declared one.
    """
    declared = utterance.duration
    if not declared or abs(seconds - declared) <= max(max_mismatch, SHARE * declared):
        return
    begin = "" if utterance.offset is None else f" from {utterance.offset:g} s on"
    raise UserError(
        f"{at(utterance.where)}{utterance.audio or utterance.video} lasts {seconds:.2f} s{begin}, but its 'duration' "
        f"is {declared:g} s{_guess(utterance, declared / seconds)}; allowed is a difference of data.max_mismatch = "
        f"{max_mismatch:g} s or {SHARE:.0%}: correct the line, or replace the file"
    )


def _guess(utterance: Utterance, factor: float) -> str:
    for unit, times in _UNITS.items():
        if abs(factor / unit - 1) <= SHARE:
            return f" ({times}?)"
    if factor < 1 and utterance.offset is None:
        return " (a part of a file is named by 'offset')"
    return " (the file ends earlier)" if utterance.offset is not None else ""


def refuse_other_content(utterance: Utterance, needs: Set[str]) -> None:
    """Compares the file of the sound, or of a line without ``audio`` that of the video, with ``sha256``, if it is read
    for one of the signals ``needs``.

    Raises:
        UserError: it is another file than the manifest was made of.
    """
    path = utterance.audio or utterance.video
    if not utterance.sha256 or path is None or utterance.audio is not None and "audio" not in needs:
        return
    digest = _sha256(path, stamp(path))
    if digest != utterance.sha256.lower():
        raise UserError(
            f"{at(utterance.where)}{path} is not the file that the manifest was made of (its sha256 begins with "
            f"{digest[:12]}, that of the line with {utterance.sha256[:12]}): correct the line, or replace the file"
        )


@lru_cache(maxsize=1024)
def _sha256(path: Path, stamp: str) -> str:
    """Once for the many utterances of a long file."""
    return sha256_of(path)
