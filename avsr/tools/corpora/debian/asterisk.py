"""Asterisk's English prompts: one speaker, G.722 at 16 kHz; the texts are lines ``name: text`` of a list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from avsr.errors import UserError
from avsr.tools.corpora.debian.spoken import Spoken

SPEAKER = "allison"

_LINE = re.compile(r"([^:\s;][^:]*):\s*(.*)")


def read_asterisk(listed: str, sounds: Mapping[str, bytes]) -> Iterator[Spoken]:
    """The prompts, of which those that are no speech have their text in brackets.

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
            name = match[1].replace("/", "_").lower()
            yield Spoken(f"asterisk_{name}", SPEAKER, match[2], sounds[match[1]], "g722")
    if not found:
        raise UserError("the list of prompts and the sounds do not belong together")
