"""Drascula: The Vampire Strikes Back, acted dialogue, unsigned 8-bit PCM at 11,025 Hz in ``<ROLE><n>.ALS``.

The texts are in ``drascula.dat``, big-endian: tables in a row, each a count (u16) and for every language a block with
its length (u16) before it, English first. In a block, from byte 4 on, each string has in the two bytes before it the
distance to the next one; its text ends with NUL. Sound n of a role is line n of its table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from avsr.errors import UserError
from avsr.tools.corpora.debian.spoken import Spoken

TEXTS = "drascula.dat"
# the roles in the order of their tables: the prefixes of their sounds; the first is the hero
ROLES = ("", "D", "B", "BJ", "E", "I", "L", "P", "T", "VB")
FIRST_LINE = b"THAT'S THE SECOND BIGGEST"  # of the first role's table
LANGUAGES = 6

_BEFORE, _START = 12, 4  # bytes from the table's begin to its first line, and from a block's begin to its first string


def read_drascula(files: Mapping[str, bytes]) -> Iterator[Spoken]:
    """The clips that have a text.

    Args:
        files: by name, ``drascula.dat`` and ``*.ALS``.

    Raises:
        UserError: the texts are missing, damaged or of another version.
    """
    if TEXTS not in files:
        raise UserError(f"there is no {TEXTS} in the package")
    data = files[TEXTS]
    at = data.find(FIRST_LINE) - _BEFORE
    if at < 0:
        raise UserError(f"{TEXTS} does not hold the English dialogue: another version of the game?")
    try:
        for prefix in ROLES:
            role = prefix.lower() or "hero"
            lines, at = _table(data, at)
            for number, text in enumerate(lines):
                sound = files.get(f"{prefix}{number}.ALS")
                if sound is not None:
                    yield Spoken(f"drascula_{role}_{number:03d}", role, text, sound, "u8")
    except (struct.error, ValueError) as error:
        raise UserError(f"{TEXTS} is damaged: {error}") from error


def _table(data: bytes, at: int) -> tuple[list[str], int]:
    """The English lines of the table at byte ``at``, and where the next one begins."""
    (count,) = struct.unpack_from(">H", data, at)
    at += 2
    lines: list[str] = []
    for language in range(LANGUAGES):
        (length,) = struct.unpack_from(">H", data, at)
        if language == 0:
            lines = _lines(data[at + 2 : at + 2 + length], count)
        at += 2 + length
    return lines, at


def _lines(block: bytes, count: int) -> list[str]:
    lines, at = [], _START
    for _ in range(count):
        end = block.index(b"\0", at)
        lines.append(block[at:end].decode("cp850"))
        (distance,) = struct.unpack_from(">H", block, at - 2)
        if at + distance <= end:  # else a block could claim thousands of times what it has
            raise ValueError("its texts overlap")
        at += distance
    return lines
