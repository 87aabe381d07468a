"""Asterisk's English prompts: one speaker, G.722 at 16 kHz; the texts are lines ``name: text`` of a list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from avsr.errors import UserError
from avsr.tools.corpora.debian.spoken import Spoken

SPEAKER = "allison"

_REMARK = re.compile(r"\[[^]]*\]|<[^>]*>|\([^)]*\)")  # tones, silence, notes
_LINE = re.compile(r"([^:\s;][^:]*):\s*(.*)")


def read_asterisk(listed: str, sounds: Mapping[str, bytes]) -> Iterator[Spoken]:
    """The prompts that are speech.

    Args:
        listed: the list of texts; lines that begin with ``;`` are comments.
        sounds: by the prompts' names, such as ``digits/1``.

    Raises:
        UserError: no text belongs to a sound.
    """
    found = False
    for line in listed.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match and match[1] in sounds:
            found = True
            text = _REMARK.sub(" ", match[2])
            if re.search(r"\w", text):
                yield Spoken(f"asterisk_{match[1].replace('/', '_').lower()}", SPEAKER, text, sounds[match[1]], "g722")
    if not found:
        raise UserError("the list of prompts and the sounds do not belong together")
