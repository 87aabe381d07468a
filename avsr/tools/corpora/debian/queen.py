"""Flight of the Amazon Queen: acted dialogue, MP3 at 11,025 Hz, with its texts in the same container ``queen.1c``.

The container has a table of n entries (n is a big-endian u16 just before the first, :data:`FIRST`) of 21 bytes: name
(12 bytes, NUL padded), bundle (u8), offset and size (u32 BE). Dialogue is in ``.DOG`` files, the hero's lines and those
of the person he talks to apart; object descriptions, which the hero speaks, are lines of ``QUEEN2.JAS``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import chain

from avsr.errors import UserError
from avsr.tools.corpora.debian.spoken import Spoken

CONTAINER = "queen.1c"
FIRST = b"020001P2.SB\0"
HERO = "joe"

_ENTRY = struct.Struct(">12sBII")
_DIALOGUE = struct.Struct(">5h")  # levels, unique key, talk key, number of the hero's and of the person's strings
_STRING = struct.Struct(">xxHB")  # id and length of a text
_HEADER, _LEVEL, _FIXED, _PERSON = 20, 96, 32, 22  # bytes; where the offset of the person's strings is
_GESTURE = re.compile(r"\*..")  # between two segments of a text, each with a sound of its own
_DESCRIPTIONS, _FIRST_DESCRIPTION = "QUEEN2.JAS", 41  # number of the sound of the first line
_MOST_TEXT = 2**20  # bytes of QUEEN2.JAS: it has 36 KB


def read_queen(data: bytes) -> Iterator[Spoken]:
    """The clips of a ``queen.1c`` with their texts, in the order of its table of texts.

    Raises:
        UserError: the container is damaged or another one.
    """
    try:
        files = _files(data)
        sounds = {name: content for name, content in files.items() if name.endswith(".SB")}
        seen: set[str] = set()
        for sound, role, text in chain(_dialogues(files), _descriptions(files)):
            if sound in sounds and sound not in seen:  # some lines were cut, a few are in two files
                seen.add(sound)
                yield Spoken(f"queen_{sound.removesuffix('.SB').lower()}", role, text, sounds[sound], "mp3")
    except (struct.error, ValueError, KeyError) as error:
        raise UserError(f"{CONTAINER} is damaged: {error}") from error


def _files(data: bytes) -> dict[str, bytes]:
    first = data.find(FIRST)
    if first < 2:
        raise UserError(f"{CONTAINER} has no table of sounds: another version than the one with speech?")
    (count,) = struct.unpack_from(">H", data, first - 2)
    files, left = {}, len(data)
    for index in range(count):
        name, _, offset, size = _ENTRY.unpack_from(data, first + index * _ENTRY.size)
        if offset + size > len(data):
            raise UserError(f"{CONTAINER} is truncated: {name!r} ends at byte {offset + size} of {len(data)}")
        left -= size
        if left < 0:  # else it could claim thousands of times what it has
            raise ValueError("its entries overlap")
        files[name.rstrip(b"\0").decode("ascii")] = data[offset : offset + size]
    return files


def _dialogues(files: dict[str, bytes]) -> Iterator[tuple[str, str, str]]:
    """Name of the sound, role and text of every segment."""
    for name, content in files.items():
        if not name.endswith(".DOG"):
            continue
        data = content[_HEADER:]
        levels, _, talk, heros, persons = _DIALOGUE.unpack_from(data)
        (start,) = struct.unpack_from(">H", data, _PERSON)
        role = name.removesuffix(".DOG").rstrip("0123456789").lower()
        for who, speaker, at, count in (("J", HERO, _FIXED + abs(levels) * _LEVEL, heros), ("P", role, start, persons)):
            for number, text in _strings(data, at, count):
                for index, segment in enumerate(_GESTURE.split(text), 1):
                    yield f"{talk:02d}{number:04X}{who}{index:X}.SB", speaker, segment


def _strings(data: bytes, at: int, count: int) -> Iterator[tuple[int, str]]:
    for _ in range(count):
        number, length = _STRING.unpack_from(data, at)
        at += _STRING.size
        yield number, data[at : at + length].decode("cp850")
        at += length
        if length:
            at += -at % 4


def _descriptions(files: dict[str, bytes]) -> Iterator[tuple[str, str, str]]:
    content = files[_DESCRIPTIONS]
    if len(content) > _MOST_TEXT:
        raise ValueError(f"{_DESCRIPTIONS} has more than {_MOST_TEXT} bytes")
    for number, line in enumerate(content.decode("cp850").split("\r\n"), _FIRST_DESCRIPTION):
        for index, segment in enumerate(_GESTURE.split(line), 1):
            yield f"JOE{number:04d}{index:X}.SB", HERO, segment
