"""Which words are taken for which others, and which errors are a matter of spelling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import jiwer

from avsr.errors import visible
from avsr.evaluation.wer import normaliser, plain
from avsr.runtime.rows import Row

SHOWN = 20  # lines of every table
Pairs = Counter[tuple[str, str]]


class Stretch(NamedTuple):
    """What differs between two words on which reference and hypothesis agree."""

    errors: list[tuple[str, str]]  # words of both, "" for none: the substitutions, deletions and insertions
    said: str
    found: str


def stretches(rows: Sequence[Row], normalise: Callable[[str], str]) -> Iterator[Stretch]:
    """All errors of hypotheses, those that follow each other together.

    Args:
        rows: with keys reference and hypothesis.
        normalise: applied to both texts.
    """
    pairs = [(normalise(row["reference"]), normalise(row["hypothesis"])) for row in rows]
    for reference, hypothesis in pairs:
        if not reference and hypothesis:  # jiwer refuses these; they count as insertions, as in wer
            yield Stretch([("", word) for word in hypothesis.split()], "", hypothesis)
    spoken = [pair for pair in pairs if pair[0]]
    if not spoken:
        return
    output = jiwer.process_words([reference for reference, _ in spoken], [hypothesis for _, hypothesis in spoken])
    for reference, hypothesis, chunks in zip(output.references, output.hypotheses, output.alignments, strict=True):
        for equal, group in groupby(chunks, lambda chunk: chunk.type == "equal"):
            if equal:
                continue
            errors: list[tuple[str, str]] = []
            for chunk in group:
                said = reference[chunk.ref_start_idx : chunk.ref_end_idx]
                found = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
                errors += zip(said or [""] * len(found), found or [""] * len(said), strict=True)
            yield Stretch(errors, *(" ".join(filter(None, side)) for side in zip(*errors, strict=True)))


def spellings(rows: Sequence[Row]) -> tuple[Pairs, int]:
    """Differences after ``plain`` that Whisper's English normaliser explains, such as "fifty" / "50", "mr" / "mister"
    or a missing "uh", and the number of word errors in them; not "colour" / "color" (see :mod:`avsr.evaluation.wer`).
    """
    whisper = normaliser("whisper")

    def forms(text: str) -> set[str]:  # the normaliser turns "o nine" into "09", but "09" into "9"
        return {text, " ".join(whisper(text).split())}

    alike = [stretch for stretch in stretches(rows, plain) if forms(stretch.said) & forms(stretch.found)]
    return Counter((stretch.said, stretch.found) for stretch in alike), sum(len(s.errors) for s in alike)


def confusions(rows: Sequence[Row], normalise: Callable[[str], str] = plain) -> str:
    """Tables of the most frequent substitutions, deletions and insertions, and of differences in spelling."""
    pairs = Counter(pair for stretch in stretches(rows, normalise) for pair in stretch.errors)
    kinds: dict[str, Pairs] = {"substitutions": Counter(), "deletions": Counter(), "insertions": Counter()}
    for (said, found), count in pairs.items():
        kind = "insertions" if not said else "substitutions" if found else "deletions"
        kinds[kind][said, found] = count
    parts = [_table(f"{count.total()} {kind}", count) for kind, count in kinds.items()]
    alike, errors = spellings(rows)
    parts.append(_table(f"{errors} errors in spelling, numbers and fillers, by Whisper's normaliser", alike))
    return "\n".join(filter(None, parts))


def _table(title: str, counted: Pairs) -> str:
    ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{count:7d}  {visible(' / '.join(filter(None, pair)))}\n" for pair, count in ordered[:SHOWN]]
    more = f"         and {len(ordered) - SHOWN} others\n" if len(ordered) > SHOWN else ""
    return f"{title}\n{''.join(lines)}{more}" if lines else ""
