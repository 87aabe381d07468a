"""Manifests of any size: a large one is parsed once, in many processes, into an index that is mapped from then on.

The index of ``train.jsonl`` is the folder ``train.jsonl.index`` beside it, or if that cannot be written one in the
cache. It holds

- ``index.json``: which manifest it is of (size, time and SHA-256), bad lines, clips that are there twice;
- ``rows-SUM.arrow``: the rows, as ``avsr.data.utterances.SCHEMA``; SUM is the beginning of the manifest's SHA-256;
- ``tokens-SUM-TOKENIZER.npy``: the number of tokens of every text;
- ``measured-SUM.arrow``: what ``avsr index`` measured (``avsr.data.measuring``).

A manifest that has changed is indexed again, and so is one whose index is damaged. Several processes may read an index
while another one is made: files are replaced, not changed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avsr.data.manifest import NO_TEXT, Root, no_line, parse_lines, read_lines, used_twice, warn_of_unread
from avsr.data.marks import repeated
from avsr.data.utterances import CHUNK, PATHS, SCHEMA, Utterances, twice
from avsr.errors import UserError, visible
from avsr.runtime.folders import cache_folder, flush, part_of, remove, sha256, write_durably
from avsr.runtime.locks import hold
from avsr.runtime.pool import Lost, run_jobs
from avsr.runtime.progress import ProgressBar

logger = logging.getLogger("avsr")
SUFFIX = ".index"
LARGE = 2**23  # bytes from which a manifest gets an index by itself: about 30,000 lines, 1.5 s
RANGE = 2**24  # bytes that one process parses at once
_VERSION = 1
_META = "index.json"
_OWN = ("parts-", "rows-", "tokens-", "measured-")  # what the names of files begin with


@dataclass(frozen=True)
class Index:
    """The index of a manifest.

    Attributes:
        folder: where it is.
        sum: the beginning of the manifest's SHA-256.
        previous: that of the content before, whose measured clips may still be there; "" = none.
        bad: (line, reason, line that is mentioned at its end or 0) of every bad line.
        twice: what :func:`avsr.data.utterances.twice` returns for it.
        unread: fields that are not read, and the line where each was first seen.
        outside: number of rows with a path outside of the manifest's folder.
    """

    folder: Path
    sum: str
    previous: str
    bad: list[tuple[int, str, int]]
    twice: tuple[int, str, str]
    outside: int
    unread: dict[str, int]
    table: pa.Table

    def reasons(self, path: Path) -> list[str]:
        """The messages of the bad lines of the manifest ``path``."""
        return [f"{path}:{line}{reason}{f'{path}:{before}' if before else ''}" for line, reason, before in self.bad]

    def file(self, name: str) -> Path:
        return self.folder / name.format(self.sum)


@dataclass(frozen=True)
class Manifest:
    """A manifest's usable rows, the messages of its bad lines, and its index if it has one."""

    utterances: Utterances
    bad: list[str]
    index: Index | None


def open_manifest(manifest: str | Path, *, absolute: bool = False, quiet: bool = False) -> Manifest:
    """Reads a manifest, by its index if it has one or is large. Of several processes that need a new index one makes
    it, the others wait.

    Args:
        manifest: as of :func:`~avsr.data.manifest.read_manifest`.
        absolute: likewise.
        quiet: fields that may be misspelt are not warned about.

    Raises:
        UserError: it is missing, unreadable or without a usable line, or its index cannot be made.
    """
    path = Path(manifest)
    index = _find(path) or (make_index(path) if _size(path) >= LARGE else None)
    if index is None:
        bad: list[str] = []
        return Manifest(Utterances.of(read_lines(path, bad.append, absolute), str(path)), bad, None)
    if not quiet:
        warn_of_unread(path, index.unread)
    return _usable(index, path, absolute)


def make_index(path: Path, workers: int = 0) -> Index:
    """Makes the index of a manifest, or returns the one that it has; what a killed process has parsed stays.

    Args:
        path: the manifest.
        workers: processes; 0 = one for each CPU.

    Raises:
        UserError: the manifest cannot be read, or no folder takes the index.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"cannot read the manifest {path}: it is no file")
    problem: OSError | None = None
    for folder in _places(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with hold(folder, key=f"index of {path}", wait=True):
                return _open(folder, path) or _build(path, folder, workers)
        except UserError:
            if os.access(folder, os.W_OK):
                raise
        except OSError as error:
            problem = error
    raise UserError(f"cannot write an index of {path}: {problem}")


def _places(path: Path) -> list[Path]:
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
    return [path.with_name(path.name + SUFFIX), cache_folder() / "index" / digest]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except (OSError, ValueError):
        return 0


def _find(path: Path) -> Index | None:
    places = _places(path) if _size(path) else []
    return next(filter(None, (_open(folder, path) for folder in places if folder.is_dir())), None)


def _open(folder: Path, path: Path) -> Index | None:
    """None if there is none, or it is damaged or of another content of the manifest, which is said."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if meta["version"] != _VERSION or not _same(meta, path):
            logger.info("%s is of another content of %s", folder, path)
            return None
        bad = [(int(line), str(reason), int(before)) for line, reason, before in meta["bad"]]
        count, first, second = meta["twice"]
        table = read_arrow(folder / f"rows-{meta['sha256'][:12]}.arrow")
        if table.schema != SCHEMA or len(table) != meta["rows"]:
            raise ValueError("rows are missing")
        return Index(
            folder,
            meta["sha256"][:12],
            meta["previous"],
            bad,
            (count, first, second),
            meta["outside"],
            meta["unread"],
            table,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = visible(str(error).splitlines()[0] if str(error) else type(error).__name__)
        logger.warning("%s is damaged and is made again: %s", folder, reason)
        return None


def _same(meta: dict[str, Any], path: Path) -> bool:
    """Whether the manifest has the content that was indexed; its time alone changes when a corpus is copied."""
    found = path.stat()
    if any(reason.startswith(NO_TEXT) for _, reason, _ in meta["bad"]):
        return False  # the text of a label may be there by now
    if found.st_size != meta["size"] or str(Root.of(path, True).folder) != meta["root"]:
        return False
    return found.st_mtime_ns == meta["mtime_ns"] or _sum(path, found.st_size, found.st_mtime_ns) == meta["sha256"]


@lru_cache(maxsize=64)
def _sum(path: Path, size: int, changed: int) -> str:
    """Once for the many jobs of a process."""
    return sha256(path)


def _usable(index: Index, path: Path, absolute: bool) -> Manifest:
    bad = index.reasons(path)
    root = Root.of(path, absolute)
    utterances = Utterances(index.table, str(path), str(root.folder), index.twice)
    if index.outside and not absolute:
        outside = np.zeros(len(utterances), dtype=bool)
        for name in PATHS:
            starts = pc.fill_null(pc.starts_with(index.table.column(name), "/"), False)
            outside |= starts.to_numpy(zero_copy_only=False)
        for place in np.nonzero(outside)[0].tolist():
            utterance = utterances[place]
            first = next(p for p in (utterance.audio, utterance.video, utterance.times) if p and not _below(p, root))
            bad.append(f"{utterance.where}: {root.refusal(str(first))}")
        utterances = utterances.select(np.nonzero(~outside)[0])
    if not len(utterances):
        raise no_line(path, f"; the first: {bad[0]}" if bad else "")
    return Manifest(utterances, bad, index)


def _below(path: Path, root: Root) -> bool:
    return path.is_relative_to(root.folder)


def _previous(folder: Path, own: str) -> str:
    """The sum of the content whose index this one replaces; "" if nothing was measured for it."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        found = str(meta["sha256"])[:12]
        if found == own:  # the same content in another place
            return str(meta["previous"])
        return found if any(folder.glob(f"measured-{glob.escape(found)}-*.arrow")) else str(meta["previous"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class _Job(NamedTuple):
    """The lines of a manifest that begin in these bytes, and the file for them."""

    manifest: str
    begin: int
    end: int
    part: str


def _build(path: Path, folder: Path, workers: int) -> Index:
    try:
        size, stamp, digest = path.stat().st_size, path.stat().st_mtime_ns, sha256(path)
        parts = folder / f"parts-{digest[:12]}"
        parts.mkdir(exist_ok=True)
        jobs = [
            _Job(str(path), begin, min(begin + RANGE, size), str(parts / f"{begin // RANGE:06d}.arrow"))
            for begin in range(0, max(size, 1), RANGE)
        ]
        _parse(jobs, 1 if len(jobs) == 1 else workers, path)
        meta = _join([read_arrow(Path(job.part)) for job in jobs], path, folder / f"rows-{digest[:12]}.arrow")
        meta |= {
            "root": str(Root.of(path, True).folder),
            "version": _VERSION,
            "previous": _previous(folder, digest[:12]),
            "size": size,
            "mtime_ns": stamp,
            "sha256": digest,
        }
        write_durably(folder / _META, (json.dumps(meta) + "\n").encode())
        for other in folder.iterdir():
            sums = digest[:12], meta["previous"] or digest[:12]
            kept = other.name.startswith(tuple(f"{kind}-{own}" for kind in ("rows", "measured") for own in sums))
            if other.name.startswith(_OWN) and not kept and not other.name.startswith(f"tokens-{sums[0]}"):
                remove(other)
    except OSError as error:
        place = error.filename or folder
        raise UserError(f"cannot write the index of {path}: {place}: {error.strerror or error}") from error
    found = _open(folder, path)
    if found is None:
        raise UserError(f"{path} or its index {folder} has changed while the index was made: start again")
    return found


def _parse(jobs: list[_Job], workers: int, path: Path) -> None:
    todo = [job for job in jobs if not os.path.exists(job.part)]
    with ProgressBar(f"index {path.name}", len(jobs), done=len(jobs) - len(todo)) as bar:
        for job, result in run_jobs(_parse_range, todo, workers):
            if isinstance(result, Lost):
                raise UserError(f"{path}: a process that parsed it from byte {job.begin} on {result.reason}: try again")
            bar.advance()


def _parse_range(job: _Job) -> None:
    path, rows, bad = Path(job.manifest), [], []
    lines = _lines(job)
    within = Root.of(path, absolute=True)
    for number, found in parse_lines(lines, path, within):
        if isinstance(found, str):
            bad.append((number, found.removeprefix(f"{path}:{number}"), 0))
        else:
            rows.append((number, found))
    notes = {"lines": len(lines), "bad": bad, "unread": within.unread}
    write_part(
        Path(job.part),
        Utterances.of(rows, "", str(within.folder)).table.replace_schema_metadata({"notes": json.dumps(notes)}),
    )


def _lines(job: _Job) -> list[str]:
    with open(job.manifest, "rb") as file:
        if job.begin:
            file.seek(job.begin - 1)
            file.readline()  # the rest of a line that began before
        data = file.read(max(job.end - file.tell(), 0))
        if data and not data.endswith(b"\n"):
            data += file.readline()
    try:
        text = data.decode("utf-8-sig" if not job.begin else "utf-8")
    except ValueError as error:
        raise UserError(f"cannot read the manifest {job.manifest}: {error}") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _join(parts: list[pa.Table], path: Path, target: Path) -> dict[str, Any]:
    """Writes the rows of all parts to ``target``, but for those whose id is used before. Returns what ``index.json``
    says of them."""
    before, bad, tables = 0, [], []
    unread: dict[str, int] = {}
    for part in parts:
        notes = json.loads(part.schema.metadata[b"notes"])
        bad += [(line + before, reason, 0) for line, reason, _ in notes["bad"]]
        unread = {**{name: line + before for name, line in notes["unread"].items()}, **unread}
        line = pc.add(part.column("line"), before)
        tables.append(part.replace_schema_metadata(None).set_column(SCHEMA.get_field_index("line"), "line", line))
        before += notes["lines"]
    table = pa.concat_tables(tables).cast(SCHEMA)
    firsts = repeated({"id": np.asarray(table.column("id_mark"))})
    again = np.flatnonzero(firsts != np.arange(len(firsts)))
    if len(again):
        lines = np.asarray(table.column("line"))
        for row in again.tolist():
            bad.append((int(lines[row]), used_twice(table.column("id")[row].as_py()), int(lines[firsts[row]])))
        table = table.filter(pa.array(firsts == np.arange(len(firsts))))
    write_arrow(target, table)
    outside = sum(int(pc.sum(pc.starts_with(table.column(name), "/")).as_py() or 0) for name in PATHS)
    found = {"rows": len(table), "bad": sorted(bad), "unread": unread, "outside": outside}
    return {**found, "twice": twice(Utterances(table, str(path)))}


def write_arrow(place: Path, table: pa.Table) -> None:
    """Writes a table as an Arrow file that is there whole or not at all, in batches of at most ``CHUNK`` rows.

    Raises:
        OSError: it cannot be written.
    """
    part = part_of(place)
    try:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=CHUNK)
        flush(part)
        os.replace(part, place)
    finally:
        remove(part)


def write_part(place: Path, table: pa.Table) -> None:
    """:func:`write_arrow` in a process that can hand over no other error.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_arrow(place, table)
    except OSError as error:
        raise UserError(f"cannot write to the index {place}: {error.strerror or error}") from error


def read_arrow(path: Path) -> pa.Table:
    """Maps the Arrow file ``path``.

    Raises:
        OSError: there is none, or it cannot be mapped.
        ValueError: it is damaged.
    """
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
