"""Written lines as the words that are said."""

from __future__ import annotations

import re
import unicodedata

_REMARK = re.compile(r"\[[^]]*\]|<[^>]*>|\([^)]*\)")  # (sigh), <gulp>, tones
_INITIALS = re.compile(r"\b(?:[a-z]\.){2,}|\b[a-z]\.(?=\d)")  # a.m., h.323
_SIGNS = {"#": " pound ", "*": " star ", "^_": " "}  # as Asterisk's speaker says them; a trademark sign
_KEPT = re.compile(r"[a-z' ]*")
_PAUSE = re.compile(r"""[-.,;:!?"/_\s]+|(?<![a-z])'|'(?![a-z])""")
# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


def spoken_words(text: str) -> str | None:
    """``text`` in lower case: letters, apostrophes inside words and single spaces; "" if nothing is said.

    None where it cannot be told how it is read: numbers from 100 on or with other signs in them, foreign signs.
    """
    text = unicodedata.normalize("NFKD", text).lower().replace("\u2019", "'")
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = _REMARK.sub(" ", text)
    for sign, words in _SIGNS.items():
        text = text.replace(sign, words)
    text = _INITIALS.sub(lambda match: match[0].replace(".", " "), text)
    text = re.sub(r"\S*\d\S*", _number, text)
    text = " ".join(_PAUSE.sub(" ", text).split())
    return text if _KEPT.fullmatch(text) else None


def _number(match: re.Match[str]) -> str:
    """The words for a whole number below 100 that stands alone; anything else stays as it is."""
    digits = match[0].strip(""".,;:!?"'""")
    if not re.fullmatch(r"\d|[1-9]\d", digits):
        return match[0]
    number = int(digits)
    if number < len(_ONES):
        return f" {_ONES[number]} "
    tens, ones = divmod(number, 10)
    return f" {_TENS[tens - 2]} {_ONES[ones] if ones else ''} "
