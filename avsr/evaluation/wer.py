"""Word and character error rates by jiwer, after a documented normaliser.

``plain`` (default): lower case, straight apostrophes, every character except letters (with their combining marks),
digits and apostrophes inside words replaced by a space, white space collapsed. ``whisper``: Whisper's English
normaliser, opt-in since it rewrites what was said ("o nine" becomes "09"). It leaves "colour" and "color" different, as
transformers does not ship Whisper's list of British and American spellings.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jiwer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from avsr.errors import visible

NORMALISERS = ("plain", "whisper")
_NOT_WORD = re.compile(r"[^\w']|_|(?<!\w)'|'(?!\w)")


@dataclass(frozen=True)
class Score:
    """Error counts over a set. Rates are fractions (0.12 = 12%) and may exceed 1. ``rtfx`` is that of
    :mod:`avsr.evaluation.speed` if it was measured, without the encoders of the streams that were read from a cache."""

    wer: float
    cer: float
    words: int
    utterances: int
    substitutions: int
    deletions: int
    insertions: int
    rtfx: float | None = field(default=None, compare=False)
    rtfx_without_encoders: list[str] = field(default_factory=list, compare=False)


def plain(text: str) -> str:
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    return " ".join(_NOT_WORD.sub(_keep_marks, text).split())


def _keep_marks(match: re.Match[str]) -> str:
    return match[0] if unicodedata.category(match[0])[0] == "M" else " "


def normaliser(name: str) -> Callable[[str], str]:
    """The normaliser called ``plain`` or ``whisper``."""
    return plain if name == "plain" else EnglishTextNormalizer({})


def score(references: Sequence[str], hypotheses: Sequence[str], normalise: Callable[[str], str] = plain) -> Score:
    """Errors of ``hypotheses`` summed over the set, divided by the words (characters) of ``references``.

    Raises:
        ValueError: no reference has a word.
    """
    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    # jiwer refuses empty references; hypothesis words against them count as insertions
    spoken = [(r, h) for r, h in pairs if r]
    if not spoken:
        raise ValueError("references: expected at least one word")
    extra_words = sum(len(h.split()) for r, h in pairs if not r)
    extra_characters = sum(len(h) for r, h in pairs if not r)
    words = jiwer.process_words([r for r, _ in spoken], [h for _, h in spoken])
    characters = jiwer.process_characters([r for r, _ in spoken], [h for _, h in spoken])
    count = words.hits + words.substitutions + words.deletions
    errors = words.substitutions + words.deletions + words.insertions + extra_words
    letters = characters.hits + characters.substitutions + characters.deletions
    letter_errors = characters.substitutions + characters.deletions + characters.insertions + extra_characters
    return Score(
        wer=errors / count,
        cer=letter_errors / letters,
        words=count,
        utterances=len(pairs),
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions + extra_words,
    )


def alignment(reference: str, hypothesis: str, normalise: Callable[[str], str] = plain) -> str:
    """Three lines: reference, hypothesis, and S, D or I under every error."""
    pair = visible(normalise(reference)), visible(normalise(hypothesis))
    if not pair[0]:
        return f"REF: \nHYP: {pair[1]}\n"
    shown = jiwer.visualize_alignment(jiwer.process_words(*pair), show_measures=False, skip_correct=False)
    return "\n".join(line for line in shown.splitlines() if line.startswith(("REF", "HYP", " ")))
