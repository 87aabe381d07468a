"""Lengths of all clips of a manifest, measured once by many processes and kept in its index.

Of each signal, sound or video, ``measured-SUM-SIGNAL.arrow`` has a row for each of the manifest's rows: its length, why
it cannot be used, and a stamp of its file, by which changed files are found.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from avsr.data.clip import load_clip
from avsr.data.index import Index, make_index, open_manifest, read_arrow, write_arrow, write_part
from avsr.data.manifest import Utterance
from avsr.data.measured import refuse_other_content
from avsr.data.members import stamp
from avsr.data.utterances import SCHEMA
from avsr.errors import UserError
from avsr.runtime.folders import remove
from avsr.runtime.locks import hold
from avsr.runtime.pool import Lost, run_jobs
from avsr.runtime.progress import ProgressBar
from avsr.runtime.share import Share

logger = logging.getLogger("avsr")
Numbers = np.ndarray[Any, Any]
SIGNALS = ("audio", "video")
RANGE = 512  # rows that a process measures at once: what a kill can lose
MEASURED = pa.schema(
    [
        ("length", pa.int64()),  # samples at 16 kHz or frames at 25 fps; -1 = there is no such file
        ("reason", pa.string()),  # why it cannot be used; null = it can
        ("stamp", pa.string()),  # changes when the file does; "" = there is none
    ]
)


def measured(index: Index | None, signals: Iterable[str]) -> dict[str, pa.Table] | None:
    """What was measured of ``signals``; None unless all of it is there."""
    found = {signal: _measured(index, signal) for signal in signals}
    whole = {signal: table for signal, table in found.items() if table is not None}
    return whole if len(whole) == len(found) else None


def stamps(index: Index | None) -> dict[str, pa.ChunkedArray]:
    """The stamps of the files of all rows, of those signals that were measured."""
    found = {signal: _measured(index, signal) for signal in SIGNALS}
    return {signal: table.column("stamp") for signal, table in found.items() if table is not None}


def state_of(index: Index | None) -> str:
    """Names a manifest's content and what was measured of it; "" unless all of its signals were."""
    if index is None:
        return ""
    paths = [_place(index, signal) for signal in SIGNALS if index.table.column(signal).null_count < len(index.table)]
    try:
        return f"{index.sum} {[stamp(path) for path in paths]}"
    except OSError:
        return ""


def _measured(index: Index | None, signal: str) -> pa.Table | None:
    if index is None or not (path := _place(index, signal)).is_file():
        return None
    try:
        table = read_arrow(path)
        if table.schema != MEASURED or len(table) != len(index.table):
            raise ValueError("rows are missing")
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged, its clips are measured again: %s", path, error)
        return None
    return table


def measure(manifest: Path, signal: str, *, workers: int = 0, share: Share | None = None) -> None:
    """Measures the clips of a manifest whose files have changed since, or that have never been measured; what a killed
    process has measured stays.

    Args:
        manifest: the manifest; gets an index if it has none.
        signal: "audio" or "video".
        workers: processes; 0 = one for each CPU.
        share: of the work; None = all of it. The process that finds what all shares have measured joins it.

    Raises:
        UserError: the index cannot be written.
    """
    index = make_index(manifest)
    rows = len(index.table)
    folder = index.folder / f"parts-{index.sum}-{signal}"
    try:
        folder.mkdir(exist_ok=True)
        jobs = [
            _Job(str(manifest), index.sum, signal, first, min(first + RANGE, rows), str(folder / f"{first:09d}.arrow"))
            for first in range(0, rows, RANGE)
        ]
        own = jobs if share is None else list(share.of(jobs))
        _run(own, workers, f"measure {signal}")
        with hold(index.folder, f"measured-{signal}", wait=True):
            if all(os.path.exists(job.part) for job in jobs):
                table = pa.concat_tables([read_arrow(Path(job.part)) for job in jobs])
                write_arrow(_place(index, signal), table.combine_chunks())
                remove(folder)
    except OSError as error:
        raise UserError(f"cannot write to the index of {manifest}: {error}") from error


class _Job(NamedTuple):
    manifest: str
    sum: str  # of the manifest's content
    signal: str
    first: int
    end: int
    part: str


def _run(jobs: list[_Job], workers: int, title: str) -> None:
    with ProgressBar(title, len(jobs)) as bar:
        for job, result in run_jobs(_measure, jobs, workers if len(jobs) > 1 else 1):
            if isinstance(result, Lost):  # a file can crash the decoder that reads it
                _measure_alone(job)
            bar.advance()


def _measure_alone(job: _Job) -> None:
    """Measures every row in a process of its own, and names those that end it."""
    tables = []
    for first in range(job.first, job.end):
        alone = job._replace(first=first, end=first + 1, part=f"{job.part}.alone")
        ((_, result),) = run_jobs(_measure, [alone], 1, fresh=True)
        if isinstance(result, Lost):
            row = {"length": 0, "reason": f"the process that read it {result.reason}", "stamp": ""}
            tables.append(pa.Table.from_pylist([row], schema=MEASURED))
        else:
            tables.append(read_arrow(Path(alone.part)))
    write_arrow(Path(job.part), pa.concat_tables(tables).combine_chunks())
    remove(Path(f"{job.part}.alone"))


def _measure(job: _Job) -> None:
    found = open_manifest(job.manifest, absolute=True, quiet=True)
    index, utterances = found.index, found.utterances[job.first : job.end]
    if index is None or index.sum != job.sum:
        raise UserError(f"{job.manifest} has changed while its clips were measured: start again")
    held = _left(job) or _held(index, job.signal, range(job.first, job.end))
    rows = [measure_row(utterance, job.signal, before) for utterance, before in zip(utterances, held, strict=True)]
    # another share may have joined what a stopped process had left, and cleared the folder
    Path(job.part).parent.mkdir(exist_ok=True)
    write_part(Path(job.part), pa.Table.from_pylist(rows, schema=MEASURED))


def _left(job: _Job) -> list[dict[str, Any]]:
    """What a process that was stopped has measured; its files may have changed since. Empty if there is nothing."""
    try:
        table = read_arrow(Path(job.part))
    except (OSError, ValueError):
        return []
    return list(table.to_pylist()) if table.schema == MEASURED and len(table) == job.end - job.first else []


def _held(index: Index, signal: str, rows: range) -> Sequence[dict[str, Any] | None]:
    """What was measured of these rows before, for this content of the manifest or the one before it."""
    table = _measured(index, signal)
    if table is not None:
        return list(table.slice(rows.start, len(rows)).to_pylist())
    marks, places, older = _before(index.folder, index.previous, signal)
    own = _marks(index.table.slice(rows.start, len(rows)), signal)
    found = np.searchsorted(marks, own).clip(max=max(len(marks) - 1, 0))
    return [
        older.slice(int(places[number]), 1).to_pylist()[0] if len(marks) and marks[number] == mark else None
        for number, mark in zip(found, own, strict=True)
    ]


@lru_cache(maxsize=2)
def _before(folder: Path, previous: str, signal: str) -> tuple[Numbers, Numbers, pa.Table]:
    """The marks of an older content's clips in order, their rows, and what was measured of them."""
    try:
        table = read_arrow(folder / f"rows-{previous}.arrow")
        older = read_arrow(folder / f"measured-{previous}-{signal}.arrow")
        if table.schema != SCHEMA or older.schema != MEASURED or len(table) != len(older):
            raise ValueError("rows are missing")
    except (OSError, ValueError):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), MEASURED.empty_table()
    marks = _marks(table, signal)
    order = np.argsort(marks, kind="stable")
    return marks[order], order, older


def _marks(table: pa.Table, signal: str) -> Numbers:
    """(N,) marks of the files that a signal is read from."""
    video = np.asarray(table.column("video_mark"))
    audio = np.asarray(table.column("audio_mark"))
    files = video if signal == "video" else np.where(audio == 0, video, audio)
    return files ^ np.asarray(table.column("sum_mark"))  # a reason may be that the line's sha256 is of another file


def measure_row(utterance: Utterance, signal: str, held: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A row of ``MEASURED`` for an utterance: ``held`` if its file has not changed since that was measured."""
    path = utterance.video if signal == "video" else utterance.audio or utterance.video
    if path is None:
        return {"length": -1, "reason": None, "stamp": ""}
    state = _stamp(path)
    if held is not None and held["stamp"] == state:
        return held
    try:
        clip = load_clip(utterance, frozenset({signal}), 0.0)
        refuse_other_content(utterance, {signal})
        return {"length": clip.samples if signal == "audio" else clip.video_frames, "stamp": state}
    except UserError as error:
        return {"length": 0, "reason": str(error).removeprefix(f"{utterance.where}: "), "stamp": state}


def _stamp(path: Path) -> str:
    try:
        return stamp(path)
    except (OSError, UserError):  # of a container that is damaged
        return ""


def _place(index: Index, signal: str) -> Path:
    return index.file(f"measured-{{}}-{signal}.arrow")
