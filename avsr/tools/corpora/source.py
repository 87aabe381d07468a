"""What every corpus reader yields: video files with the clips to cut from them, and what it had to leave out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_LONGEST_NAME, _LONGEST_PATH = 200, 1000  # bytes of one name, of 255; characters of all


@dataclass(frozen=True)
class Piece:
    """One clip of a video file.

    Attributes:
        id: unique in the corpus.
        text: what is said, or None if the corpus has no transcripts.
        start: where it starts in the file, in seconds.
        end: where it ends; None, or beyond the end of the file, for the whole rest.
        last_word: where its last word ends; a shorter file is refused.
        limit: its maximal length in seconds, or None; a longer one is refused.
    """

    id: str
    text: str | None
    start: float = 0.0
    end: float | None = None
    last_word: float = 0.0
    limit: float | None = None


@dataclass(frozen=True)
class Source:
    """One video file of a corpus.

    Attributes:
        id: its path in the corpus without the suffix, with "/"; also where its landmarks are looked for.
        video: the file.
        speaker: who speaks; the name of a folder.
        manifests: names of the manifests that its clips go to.
        pieces: the clips to cut; empty where ``window`` cuts them.
        window: cut into clips ``ID_00``, ``ID_01``, ... of so many seconds.
        audio: sound files to take if the video has no sound, the first that exists.
        cropped: the video already shows only the mouth, 96x96, and is not changed.
    """

    id: str
    video: Path
    speaker: str
    manifests: tuple[str, ...]
    pieces: tuple[Piece, ...] = ()
    window: float | None = None
    audio: tuple[Path, ...] = ()
    cropped: bool = False


@dataclass(frozen=True)
class Refusal:
    """A clip or file that is left out: its id, the file, a short kind to count by, and the reason in words."""

    id: str
    file: str
    kind: str
    reason: str


Found = Iterator[Source | Refusal]


def is_safe_id(name: str) -> bool:
    """Whether an id from a file can be a path below a folder: relative, without ``..`` and control characters, each
    name short enough for a file system with the suffixes added to it."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and len(name) <= _LONGEST_PATH
        and all(len(part.encode("utf-8", "replace")) <= _LONGEST_NAME for part in path.parts)
        and not path.is_absolute()
        and str(path) == name
        and not any(part in ("..", ".") for part in path.parts)
        and "\\" not in name
        and name.isprintable()
    )
