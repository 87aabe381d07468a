"""Clips with the times of their words and phonemes, decoded once into memory, as targets for every video frame."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avsr.data.manifest import Utterance, read_manifest
from avsr.data.members import read_text
from avsr.data.rates import FRAMES_PER_SECOND
from avsr.data.video import read_video
from avsr.errors import UserError
from avsr.models.visual import shrink
from avsr.runtime.machine import cpus
from avsr.runtime.progress import ProgressBar
from avsr.tools.corpora.synth.espeak import Span
from avsr.tools.corpora.synth.visemes import REST, VISEMES, viseme_labels

UNKNOWN = -100  # a unit outside the vocabulary: no target
TARGETS = ("words", "phonemes", "visemes")

_MOST_UNITS = 1000  # a larger vocabulary has too few clips per word to learn from
_SLACK = 2  # frames by which the video may differ from the manifest's duration


@dataclass(frozen=True)
class TimedClip:
    """One clip and its spans.

    Attributes:
        mouth: (T, h, w) uint8, already averaged to the model's pixels, with a border.
        visemes: (T,) int64, classes of :data:`avsr.tools.corpora.synth.visemes.VISEMES`.
        spans: the units in order, with their times in seconds.
        text: what was said.
    """

    mouth: Tensor
    visemes: Tensor
    spans: tuple[Span, ...]
    text: str

    def labels(self, classes: dict[str, int]) -> Tensor:
        """(T,) int64: the class of the unit in the middle of each frame, 0 between units."""
        labels = torch.zeros(len(self.mouth), dtype=torch.int64)
        for span in self.spans:
            first, last = (round(time * FRAMES_PER_SECOND) for time in (span.start, span.end))
            labels[first:last] = classes.get(span.text, UNKNOWN)
        return labels


def load_timed(manifest: str, *, targets: str, pool: int, limit: int = 0, key: str = "") -> list[TimedClip]:
    """Reads every clip of a manifest with videos and times (as ``avsr synth ... video=1`` writes).

    Args:
        manifest: the path.
        targets: what the units are, one of :data:`TARGETS`.
        pool: pixels averaged in each direction.
        limit: only the first clips; 0 means all.
        key: of the config, for messages.

    Raises:
        UserError: a row without video or times, unreadable ones, or streams that do not fit together.
    """
    rows = read_manifest(manifest)
    rows = rows[: limit or None]
    with ProgressBar(f"read {key or manifest}", len(rows)) as bar, ThreadPoolExecutor(cpus()) as threads:
        clips = []
        for clip in threads.map(lambda row: _load(row, targets, pool), rows):
            clips.append(clip)
            bar.advance()
    return clips


def vocabulary(clips: Sequence[TimedClip]) -> list[str]:
    """The units of the clips in order.

    Raises:
        UserError: too many to learn.
    """
    units = sorted({span.text for clip in clips for span in clip.spans})
    if len(units) > _MOST_UNITS:
        raise UserError(
            f"targets: {len(units)} different words in the training manifest, at most {_MOST_UNITS} can be told apart "
            "by this model; take targets=phonemes"
        )
    return units


def _load(row: Utterance, targets: str, pool: int) -> TimedClip:
    if row.video is None:
        raise UserError(f"{row.where}: {row.id} has no video; a synthetic corpus gets one by: avsr synth OUT video=1")
    if row.times is None:
        raise UserError(f"{row.where}: {row.id} has no times of words and phonemes (the field 'times')")
    frames = read_video(row.video, where=row.where, cut=row.cut)
    expected = row.duration * FRAMES_PER_SECOND
    if abs(len(frames) - expected) > _SLACK:
        raise UserError(
            f"{row.where}: {row.video} has {len(frames)} frames, and the duration of {row.duration:g} s makes "
            f"{expected:.0f}"
        )
    spans = _read_times(row.times, row)
    try:
        visemes = torch.as_tensor(viseme_labels(spans["phonemes"], len(frames)), dtype=torch.int64)
        small = shrink(frames, pool)
    except (UserError, ValueError, KeyError) as error:
        raise UserError(f"{row.where}: {row.id}: {error}") from error
    units = _units(spans, visemes, targets, row)
    if not units:
        raise UserError(f"{row.where}: {row.times} holds no {targets}, only silence")
    return TimedClip(small.round().to(torch.uint8), visemes, units, row.text)


def _units(spans: dict[str, list[Span]], visemes: Tensor, targets: str, row: Utterance) -> tuple[Span, ...]:
    if targets == "words":
        said = " ".join(span.text for span in spans["words"])
        if said.split() != row.text.split():
            raise UserError(f"{row.where}: the times are of {said!r}, the text is {row.text!r}")
        return tuple(spans["words"])
    if targets == "phonemes":
        sounds = (Span(span.text.lstrip("',"), span.start, span.end) for span in spans["phonemes"])
        return tuple(sound for sound in sounds if sound.text and not sound.text.startswith("_"))
    values, runs = torch.unique_consecutive(visemes, return_counts=True)
    ends = runs.cumsum(0)
    return tuple(
        Span(VISEMES[value], (end - run) / FRAMES_PER_SECOND, end / FRAMES_PER_SECOND)
        for value, run, end in zip(values.tolist(), runs.tolist(), ends.tolist(), strict=True)
        if value != REST
    )


def _read_times(path: Path, row: Utterance) -> dict[str, list[Span]]:
    try:
        content: Any = json.loads(read_text(path))
        found = {
            kind: [Span(str(text), float(start), float(end)) for text, start, end in content[kind]]
            for kind in ("words", "phonemes")
        }
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{row.where}: {path}: expected the times of words and phonemes: {error}") from error
    for kind, spans in found.items():
        times = [time for span in spans for time in (span.start, span.end)]
        finite = all(map(math.isfinite, times))
        if not spans or not finite or times != sorted(times) or times[0] < 0 or times[-1] > row.duration + 0.1:
            raise UserError(
                f"{row.where}: {path}: expected {kind} in order between 0 and {row.duration:g} s, got "
                f"{times[0]:g} to {times[-1]:g}"
                if spans
                else f"{row.where}: {path}: there are no {kind}"
            )
    return found
