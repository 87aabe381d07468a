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

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from avsr.data.cut import Cut
from avsr.errors import UserError
from avsr.runtime.folders import write_durably
from avsr.runtime.rows import as_lines

logger = logging.getLogger("avsr")

LABEL_FRAMES_PER_SECOND = 25  # Llama-AVSR label files count video frames, also for audio
_SHA256 = re.compile("[0-9a-fA-F]{64}")
_HALF = re.compile(r"\\u[dD]")
_FIELDS = {"id", "audio", "video", "text", "duration", "offset", "speaker", "times", "sha256"}
NO_TEXT = ": the line has no text, and"  # how a refusal goes on whose text is in a file that is missing
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
    # avsr.data.members.stamp of audio and video where an index knows them, which spares looking at every file
    stamps: tuple[str | None, str | None] = dataclasses.field(default=(None, None), compare=False)

    @property
    def cut(self) -> Cut | None:
        return None if self.offset is None else Cut(self.offset, self.duration)


class Line(NamedTuple):
    """One row of a manifest as texts and numbers; paths are absolute."""

    id: str
    audio: str | None
    text: str
    duration: float
    speaker: str = ""
    video: str | None = None
    sha256: str = ""
    times: str | None = None
    offset: float | None = None

    def utterance(self, where: str, stamps: tuple[str | None, str | None] = (None, None)) -> Utterance:
        audio, video, times = (None if path is None else Path(path) for path in (self.audio, self.video, self.times))
        rest = self.sha256, times, where, self.offset, stamps
        return Utterance(self.id, audio, self.text, self.duration, self.speaker, video, *rest)


def read_manifest(
    path: str | Path, *, on_bad: Callable[[str], None] | None = None, absolute: bool = False, texts: bool = True
) -> list[Utterance]:
    """Reads a ``.jsonl`` manifest or a ``.csv`` label file of Llama-AVSR or auto_avsr. For those that may be large see
    :func:`avsr.data.index.open_manifest`.

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
    return [
        line.utterance(f"{path}:{number}") for number, line in read_lines(Path(path), on_bad or _raise, absolute, texts)
    ]


def read_lines(path: Path, on_bad: Callable[[str], None], absolute: bool, texts: bool = True) -> list[tuple[int, Line]]:
    """The lines that can be used, with their numbers; arguments as of :func:`read_manifest`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # a name with a NUL, or not UTF-8
        raise UserError(f"cannot read the manifest {path}: {error}") from error
    within = Root.of(path, absolute, texts)
    rows: list[tuple[int, Line]] = []
    seen: dict[str, int] = {}
    refused = ""
    for number, found in parse_lines(lines, path, within):
        if isinstance(found, Line) and found.id in seen:
            found = f"{path}:{number}{used_twice(found.id)}{path}:{seen[found.id]}"
        if isinstance(found, str):
            on_bad(found)
            refused = refused or f"; the first: {found}"
            continue
        seen[found.id] = number
        rows.append((number, found))
    if not rows:
        raise no_line(path, refused)
    warn_of_unread(path, within.unread)
    return rows


def no_line(path: Path, refused: str) -> UserError:
    return UserError(f"the manifest {path} has no usable line{refused}")


def _raise(reason: str) -> None:
    raise UserError(reason)


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, replacing ``path`` atomically."""
    write_durably(Path(path), as_lines(rows))


@dataclass(frozen=True)
class Root:
    """The folder below which paths lead, or if ``absolute`` those that do not name their place themselves; the lines
    where every field that is not read was first seen; and whether lines need ``texts``."""

    folder: Path
    absolute: bool
    unread: dict[str, int]
    texts: bool = True

    def refusal(self, path: str) -> str:
        """The reason for which ``path``, as the manifest names it, is refused."""
        advice = "; avsr train and evaluate permit it with data.allow_absolute=true" if os.path.isabs(path) else ""
        return f"the path {path!r} leads outside {self.folder}{advice}"

    @classmethod
    def of(cls, manifest: Path, absolute: bool, texts: bool = True) -> Root:
        """Of a manifest; paths of a label CSV begin in the parent of its folder."""
        folder = manifest.resolve().parent
        return cls(folder.parent if manifest.suffix == ".csv" else folder, absolute, {}, texts)


def parse_lines(lines: Iterable[str], path: Path, root: Root, first: int = 1) -> Iterator[tuple[int, Line | str]]:
    """(number, row or reason of its refusal) of each line of the manifest ``path`` that is not blank; the first one has
    the number ``first``."""
    parse = _parse_csv if path.suffix == ".csv" else _parse_json
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            yield number, parse(line, root, f"{path}:{number}")
        except UserError as error:
            yield number, str(error)


def used_twice(name: str) -> str:
    """What the message of a line says between its place and that of an earlier line with the same id."""
    return f": the id {name!r} was already used at "


def warn_of_unread(path: Path, fields: Mapping[str, int]) -> None:
    """Warns of fields that may be misspelt, by the number of the line where each was first seen."""
    for name, number in fields.items():
        if meant := get_close_matches(name, _FIELDS, 1, 0.75):
            logger.warning("%s:%d: the field %r is not read; did you mean %r?", path, number, name, meant[0])


def _parse_json(line: str, root: Root, where: str) -> Line:
    try:
        row = json.loads(line)
        if _HALF.search(line):  # perhaps half of a surrogate pair, which is not text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object: {str(error).splitlines()[0]}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for other in row.keys() - _FIELDS:
        root.unread.setdefault(other, int(where.rpartition(":")[2]))
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
    return Line(
        id=row["id"],
        audio=paths["audio"],
        text=row["text"] if root.texts else "",
        duration=float(duration),
        speaker=str(row.get("speaker") or ""),
        video=paths["video"],
        sha256=digest,
        times=paths["times"],
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


def _parse_csv(line: str, root: Root, where: str) -> Line:
    """A line without a text (auto_avsr's) takes it from the parallel text tree: ``lrs3_text_seg16s/x.txt`` for
    ``lrs3_video_seg16s/x.mp4``."""
    label = parse_label(line, where)
    video = _inside(root, f"{label.dataset}/{label.path}", where)
    sound = str(Path(video).with_suffix(".wav"))
    text = ""
    if root.texts:
        text = label.text if label.text is not None else _parallel_text(root, label.dataset, label.path, where)
        if not text:
            raise UserError(f"{where}: the transcript is empty")
    return Line(
        id=f"{label.dataset}/{label.path}",
        audio=sound,
        text=text,
        duration=label.frames / LABEL_FRAMES_PER_SECOND,
        speaker=Path(label.path).parent.name,
        video=video,
    )


def _unquoted(text: str) -> str:
    """Without the quotes that CSV writers put around a text with commas."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"').strip()
    return text


def _parallel_text(root: Root, dataset: str, relative: str, where: str) -> str:
    first, slash, rest = relative.partition("/")
    if "_video_" not in first or not slash:
        raise UserError(
            f"{where}: the line has no text, and {relative!r} is not in a folder like {dataset}_video_seg16s, next"
            f" to which {dataset}_text_seg16s would have it"
        )
    path = Path(_inside(root, f"{dataset}/{first.replace('_video_', '_text_')}/{rest}", where)).with_suffix(".txt")
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").lower().split())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}{NO_TEXT} {path} cannot be read: {error}") from error


def _inside(root: Root, relative: str, where: str) -> str:
    """The path of ``relative`` below ``root``; it may contain ``..`` as long as it stays there."""
    folder = str(root.folder)  # texts: pathlib would take most of the time of a large manifest
    path = os.path.normpath(os.path.join(folder, relative))
    if "\0" in relative:
        raise UserError(f"{where}: {relative!r} cannot be the path of a file")
    named = os.path.isabs(relative)
    if not f"{path}/".startswith(f"{folder.rstrip('/')}/") and not (named and root.absolute):
        raise UserError(f"{where}: {root.refusal(relative)}")
    return path
