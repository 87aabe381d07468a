"""A plain folder of a user's own videos; ``NAME.txt`` next to ``NAME.mp4`` is its transcript."""

from __future__ import annotations

from pathlib import Path

from avsr.errors import UserError
from avsr.tools.corpora.lrs import pieces_of
from avsr.tools.corpora.source import Found, Piece, Refusal, Source, is_safe_id
from avsr.tools.corpora.transcripts import read_transcript

SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")


def read_videos(root: Path, seg: float, exclude: Path | None = None) -> Found:
    """Every video below ``root``, in the manifest ``all``; its speaker is the folder that it is in.

    A transcript is plain text, or in the format of LRS. With word times, long videos are cut at words; without them, a
    video may last ``seg`` seconds. Videos without a transcript are cut into windows of ``seg``.

    Args:
        root: the folder.
        seg: the longest clip in seconds.
        exclude: a folder below it to skip.

    Raises:
        UserError: there is no video.
    """
    seen = 0
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        if exclude is not None and path.is_relative_to(exclude):
            continue
        seen += 1
        name = path.relative_to(root).with_suffix("").as_posix()
        if not is_safe_id(name):
            yield Refusal(name, str(path), "list", f"the name {name!r} cannot be an id")
            continue
        speaker = path.parent.name if path.parent != root else ""
        script = path.with_suffix(".txt")
        if not script.exists():
            yield Source(name, path, speaker, ("all",), window=seg, audio=(path.with_suffix(".wav"),))
            continue
        try:
            transcript = read_transcript(script)
        except UserError as error:
            yield Refusal(name, str(script), "text", str(error))
            continue
        pieces: tuple[Piece, ...] = (Piece(name, transcript.text, limit=seg),)
        if transcript.words:
            pieces, refused = pieces_of(name, script, transcript, seg)
            yield from refused
        if pieces:
            yield Source(name, path, speaker, ("all",), pieces, audio=(path.with_suffix(".wav"),))
    if not seen:
        raise UserError(f"{root} holds no video file ({', '.join(SUFFIXES)})")
