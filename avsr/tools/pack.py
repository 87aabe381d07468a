"""``avsr pack``: puts the clips of a manifest into a few large tar files.

``OUT/NAME-000000.tar`` and so on hold ``KEY.flac``, ``KEY.mp4`` and what else a line names, and ``KEY.json``, its other
fields, so that they are WebDataset shards too; KEY is the id. ``OUT/NAME.jsonl`` is the manifest with the paths inside
them. The same command continues a packing that was stopped: shards that are whole stay, and the result is the same to
the byte. What the shards were made of is in ``OUT/.NAME.pack``.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import soundfile

from avsr.data.manifest import Utterance, read_manifest, write_manifest
from avsr.data.measured import refuse_other_content
from avsr.data.members import open_media, readable, stamp, suffix_of
from avsr.data.tars import write_index
from avsr.errors import UserError, at
from avsr.runtime.folders import flush, part_of, sha256
from avsr.runtime.progress import ProgressBar
from avsr.runtime.rows import Row, Rows, as_lines
from avsr.runtime.share import Share, claim_share, claim_whole, gather, take_over, unfinished

logger = logging.getLogger("avsr")
_PATHS = ("audio", "video", "times")  # fields that name files
_BLOCK = 512  # bytes, of which a tar's headers and contents take whole ones


@dataclass(frozen=True)
class Packed:
    """What is there now: lines of the manifest and shards, and how many of these were written by this call."""

    lines: int
    shards: int
    written: int


@dataclass
class _Entry:
    """A line and what the shard gets for it: files by their names in it, each with its size in bytes."""

    utterance: Utterance
    row: dict[str, Any]  # of the new manifest
    files: dict[str, tuple[Path, int]] = field(default_factory=dict)
    note: tuple[str, bytes] | None = None  # name and content of the line's other fields

    @property
    def size(self) -> int:
        sizes = [size for _, size in self.files.values()] + ([len(self.note[1])] if self.note else [])
        return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)


def pack(
    manifest: str | Path,
    out: str | Path,
    *,
    size: float = 1.0,
    clips: int = 0,
    absolute: bool = False,
    share: Share | None = None,
    merge: bool = False,
) -> Packed:
    """Packs the clips of a manifest, or continues with it. A file that several lines name is there once.

    Args:
        manifest: its path; the clips may be in containers already.
        out: the folder to make.
        size: GB (10^9 bytes) from which a shard is full.
        clips: lines whose files a shard holds; 0 = any number.
        absolute: as of :func:`~avsr.data.manifest.read_manifest`.
        share: of the shards; None = all of them, and the manifest.
        merge: write only the manifest, of what the shares have packed.

    Raises:
        UserError: bad options; a line or a file cannot be read, or a file is another than the manifest was made of;
            ``out`` holds the manifest or clips themselves, is in use or cannot be written; or ``merge`` and shards are
            missing.
    """
    manifest, out = Path(manifest), Path(out).absolute()
    if not 0 < size < math.inf or clips < 0:
        raise UserError(f"pack: expected --size above 0 and --clips from 0 on, got {size:g} and {clips}")
    name = manifest.stem
    place = out / f"{name}.jsonl"
    if os.path.realpath(place) == os.path.realpath(manifest):
        raise UserError(f"pack: {place} is the manifest itself: choose another folder")
    entries = list(_entries(manifest, absolute))
    own = f"{os.path.realpath(out)}/{name}-"
    for folder in {path.parent for entry in entries for path, _ in entry.files.values()}:
        if f"{os.path.realpath(folder)}/".startswith(own):
            raise UserError(f"pack: {folder} would be replaced: choose another folder")
    shards = {f"{name}-{number:06d}.tar": part for number, part in enumerate(_parted(entries, size * 1e9, clips))}
    marks = [f"{file} {path} {stamp(path)}" for entry in entries for file, (path, _) in entry.files.items()]
    files = hashlib.sha256("\n".join(marks).encode("utf-8", "surrogateescape")).hexdigest()
    made_by = {"manifest": sha256(manifest), "files": files, "size": size, "clips": clips}
    try:
        if share is not None:
            with claim_share(out, share):
                mine = {shard: shards[shard] for shard in share.of(list(shards))}
                rows = Rows(out / share.file, _shard, made_by)
                return Packed(0, len(mine), _write(place, mine, rows, f"pack, shard {share}"))
        with claim_whole(out):
            rows, shared = Rows(out / f".{name}.pack", _shard, made_by), gather(out, _shard, made_by)
            if merge:
                _refuse_unfinished(out, list(shards), rows, shared)
            take_over(rows, shared)
            written = _write(place, shards, rows, "pack")
            if written or shared or not place.exists():
                write_manifest(place, _rows(shards))
    except OSError as error:
        kept_on = "whole shards are kept, the same command goes on"
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}; {kept_on}") from error
    if others := sorted(path.name for path in out.glob(f"{name}-??????.tar") if path.name not in shards):
        logger.warning("%s holds %d more shards of an earlier packing, first %s", out, len(others), others[0])
    return Packed(len(entries), len(shards), written)


def _shard(row: Row) -> str:
    return str(row["shard"])


def _refuse_unfinished(out: Path, shards: list[str], rows: Rows, shared: Mapping[Share, list[Row]]) -> None:
    held: dict[Any, Row] = dict(rows.held)
    held |= {_shard(row): row for part in shared.values() for row in part}
    missing = [number for number, shard in enumerate(shards) if not _whole(out / shard, held.get(shard))]
    if missing:
        raise unfinished(out, shared, lambda count: (number % count + 1 for number in missing))


def _entries(manifest: Path, absolute: bool) -> Iterator[_Entry]:
    """In the order of the manifest; paths of the rows still lack their shard."""
    utterances = read_manifest(manifest, absolute=absolute)
    lines = manifest.read_text(encoding="utf-8-sig").split("\n") if manifest.suffix != ".csv" else []
    placed: set[Path] = set()
    for utterance in utterances:
        row: dict[str, Any] = {key: getattr(utterance, key) for key in ("id", "text", "duration", "speaker")}
        if lines:
            row = json.loads(lines[int(utterance.where.rpartition(":")[2]) - 1])
        entry = _Entry(utterance, row)
        key = _key(utterance.id)
        for kind in _PATHS:
            path = getattr(utterance, kind)
            if path is None or path in placed:
                continue
            ending = f".{kind}.json" if kind == "times" else _suffix(path)
            name = key + ending if key + ending not in entry.files else f"{key}.{kind}{ending}"
            entry.files[name] = path, _size(path, utterance.where)
            placed.add(path)
        if entry.files:
            entry.note = f"{key}.json", as_lines([{k: value for k, value in row.items() if k not in _PATHS}])
        yield entry


def _parted(entries: list[_Entry], most: float, clips: int) -> Iterator[list[_Entry]]:
    """The entries of each shard, which is full at ``most`` bytes; one without files of its own is where it comes."""
    part: list[_Entry] = []
    size = count = 0
    for entry in entries:
        if entry.files and count and (size + entry.size > most or count == clips):
            yield part
            part, size, count = [], 0, 0
        part.append(entry)
        size, count = size + entry.size, count + bool(entry.files)
    yield part


def _rows(shards: Mapping[str, list[_Entry]]) -> Iterator[dict[str, Any]]:
    """The lines of the new manifest."""
    places: dict[Path, str] = {}
    for shard, part in shards.items():
        for entry in part:
            places |= {path: f"{shard}/{name}" for name, (path, _) in entry.files.items()}
            named = {kind: getattr(entry.utterance, kind) for kind in _PATHS}
            yield {**entry.row, **{kind: places[path] for kind, path in named.items() if path is not None}}


def _write(place: Path, shards: Mapping[str, list[_Entry]], rows: Rows, title: str) -> int:
    """Writes the shards that are not whole yet beside ``place``, their manifest, and returns their number."""
    out = place.parent
    missing = {shard: part for shard, part in shards.items() if not _whole(out / shard, rows.held.get(shard))}
    if missing:
        place.unlink(missing_ok=True)  # of shards that are replaced now
    total, left = (sum(map(len, part.values())) for part in (shards, missing))
    with ProgressBar(title, total, done=total - left) as bar:
        for shard, part in missing.items():
            new = part_of(out / shard)
            try:
                with new.open("wb") as file:
                    places = _fill(file, part, bar)
                    size = file.tell()
                flush(new)
                os.replace(new, out / shard)
                flush(out)
            finally:
                with suppress(OSError):
                    new.unlink(missing_ok=True)
            write_index(out / shard, places)
            rows.add({"shard": shard, "bytes": size})
    return len(missing)


def _fill(file: BinaryIO, part: list[_Entry], bar: ProgressBar) -> dict[str, tuple[int, int]]:
    """Writes a shard, which depends on nothing but its files: no owner, no times. Gives place and size of each."""
    places = {}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in part:
            refuse_other_content(entry.utterance, {"audio", "video"})
            contents = [(name, size, path) for name, (path, size) in entry.files.items()]
            for name, size, path in contents:
                try:
                    source = open_media(path)
                except OSError as error:
                    raise UserError(f"{at(entry.utterance.where)}{path} cannot be read: {error}") from error
                with source:
                    places[name] = _add(tar, name, size, source)
            if entry.note is not None:
                name, data = entry.note
                places[name] = _add(tar, name, len(data), io.BytesIO(data))
            bar.advance()
    return places


def _add(tar: tarfile.TarFile, name: str, size: int, source: BinaryIO) -> tuple[int, int]:
    info = tarfile.TarInfo(name)
    info.size = size
    tar.addfile(info, source)
    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
    return tar.offset - -(-size // _BLOCK) * _BLOCK, size


def _whole(path: Path, row: Any) -> bool:
    try:
        return row is not None and path.stat().st_size == row["bytes"]
    except (OSError, KeyError):
        return False


def _key(name: str) -> str:
    """The id as a path inside a tar that leads nowhere else. It has no dot, since WebDataset takes what follows the
    first one for the suffix."""
    safe = "/" if posixpath.normpath(name) == name and not name.startswith("/") else ""
    return quote(name, safe=safe, errors="surrogateescape").replace(".", "%2E")


def _suffix(path: Path) -> str:
    """With which decoders recognize a file; found by its content if its name has none."""
    suffix = suffix_of(path)
    if suffix:
        return suffix
    try:
        return f".{soundfile.info(readable(path)).format.lower()}"
    except (soundfile.LibsndfileError, RuntimeError, OSError):
        return ".bin"


def _size(path: Path, where: str) -> int:
    try:
        with open_media(path) as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"{at(where)}{path} cannot be read: {error.strerror or error}") from error
