"""A clip as its package has it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spoken:
    """A sound and what is said in it.

    Attributes:
        id: of the clip, unique among all packages; letters, digits and ``_``.
        role: who speaks, unique within the package.
        text: as written there.
        sound: the bytes of the file.
        kind: ``mp3``, ``g722`` (16 kHz) or ``u8`` (unsigned 8-bit PCM at 11,025 Hz).
    """

    id: str
    role: str
    text: str
    sound: bytes
    kind: str
