"""Which clip goes to which manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from avsr.tools.corpora.debian.spoken import Spoken

SPLITS = ("train", "validation", "test_texts", "test_roles", "test_prompts")
UNSEEN = ("queen_sec", "queen_lou", "queen_henry", "queen_naomi", "queen_frank")  # the roles of test_roles
TESTED, VALIDATED = 0.14, 0.05  # shares of the Queen's other texts


@dataclass(frozen=True)
class Clip:
    """A sound with the words that are said, which becomes a line of a manifest."""

    spoken: Spoken
    words: str

    @property
    def corpus(self) -> str:
        return self.spoken.id.partition("_")[0]

    @property
    def speaker(self) -> str:
        return f"{self.corpus}_{self.spoken.role}"


def split(clips: Iterable[Clip]) -> dict[str, str]:
    """The manifest of every clip by its id. All clips of a text are on one side, and so are all of an unseen role; what
    Drascula says of a tested text is in none, since its actors paraphrase."""
    clips = list(clips)
    apart = {clip.words for clip in clips if clip.speaker in UNSEEN or clip.corpus == "asterisk"}
    places = {}
    for clip in clips:
        place = "test_texts" if clip.words in apart else _place(clip.words)
        if clip.corpus == "asterisk":
            place = "test_prompts"
        elif clip.speaker in UNSEEN:
            place = "test_roles"
        if clip.corpus != "drascula" or place == "train":
            places[clip.spoken.id] = place
    return places


def _place(words: str) -> str:
    """By a hash of the text, so that the place does not depend on which other clips there are."""
    drawn = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64
    if drawn < TESTED:
        return "test_texts"
    return "validation" if drawn < TESTED + VALIDATED else "train"
