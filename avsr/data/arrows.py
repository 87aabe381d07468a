"""Reads cells of Arrow files as Hugging Face datasets write them (the stream format), mapped into memory.

Only the bytes are read: neither ``datasets`` nor its decoders are needed.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from avsr.errors import UserError

INSTALL = "pip install 'flashsink[hf]'"
_OPEN = 64  # files that a process keeps mapped


@dataclass(frozen=True)
class Cell:
    """What a row has in a column of clips: ``data`` are the bytes of a file, inside the map, None if the row has none;
    ``path`` is its name, or where it is; ``changed`` the time (ns) of the Arrow file."""

    data: memoryview | None
    path: str | None
    changed: int


@dataclass(frozen=True)
class Rows:
    """The record batches of a file, and the number of rows up to the end of each."""

    batches: list[Any]
    ends: list[int]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0


def find_cell(path: Path, row: int, column: str) -> Cell | None:
    """A cell of a column of clips; None if the file has no such row or column.

    Raises:
        UserError: the file is damaged, pyarrow is not installed, or the column does not hold bytes of files.
    """
    stat = os.stat(path)
    rows = open_rows(path)
    if not 0 <= row < len(rows):
        return None
    at = bisect_right(rows.ends, row)
    batch = rows.batches[at]
    if column not in batch.schema.names:
        return None
    refuse_other_type(path, batch.schema, column)
    values = batch.column(column).slice(row - (rows.ends[at] - batch.num_rows), 1)
    try:
        values.validate(full=True)  # of this row: a damaged place would lead outside of the map
        if not values.type.num_fields:
            return Cell(_bytes(values), None, stat.st_mtime_ns)
        held = dict(zip([field.name for field in values.type], values.flatten(), strict=True))
        name = held["path"][0].as_py() if "path" in held else None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: row {row} is damaged: {error}") from error
    return Cell(_bytes(held["bytes"]), name, stat.st_mtime_ns)


def open_rows(path: Path) -> Rows:
    """The rows of an Arrow file, mapped.

    Raises:
        UserError: it is missing or damaged, or pyarrow is not installed.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    held = _mapped(str(path), stat.st_size, stat.st_mtime_ns)
    if isinstance(held, str):
        raise UserError(held)
    return held


def refuse_other_type(path: Path | str, schema: Any, column: str) -> None:
    """Raises a ``UserError`` if a column does not hold the bytes of files: structs of ``bytes`` and ``path``, as Audio
    and Video of datasets are stored, or binary."""
    kind = schema.field(column).type
    inner = {field.name: str(field.type) for field in kind} if str(kind).startswith("struct<") else {}
    binary = {"binary", "large_binary"}
    if str(kind) not in binary and (inner.get("bytes") not in binary or inner.get("path", "string") != "string"):
        raise UserError(
            f"{path}: the column {column!r} is of the type {kind}; expected the bytes of sound or video files, as "
            "Audio() and Video() of datasets store them"
        )


def _bytes(values: Any) -> memoryview | None:
    """Of an array of one value."""
    buffer = values[0].as_buffer()
    return None if buffer is None else memoryview(buffer)


@lru_cache(maxsize=_OPEN)
def _mapped(path: str, size: int, changed: int) -> Rows | str:
    """The rows, or why they cannot be read."""
    try:
        import pyarrow
    except ImportError:
        return f"{path}: Arrow files are read with pyarrow, which is not installed: {INSTALL}"
    try:
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)  # forks of this process read too
        batches = list(pyarrow.ipc.open_stream(pyarrow.memory_map(path).read_buffer(), options=options))
        for batch in batches:
            batch.validate()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return f"{path} is damaged, or not an Arrow file as datasets write it: {str(error).splitlines()[0]}"
    return Rows(batches, list(accumulate(batch.num_rows for batch in batches)))
