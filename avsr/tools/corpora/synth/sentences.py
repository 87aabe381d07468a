"""Sentences to speak: a grammar of six-word commands and an open vocabulary of ordinary English.

Both kinds are drawn without repetition from a seeded generator, and a shorter draw is the beginning of a longer one.
Splits taken from one draw therefore share no sentence.
"""

from __future__ import annotations

import math
import random

from avsr.tools.corpora.synth.words import SLOTS, TEMPLATES

# The grammar of the GRID corpus: command, colour, preposition, letter (no w), digit, adverb; 51 words.
GRID_GRAMMAR: tuple[tuple[str, ...], ...] = (
    ("bin", "lay", "place", "set"),
    ("blue", "green", "red", "white"),
    ("at", "by", "in", "with"),
    tuple("abcdefghijklmnopqrstuvxyz"),
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("again", "now", "please", "soon"),
)
GRID_SIZE = math.prod(len(words) for words in GRID_GRAMMAR)  # 64000

# eSpeak NG would speak the letter "a" as the article.
GRID_SAID_AS = {"a": "eigh"}

_SHORTEST, _LONGEST = 5, 12  # words in an open sentence
_VOWELS = "aeiou"


def grid_sentences(count: int, seed: int) -> list[str]:
    """``count`` different commands such as "bin blue at f two now", at most ``GRID_SIZE``."""
    if not 0 <= count <= GRID_SIZE:
        raise ValueError(f"count must be 0 to {GRID_SIZE}, got {count}")
    draw = random.Random(f"grid {seed}")
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[" ".join(draw.choice(words) for words in GRID_GRAMMAR)] = None
    return list(chosen)


def open_sentences(count: int, seed: int) -> list[str]:
    """``count`` different sentences of 5 to 12 words, lower case without punctuation."""
    draw = random.Random(f"open {seed}")
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        sentence = _fill(draw.choice(TEMPLATES), draw)
        if sentence is not None:
            chosen[sentence] = None
    return list(chosen)


def _fill(template: str, draw: random.Random) -> str | None:
    """Puts drawn phrases into the slots; None if it comes out too long or says a content word twice."""
    phrases = [draw.choice(SLOTS[token]) if token in SLOTS else token for token in template.split()]
    words = " ".join(phrases).split()
    long_words = [word for word in words if len(word) > 4]
    if not _SHORTEST <= len(words) <= _LONGEST or len(set(long_words)) < len(long_words):
        return None
    pairs = zip(words, [*words[1:], " "], strict=True)
    return " ".join("an" if word == "a" and following[0] in _VOWELS else word for word, following in pairs)
