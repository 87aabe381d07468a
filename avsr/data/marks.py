"""Numbers that tell which rows of manifests hold the same clip or text, without their strings in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, Any]
CLIPS = ("sum_mark", "audio_mark", "video_mark")  # two rows that share one of them hold the same clip


def marks_of(line: Any) -> tuple[int, int, int, int, int]:
    """The marks of an :class:`avsr.data.manifest.Line`: of its id, its text in lower case without regard to white
    space, its ``sha256``, and its files, of the parts of them that ``offset`` names; 0 = none. 64 bits of BLAKE2b."""
    part = "" if line.offset is None else f" {line.offset} {line.duration}"
    return (
        _mark(line.id),
        _mark(" ".join(line.text.lower().split())),
        _mark(f"sha256 {line.sha256.lower()}{part}") if line.sha256 else 0,
        _mark(f"{line.audio}{part}") if line.audio else 0,
        _mark(f"{line.video}{part}") if line.video else 0,
    )


def repeated(columns: Mapping[str, Numbers]) -> Numbers:
    """(N,) int64 number of the first row that has a mark in common with the row, possibly itself."""
    marks = np.concatenate(list(columns.values()))
    rows = np.tile(np.arange(len(marks) // len(columns)), len(columns))
    known = marks != 0
    order = np.lexsort((rows[known], marks[known]))
    sorted_marks, sorted_rows = marks[known][order], rows[known][order]
    begins = np.flatnonzero(np.diff(sorted_marks, prepend=~sorted_marks[:1]) != 0)
    firsts = np.repeat(sorted_rows[begins], np.diff(begins, append=len(sorted_marks)))
    first = np.arange(len(marks) // len(columns))
    np.minimum.at(first, sorted_rows, firsts)
    return first


def _mark(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1
