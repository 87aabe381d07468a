"""Manifests: one JSON object per line, or the label CSV of Llama-AVSR or auto_avsr.

A manifest line has the fields ``id``, ``audio`` or ``video`` or both (paths relative to the manifest's folder),
``text`` and ``duration`` (seconds), and may have ``offset`` (seconds), ``speaker``, ``times`` and ``sha256``. Other
fields are ignored.

With ``offset`` a line means the part of its files from there on, for ``duration``; without, all of them, which then
last ``duration``. ``sha256`` is of the file in ``audio``, or in ``video`` of a line without. Both are compared with the
files when these are read (``avsr.data.measured``).

No path leads out of the manifest's folder by its letters, unless ``data.allow_absolute`` permits absolute ones.
Symbolic links below that folder are followed wherever they lead, since corpora are linked together; so a folder with
links of a stranger is read like a program of a stranger.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from avsr.data.cut import Cut
from avsr.errors import UserError
from avsr.runtime.folders import write_durably
from avsr.runtime.rows import as_lines

logger = logging.getLogger("avsr")

LABEL_FRAMES_PER_SECOND = 25  # Llama-AVSR label files count video frames, also for audio
_SHA256 = re.compile("[0-9a-fA-F]{64}")
_HALF = re.compile(r"\\u[dD]")
_FIELDS = {"id", "audio", "video", "text", "duration", "offset", "speaker", "times", "sha256"}
_MOST_DIGITS = 9  # of a frame count: int() refuses 5,000 digits


@dataclass(frozen=True)
class Utterance:
    """One row of a manifest. Paths are absolute; ``duration`` is in seconds."""

    id: str
    audio: Path | None
    text: str
    duration: float
    speaker: str = ""
    video: Path | None = None
    sha256: str = ""
    times: Path | None = None  # words and phonemes of a synthetic clip
    where: str = ""  # "file:line", for messages
    offset: float | None = None  # seconds into the files; None = all of them

    @property
    def cut(self) -> Cut | None:
        return None if self.offset is None else Cut(self.offset, self.duration)


def read_manifest(
    path: str | Path, *, on_bad: Callable[[str], None] | None = None, absolute: bool = False, texts: bool = True
) -> list[Utterance]:
    """Reads a ``.jsonl`` manifest or a ``.csv`` label file of Llama-AVSR or auto_avsr.

    Args:
        path: the manifest. CSV paths are taken relative to the parent of the folder that holds the file
            (``ROOT/labels/x.csv``).
        on_bad: called with the message of every bad line, which is then skipped. Without it, the first bad line
            raises.
        absolute: files may be named by absolute paths, wherever they are.
        texts: every line needs its text; else it is not read and ``text`` is "".

    Raises:
        UserError: missing, unreadable or empty manifest; a bad line (unless ``on_bad``).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # a name with a NUL, or not UTF-8
        raise UserError(f"cannot read the manifest {path}: {error}") from error
    parse, root = (
        (_parse_csv, path.resolve().parent.parent) if path.suffix == ".csv" else (_parse_json, path.resolve().parent)
    )
    within = _Root(root, absolute, {}, texts)
    rows: list[Utterance] = []
    seen: dict[str, str] = {}
    refused = ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse(line, within, where)
            if row.id in seen:
                raise UserError(f"{where}: the id {row.id!r} was already used at {seen[row.id]}")
        except UserError as error:
            if on_bad is None:
                raise
            on_bad(str(error))
            refused = refused or f"; the first: {error}"
            continue
        seen[row.id] = where
        rows.append(row)
    if not rows:
        raise UserError(f"the manifest {path} has no usable line{refused}")
    for field, where in within.unread.items():
        if meant := get_close_matches(field, _FIELDS, 1, 0.75):
            logger.warning("%s: the field %r is not read; did you mean %r?", where, field, meant[0])
    return rows


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, replacing ``path`` atomically."""
    write_durably(Path(path), as_lines(rows))


@dataclass(frozen=True)
class _Root:
    """The folder below which paths lead, or if ``absolute`` those that do not name their place themselves; where every
    field that is not read was first seen; and whether lines need ``texts``."""

    folder: Path
    absolute: bool
    unread: dict[str, str]
    texts: bool


def _parse_json(line: str, root: _Root, where: str) -> Utterance:
    try:
        row = json.loads(line)
        if _HALF.search(line):  # perhaps half of a surrogate pair, which is not text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object: {str(error).splitlines()[0]}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for other in row.keys() - _FIELDS:
        root.unread.setdefault(other, where)
    needed = ("id", "text") if root.texts else ("id",)
    for field in (*needed, "duration", *(() if row.get("video") else ("audio",))):
        if field not in row:
            raise UserError(f"{where}: the field {field!r} is missing (it has {', '.join(row) or 'none'})")
    for field in needed:
        if not isinstance(row[field], str) or not row[field].strip():
            raise UserError(f"{where}: {field!r} must be a text that is not empty, got {row[field]!r}")
    duration, offset, digest = row["duration"], row.get("offset"), row.get("sha256") or ""
    if not _is_number(duration) or not 0 < duration < 1e6:
        raise UserError(f"{where}: 'duration' must be seconds above 0, got {duration!r}")
    if offset is not None and (not _is_number(offset) or not 0 <= offset < 1e6):
        raise UserError(f"{where}: 'offset' must be seconds from 0 on or null, got {offset!r}")
    if digest and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise UserError(f"{where}: 'sha256' must be 64 hexadecimal digits, got {digest!r}")
    paths = {}
    for field in ("audio", "video", "times"):
        path = row.get(field)
        if path is not None and not isinstance(path, str):
            raise UserError(f"{where}: {field!r} must be a path or null, got {path!r}")
        if path is not None and not path.strip():
            raise UserError(f"{where}: {field!r} must be a text that is not empty, got {path!r}")
        paths[field] = _inside(root, path, where) if path is not None else None
    if paths["audio"] is None and paths["video"] is None:
        raise UserError(f"{where}: the line has neither 'audio' nor 'video'")
    return Utterance(
        id=row["id"],
        audio=paths["audio"],
        text=row["text"] if root.texts else "",
        duration=float(duration),
        speaker=str(row.get("speaker") or ""),
        video=paths["video"],
        sha256=digest,
        times=paths["times"],
        where=where,
        offset=None if offset is None else float(offset),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Label:
    """One line of a label CSV; ``text`` is None where the line has none."""

    dataset: str
    path: str
    frames: int
    text: str | None


def parse_label(line: str, where: str) -> Label:
    """``dataset,rel_path,num_frames,token ids[,text]``, as Llama-AVSR and auto_avsr write it, without a header.

    The first four fields hold no comma, so that the text may; it may also be in quotes.

    Args:
        line: the line.
        where: "file:line" for messages.

    Raises:
        UserError: fields are missing or of the wrong kind.
    """
    fields = [field.strip() for field in line.split(",", 4)]
    if len(fields) < 4:
        raise UserError(f"{where}: expected 5 fields (dataset, path, frames, token ids, text), got {len(fields)}")
    dataset, path, frames, tokens = fields[:4]
    if not frames.isdecimal() or len(frames) > _MOST_DIGITS or int(frames) == 0:
        raise UserError(f"{where}: the number of frames must be a whole number above 0, got {frames!r}")
    if not all(token.isdecimal() for token in tokens.split()):
        raise UserError(f"{where}: the fourth field must be token ids (whole numbers with spaces), got {tokens!r}")
    return Label(dataset, path, int(frames), _unquoted(fields[4]) if len(fields) == 5 else None)


def _parse_csv(line: str, root: _Root, where: str) -> Utterance:
    """A line without a text (auto_avsr's) takes it from the parallel text tree: ``lrs3_text_seg16s/x.txt`` for
    ``lrs3_video_seg16s/x.mp4``."""
    label = parse_label(line, where)
    video = _inside(root, f"{label.dataset}/{label.path}", where)
    text = ""
    if root.texts:
        text = label.text if label.text is not None else _parallel_text(root, label.dataset, label.path, where)
        if not text:
            raise UserError(f"{where}: the transcript is empty")
    return Utterance(
        id=f"{label.dataset}/{label.path}",
        audio=video.with_suffix(".wav"),
        text=text,
        duration=label.frames / LABEL_FRAMES_PER_SECOND,
        speaker=Path(label.path).parent.name,
        video=video,
        where=where,
    )


def _unquoted(text: str) -> str:
    """Without the quotes that CSV writers put around a text with commas."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"').strip()
    return text


def _parallel_text(root: _Root, dataset: str, relative: str, where: str) -> str:
    first, slash, rest = relative.partition("/")
    if "_video_" not in first or not slash:
        raise UserError(
            f"{where}: the line has no text, and {relative!r} is not in a folder like {dataset}_video_seg16s, next"
            f" to which {dataset}_text_seg16s would have it"
        )
    path = _inside(root, f"{dataset}/{first.replace('_video_', '_text_')}/{rest}", where).with_suffix(".txt")
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").lower().split())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: the line has no text, and {path} cannot be read: {error}") from error


def _inside(root: _Root, relative: str, where: str) -> Path:
    """``relative`` below ``root``; it may contain ``..`` as long as it stays there."""
    folder = str(root.folder)  # texts: pathlib would take most of the time of a large manifest
    path = os.path.normpath(os.path.join(folder, relative))
    if "\0" in relative:
        raise UserError(f"{where}: {relative!r} cannot be the path of a file")
    named = os.path.isabs(relative)
    if not f"{path}/".startswith(f"{folder.rstrip('/')}/") and not (named and root.absolute):
        advice = "; avsr train and evaluate permit it with data.allow_absolute=true" if named else ""
        raise UserError(f"{where}: the path {relative!r} leads outside {root.folder}{advice}")
    return Path(path)
