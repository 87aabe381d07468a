"""Manifests: one JSON object a line, or the Llama-AVSR label CSV.

A manifest line has the fields ``id``, ``audio`` or ``video`` or both (paths relative to the manifest's folder),
``text`` and ``duration`` (seconds), and may have ``speaker``, ``times`` and ``sha256``. Other fields are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avsr.errors import UserError

LABEL_FRAMES_PER_SECOND = 25  # Llama-AVSR label files count video frames, also for audio


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


def read_manifest(path: str | Path, *, on_bad: Callable[[str], None] | None = None) -> list[Utterance]:
    """Reads a ``.jsonl`` manifest or a Llama-AVSR ``.csv`` label file.

    Args:
        path: the manifest. CSV paths are taken relative to the parent of the folder that holds the file
            (``ROOT/labels/x.csv``).
        on_bad: called with the message of every bad line, which is then left out. Without it the first bad
            line raises.

    Raises:
        UserError: missing, unreadable or empty manifest; a bad line (unless ``on_bad``).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from error
    parse, root = (
        (_parse_csv, path.resolve().parent.parent) if path.suffix == ".csv" else (_parse_json, path.resolve().parent)
    )
    rows: list[Utterance] = []
    seen: dict[str, str] = {}
    refused = ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse(line, root, where)
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
    return rows


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, replacing ``path`` in one step."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def _parse_json(line: str, root: Path, where: str) -> Utterance:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for field in ("id", "text", "duration", *(() if row.get("video") else ("audio",))):
        if field not in row:
            raise UserError(f"{where}: the field {field!r} is missing (it has {', '.join(row) or 'none'})")
    for field in ("id", "text"):
        if not isinstance(row[field], str) or not row[field].strip():
            raise UserError(f"{where}: {field!r} must be a text that is not empty, got {row[field]!r}")
    duration = row["duration"]
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration < 1e6:
        raise UserError(f"{where}: 'duration' must be seconds above 0, got {duration!r}")
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
        text=row["text"],
        duration=float(duration),
        speaker=str(row.get("speaker") or ""),
        video=paths["video"],
        sha256=str(row.get("sha256") or ""),
        times=paths["times"],
        where=where,
    )


def _parse_csv(line: str, root: Path, where: str) -> Utterance:
    """``dataset,rel_path,num_frames,token ids,text`` without a header; the text has no comma."""
    fields = line.split(",")
    if len(fields) != 5:
        raise UserError(f"{where}: expected 5 fields (dataset, path, frames, token ids, text), got {len(fields)}")
    dataset, relative, frames, _, text = (field.strip() for field in fields)
    if not frames.isdecimal() or int(frames) == 0:
        raise UserError(f"{where}: the number of frames must be a whole number above 0, got {frames!r}")
    if not text:
        raise UserError(f"{where}: the transcript is empty")
    video = _inside(root, f"{dataset}/{relative}", where)
    return Utterance(
        id=f"{dataset}/{relative}",
        audio=video.with_suffix(".wav"),
        text=text,
        duration=int(frames) / LABEL_FRAMES_PER_SECOND,
        speaker=Path(relative).parent.name,
        video=video,
        where=where,
    )


def _inside(root: Path, relative: str, where: str) -> Path:
    """``relative`` below ``root``, whatever ``..`` it holds."""
    path = Path(os.path.normpath(root / relative))
    if not path.is_relative_to(root):
        raise UserError(f"{where}: the path {relative!r} leads outside {root}")
    return path
