"""Transcript files of LRS2 and LRS3, and cutting a long utterance where words end.

The format, from the corpora's files::

    Text:  SO THIS IS IT
    Conf:  5

    WORD START END ASDSCORE
    SO 0.11 0.30 2.1

There may be ``Ref:`` lines in between; only the pretrain sets have the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avsr.errors import UserError

_TAG = re.compile(r"\{[^{}]*\}")  # {LG}, {NS}: noises, not words
_TABLE = "WORD START END"


@dataclass(frozen=True)
class Word:
    """A word with its times in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """What is said, in lower case without tags, and the words' times, if the file has them."""

    text: str
    words: tuple[Word, ...] = ()


def clean_text(text: str) -> str:
    """Lower case, without ``{...}``, one space between words."""
    return " ".join(_TAG.sub(" ", text).replace("{", " ").replace("}", " ").lower().split())


def read_transcript(path: Path) -> Transcript:
    """Reads a transcript in the format of LRS, or a file that holds nothing but the text.

    Raises:
        UserError: missing, not UTF-8, without a word, or with a table of word times that makes no sense.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the transcript {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the transcript {path} is not UTF-8 text: {error}") from error
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("Text:"):
        return Transcript(_some_text(clean_text(" ".join(lines)), path))
    text = _some_text(clean_text(first.partition(":")[2]), path)
    table = next((number for number, line in enumerate(lines) if line.strip().startswith(_TABLE)), None)
    if table is None:
        return Transcript(text)
    words: list[Word] = []
    for number, line in enumerate(lines[table + 1 :], table + 2):
        if not line.strip():
            continue
        word = _word(line, f"{path}:{number}")
        if words and word.start < words[-1].start:
            raise UserError(f"{path}:{number}: the word {word.text!r} starts before the one before it")
        words.append(word)
    return Transcript(text, tuple(word for word in words if word.text))


def _some_text(text: str, path: Path) -> str:
    if not text:
        raise UserError(f"the transcript {path} holds no word")
    return text


def _word(line: str, where: str) -> Word:
    fields = line.split()
    try:
        start, end = float(fields[1]), float(fields[2])
    except (IndexError, ValueError):
        raise UserError(f"{where}: expected WORD START END SCORE, got {line.strip()!r}") from None
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start <= end):
        raise UserError(f"{where}: the times must be seconds with 0 <= start <= end, got {fields[1]} and {fields[2]}")
    return Word(clean_text(fields[0]), start, end)


def cut_words(words: Sequence[Word], limit: float) -> list[tuple[Word, ...]]:
    """Splits words into runs that last at most ``limit`` seconds from the first word's start to the last one's end.

    Each run takes as many words as fit; the last two share theirs evenly, which leaves no short remainder. A single
    longer word is a run of its own.
    """
    runs: list[list[Word]] = []
    for word in words:
        if runs and word.end - runs[-1][0].start <= limit:
            runs[-1].append(word)
        else:
            runs.append([word])
    if len(runs) >= 2:
        last = runs[-2] + runs[-1]
        # the split by which the longer of the two is shortest is at most as long as the one that we have
        at = min(range(1, len(last)), key=lambda cut: max(_seconds(last[:cut]), _seconds(last[cut:])))
        runs[-2:] = [last[:at], last[at:]]
    return [tuple(run) for run in runs]


def _seconds(run: Sequence[Word]) -> float:
    return max(word.end for word in run) - run[0].start
