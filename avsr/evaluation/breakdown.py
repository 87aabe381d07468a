"""Error rates by speaker, by length and by normaliser, from the rows of ``hypotheses.jsonl``."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from avsr.evaluation.wer import NORMALISERS, normaliser, plain, score
from avsr.runtime.rows import Row

WORD_BINS: dict[float, str] = {0: "0", 5: "1-5", 10: "6-10", 20: "11-20"}  # inclusive upper ends; then "21+"
SECOND_BINS = {2.0: "0-2", 4.0: "2-4", 8.0: "4-8", 16.0: "8-16"}  # then "16+"

Part = dict[str, float | int | None]


def by_speaker(rows: Sequence[Row], normalise: Callable[[str], str] = plain) -> dict[str, Part]:
    """WER, words and utterances of every speaker, by name; rows without a speaker count as "unknown".

    Args:
        rows: with keys reference, hypothesis and speaker.
        normalise: applied to both texts.

    Returns:
        ``{speaker: {"wer", "words", "utterances"}}``; wer is None if the references have no word.
    """
    groups = _grouped(rows, lambda row: str(row.get("speaker") or "unknown"))
    return {name: _part(groups[name], normalise) for name in sorted(groups)}


def by_length(rows: Sequence[Row], normalise: Callable[[str], str] = plain) -> dict[str, dict[str, Part]]:
    """WER, words and utterances by number of reference words and by duration; empty bins are left out.

    Args:
        rows: with keys reference, hypothesis and seconds.
        normalise: applied to both texts, also before words are counted.

    Returns:
        ``{"words": {"1-5": part, ..., "21+": part}, "seconds": {"0-2": part, ..., "16+": part}}``, with parts as
        in :func:`by_speaker`. Bins include their upper end.
    """
    return {
        "words": _bins(rows, lambda row: len(normalise(row["reference"]).split()), WORD_BINS, "21+", normalise),
        "seconds": _bins(rows, lambda row: row["seconds"], SECOND_BINS, "16+", normalise),
    }


def by_normaliser(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """``{"wer_plain", "wer_whisper"}`` of rows with keys reference and hypothesis; None where the references have no
    word that the normaliser leaves."""
    return {f"wer_{name}": _part(rows, normaliser(name))["wer"] for name in NORMALISERS}


def _bins(
    rows: Sequence[Row],
    measure: Callable[[Row], float],
    bins: Mapping[float, str],
    above: str,
    normalise: Callable[[str], str],
) -> dict[str, Part]:
    edges, names = list(bins), [*bins.values(), above]
    groups = _grouped(rows, lambda row: names[bisect_left(edges, measure(row))])
    return {name: _part(groups[name], normalise) for name in names if name in groups}


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _part(rows: Sequence[Row], normalise: Callable[[str], str]) -> Part:
    references = [row["reference"] for row in rows]
    if not any(normalise(reference) for reference in references):
        return {"wer": None, "words": 0, "utterances": len(rows)}
    found = score(references, [row["hypothesis"] for row in rows], normalise)
    return {"wer": found.wer, "words": found.words, "utterances": found.utterances}
