"""Rows of manifests from the rows of Arrow files and the samples of WebDataset."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avsr.config.schema import ColumnsConfig
from avsr.data.arrows import open_rows, refuse_other_type
from avsr.data.clip import SOUND_SUFFIXES, VIDEO_SUFFIXES
from avsr.data.members import read_text
from avsr.data.tars import scan, write_index
from avsr.errors import UserError

_SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", *SOUND_SUFFIXES)
_TEXTS = ("string", "large_string")
_NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float", "double", "halffloat")
_TYPES = {"id": _TEXTS + _NUMBERS, "text": _TEXTS, "duration": _NUMBERS, "speaker": _TEXTS + _NUMBERS}


def arrow_rows(spec: str, files: Iterable[Path], columns: ColumnsConfig) -> Iterator[dict[str, Any]]:
    """A row of a manifest for each of the files; paths lead into them, and a duration that is not known is None.

    Raises:
        UserError: a file is damaged, or a column is missing or of another type; ``spec`` is what the user called them.
    """
    number = 0
    for path in files:
        place = 0
        for batch in open_rows(path).batches:
            names = _chosen(spec, batch.schema, columns)
            try:
                for name in names.values():
                    batch.column(name).validate(full=True)
                plain = {field: batch.column(names[field]).to_pylist() for field in _TYPES.keys() & names.keys()}
            except (ValueError, OSError) as error:
                raise UserError(f"{path} is damaged: {error}") from error
            clips = {field: batch.column(names[field]).is_valid() for field in ("audio", "video") if field in names}
            for index in range(batch.num_rows):
                held = {field: values[index] for field, values in plain.items()}
                inside: dict[str, str | None] = {
                    field: f"{path}/{place + index}/{names[field]}" if valid[index].as_py() else None
                    for field, valid in clips.items()
                }
                yield _row(str(number), held, inside)
                number += 1
            place += batch.num_rows


def _chosen(spec: str, schema: Any, columns: ColumnsConfig) -> dict[str, str]:
    """The column of each field that there is."""
    wanted, usual = asdict(columns), asdict(ColumnsConfig())
    chosen = {field: name for field, name in wanted.items() if name in schema.names}
    needed = {"text"} | {field for field, name in wanted.items() if name != usual[field]}
    needed |= set() if chosen.keys() & {"audio", "video"} else {"audio"}
    for field in wanted:
        if field in needed and field not in chosen:
            raise UserError(
                f"{spec} has no column {wanted[field]!r}; data.columns.{field} names one of {', '.join(schema.names)}"
            )
    for field, name in chosen.items():
        if field in _TYPES and str(schema.field(name).type) not in _TYPES[field]:
            kind = schema.field(name).type
            raise UserError(f"{spec}: the column {name!r} is of the type {kind}, which data.columns.{field} cannot be")
        if field not in _TYPES:
            refuse_other_type(spec, schema, name)
    return chosen


def tar_rows(spec: str, files: Iterable[Path], columns: ColumnsConfig) -> Iterator[dict[str, Any]]:
    """A row of a manifest for each sample of the files: members whose names are the same up to the first dot.

    A field is a key of the sample's ``.json``, or the content of ``KEY.FIELD``; clips are found by their suffix, too,
    and the text in ``KEY.txt``. One whose id is known already is called after its tar, too.

    Raises:
        UserError: a file is damaged, or no sample has a text or none a clip.
    """
    seen: set[str] = set()
    has_text = has_clip = False
    first = ""
    for path in files:
        members = scan(path)
        write_index(path, members)
        for key, parts in _samples(members).items():
            first = first or f"that of {key} are {', '.join(parts)}"
            held = _fields(path, parts)
            held["text"] = _text(path, parts, held, columns.text)
            fields = {field: held.get(name) for field, name in asdict(columns).items() if name in held}
            fields["text"] = held["text"]
            inside = {
                "audio": _clip(path, parts, columns.audio, _SOUNDS),
                "video": _clip(path, parts, columns.video, VIDEO_SUFFIXES),
            }
            has_text, has_clip = has_text or bool(fields["text"]), has_clip or any(inside.values())
            row = _row(key, fields, inside)
            if row["id"] in seen:
                row["id"] = f"{path.stem}/{row['id']}"
            seen.add(row["id"])
            yield row
    if seen and not (has_text and has_clip):
        lacking = "sound or video" if has_text else "text (KEY.txt, or data.columns.text in KEY.json)"
        raise UserError(f"{spec}: no sample has a {lacking}; the suffixes of the first: {first}")


def _samples(members: Iterable[str]) -> dict[str, dict[str, str]]:
    """The members of each sample by their suffixes."""
    found: dict[str, dict[str, str]] = {}
    for name in members:
        folder, base = posixpath.split(name)
        key, dot, suffix = base.partition(".")
        if key and dot:
            found.setdefault(posixpath.join(folder, key), {})[suffix] = name
    return found


def _fields(path: Path, parts: Mapping[str, str]) -> dict[str, Any]:
    if "json" not in parts:
        return {}
    try:
        held = json.loads(read_text(path / parts["json"]))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path / parts['json']} is not JSON: {str(error).splitlines()[0]}") from error
    return held if isinstance(held, dict) else {}


def _text(path: Path, parts: Mapping[str, str], held: Mapping[str, Any], name: str) -> str:
    if isinstance(held.get(name), str):
        return str(held[name])
    member = parts.get(name) or parts.get("txt")
    try:
        return " ".join(read_text(path / member).split()) if member else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/{member} is not a text: {error}") from error


def _clip(path: Path, parts: Mapping[str, str], name: str, suffixes: tuple[str, ...]) -> str | None:
    """The member of that suffix, or else the first of a known one."""
    named = [parts[part] for part in parts if part == name or part.startswith(f"{name}.")]
    known = [parts[part] for part in parts if posixpath.splitext(f"x.{part}")[1].lower() in suffixes]
    return f"{path}/{(named + known)[0]}" if named or known else None


def _row(key: str, held: Mapping[str, Any], clips: Mapping[str, str | None]) -> dict[str, Any]:
    """``key`` is the id of a row that has none."""
    number = held.get("duration")
    known = isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 1e6
    return {
        "id": key if held.get("id") is None else str(held["id"]),
        "audio": clips.get("audio"),
        "video": clips.get("video"),
        "text": held.get("text") or "",
        "duration": float(number) if known and number is not None else None,
        "speaker": "" if held.get("speaker") is None else str(held["speaker"]),
    }
