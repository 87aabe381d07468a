"""Rows of results as JSON lines: kept as they come, continued by the next process, and published when all are there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from avsr.errors import HIDDEN, UserError
from avsr.runtime.folders import append, write_durably

logger = logging.getLogger("avsr")
Row = Mapping[str, Any]


class Rows:
    """The rows of a file by their key; of two with one key the later counts.

    Every row is appended and handed to the system at once, so a process that is killed loses only what it has not
    added. A last line that was cut short is removed with a message when the file is opened. Only one process may write
    (see :func:`avsr.runtime.locks.claim`).

    Args:
        path: the file. It is made with the first row.
        key: of a row; raises KeyError, TypeError or ValueError for what is none, which is left out with a message.
        made_by: what the rows depend on, if they must all be made by the same; it is the first line. A file that was
            begun by something else is begun again, with a message.

    Raises:
        UserError: the file cannot be read, or its end cannot be removed.
    """

    def __init__(self, path: Path, key: Callable[[Row], Hashable], made_by: Row | None = None) -> None:
        self.path = path
        self.held: dict[Hashable, Row] = {}
        self._key = key
        self._header = None if made_by is None else json.loads(as_lines([{"made_by": made_by}]))
        self._fresh = True
        try:
            if path.exists():
                self._read()
        except OSError as error:
            raise UserError(f"cannot continue {path}: {error.strerror or error}") from error

    def add(self, *rows: Row) -> int:
        """Keeps rows and returns the place of the first in the file.

        Raises:
            UserError: the disk is full; the rows before them are kept.
        """
        first = as_lines([self._header]) if self._fresh and self._header is not None else b""
        lines = [as_lines([row]) for row in rows]
        try:
            begin = append(self.path, b"".join([first, *lines]))
        except OSError as error:
            reason = error.strerror or str(error)
            kept = "the rows before are kept, the same command goes on"
            raise UserError(f"cannot write {self.path}: {reason}; {kept}") from error
        self._fresh = False
        place = begin = begin + len(first)
        for row, line in zip(rows, lines, strict=True):
            self._hold(row, place)
            place += len(line)
        return begin

    def publish(self, place: Path, rows: Iterable[Row]) -> None:
        """Writes the final file, which replaces an older one only when it is whole, and deletes this one.

        Raises:
            OSError: it cannot be written; the older one and this one stay.
        """
        write_rows(place, rows)
        self.path.unlink(missing_ok=True)

    def _hold(self, row: Row, begin: int) -> None:
        """Records a row of the file, whose line begins at the byte ``begin``."""
        self.held[self._key(row)] = row

    def _read(self) -> None:
        with self.path.open("rb") as file:
            lines = self._whole_lines(file)
            if self._header is not None:
                _, begun = next(lines, (0, b""))
                if begun and _parsed(begun) != self._header:
                    logger.warning("%s was begun with other settings or data and begins again", self.path)
                    os.truncate(self.path, 0)
                    return
                self._fresh = not begun
                lines = chain([(0, b"")], lines)
            for begin, row in _sound(self.path, lines, lambda row: hash(self._key(row))):
                self._hold(row, begin)

    def _whole_lines(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Every line with its place in the file, from which a last one that was cut short is removed."""
        begin = 0
        for line in file:
            if not line.endswith(b"\n"):
                logger.warning("%s: its last line was cut short and is dropped: its work is repeated", self.path)
                os.truncate(self.path, begin)
                return
            yield begin, line
            begin += len(line)


class StoredRows(Rows):
    """Rows that stay in their file; of each only the hash of its key and its place there are in memory (some 100
    bytes), so there may be millions. ``held`` remains empty."""

    def __init__(self, path: Path, key: Callable[[Row], Hashable], made_by: Row | None = None) -> None:
        self._places: dict[int, int] = {}
        super().__init__(path, key, made_by)

    def __len__(self) -> int:
        return len(self._places)

    def place(self, key: Hashable) -> int | None:
        """Where the file has the last row with this key."""
        place = self._places.get(hash(key))
        same = place is not None and self._key(next(self.read([place]))) == key
        return place if same else None

    def read(self, places: Iterable[int]) -> Iterator[Row]:
        """The rows at these places, one at a time.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place)
                yield json.loads(file.readline())

    def _hold(self, row: Row, begin: int) -> None:
        self._places[hash(self._key(row))] = begin


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a whole file of rows, one at a time, so they need not fit into memory.

    Raises:
        OSError: it cannot be written; an older one stays.
    """
    write_durably(path, (as_lines([row]) for row in rows))


def read_rows(path: Path, check: Callable[[Row], object]) -> list[Row]:
    """The rows of a file, none if it is missing. Lines that a kill or a full disk cut short, and those for which
    ``check`` raises KeyError, TypeError or ValueError, are left out with one message.

    Raises:
        UserError: the file cannot be read.
    """
    if not os.path.isfile(path):
        return []
    try:
        with path.open("rb") as file:
            return [row for _, row in _sound(path, ((0, line) for line in file), check)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def append_row(path: Path, row: Row) -> None:
    """Appends a row, on a line of its own even if the last one was cut short.

    Raises:
        OSError: nothing was appended.
    """
    append(path, (b"" if _ended(path) else b"\n") + as_lines([row]))


def as_lines(rows: Iterable[Row]) -> bytes:
    """One JSON object per line. Characters that would act on a terminal are escaped, and so are the bytes of file names
    that are not UTF-8."""
    lines = (HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(row, ensure_ascii=False)) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


def _sound(path: Path, lines: Iterable[tuple[int, bytes]], check: Callable[[Row], object]) -> Iterator[tuple[int, Row]]:
    """The rows of ``lines``, of the file ``path``, each with its place; lines that are none are named at the end."""
    damaged = []
    for number, (begin, line) in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parsed(line)
        try:
            check(row)
        except (KeyError, TypeError, ValueError):
            damaged.append(number)
        else:
            yield begin, row
    if damaged:
        logger.warning("%s: line %d is no row, left out (%d in all)", path, damaged[0], len(damaged))


def _ended(path: Path) -> bool:
    """Whether the last line of a file is whole, as that of an empty one or of none."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
