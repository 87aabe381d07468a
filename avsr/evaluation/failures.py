"""Hypotheses that failed in a way that a word error rate hides: loops, nothing at all, and texts that were cut."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from avsr.errors import visible
from avsr.evaluation.decode import POSITIONS
from avsr.evaluation.wer import plain
from avsr.runtime.rows import Row

PHRASE = 8  # most words of the phrase of a loop
TIMES = 4  # fewest times that it stands there in a row
_LOOP = re.compile(rf"(?<!\S)((?:\S+ ){{1,{PHRASE}}}?)\1{{{TIMES - 1},}}")  # in words with a space after each


def loops(text: str, reference: str = "") -> bool:
    """Whether a phrase of at most ``PHRASE`` words stands in ``text`` at least ``TIMES`` times in a row, and at least
    twice as many times in a row as in ``reference``, where "no no no" may have been said. Without regard to case and
    punctuation."""
    said = f"{plain(reference)} "
    for found in _LOOP.finditer(f"{plain(text)} "):
        phrase = found[1]
        spoken = max((len(run[0]) for run in re.finditer(rf"(?<!\S)(?:{re.escape(phrase)})+", said)), default=0)
        if len(found[0]) >= 2 * spoken:
            return True
    return False


def failures(rows: Sequence[Row]) -> dict[str, int]:
    """Numbers of hypotheses: ``loops``; ``empty`` where something was said; ``cut`` by their budget or the positions of
    the language model, and those cut by the latter.

    Args:
        rows: with keys reference, hypothesis, loop and cut.
    """
    return {
        "loops": sum(row["loop"] for row in rows),
        "empty": sum(not plain(row["hypothesis"]) and bool(plain(row["reference"])) for row in rows),
        "cut": sum(bool(row["cut"]) for row in rows),
        "cut_by_positions": sum(row["cut"] == POSITIONS for row in rows),
    }


def warning(counted: Mapping[str, Mapping[str, int]]) -> str:
    """One line on what :func:`failures` counted in every test set, with the keys that help; "" if there is nothing."""
    parts = []
    for name, counts in counted.items():
        if found := [f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items() if count]:
            parts.append(f"{visible(name)}: {', '.join(found)}")
    if any(counts["loops"] for counts in counted.values()):
        parts.append("against loops: decode.no_repeat_ngram, decode.repetition_penalty")
    if any(counts["cut"] > counts["cut_by_positions"] for counts in counted.values()):
        parts.append("for longer texts: decode.base_tokens, decode.tokens_per_second")
    return f"failed hypotheses, {'; '.join(parts)}" if parts else ""
