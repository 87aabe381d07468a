"""Rows of results as JSON lines: kept as they come, continued by the next process, and published when all are there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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

    def add(self, *rows: Row) -> None:
        """Keeps rows.

        Raises:
            UserError: the disk is full; the rows before them are kept.
        """
        first = [self._header] if self._fresh and self._header is not None else []
        try:
            append(self.path, as_lines([*first, *rows]))
        except OSError as error:
            reason = error.strerror or str(error)
            kept = "the rows before are kept, the same command goes on"
            raise UserError(f"cannot write {self.path}: {reason}; {kept}") from error
        self._fresh = False
        self.held |= {self._key(row): row for row in rows}

    def publish(self, place: Path, rows: Iterable[Row]) -> None:
        """Writes the final file, which replaces an older one only when it is whole, and deletes this one.

        Raises:
            OSError: it cannot be written; the older one and this one stay.
        """
        write_durably(place, as_lines(rows))
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            logger.warning("%s: its last line was cut short and is dropped: its work is repeated", self.path)
            os.truncate(self.path, end)
        lines = data[:end].split(b"\n")[:-1]
        if self._header is not None and lines:
            found = _parsed(lines[0])
            if found != self._header:
                logger.warning("%s was begun with other settings or data and begins again", self.path)
                os.truncate(self.path, 0)
                return
            lines[0] = b""
        self._fresh = not lines
        self.held = {self._key(row): row for row in _sound(self.path, lines, lambda row: hash(self._key(row)))}


def read_rows(path: Path, check: Callable[[Row], object]) -> list[Row]:
    """The rows of a file, none if it is missing. Lines that a kill or a full disk cut short, and those for which
    ``check`` raises KeyError, TypeError or ValueError, are left out with one message.

    Raises:
        UserError: the file cannot be read.
    """
    if not os.path.isfile(path):
        return []
    try:
        return list(_sound(path, path.read_bytes().split(b"\n"), check))
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


def _sound(path: Path, lines: Iterable[bytes], check: Callable[[Row], object]) -> Iterator[Row]:
    """The rows of ``lines``, of the file ``path``; those that are none are named at the end."""
    damaged = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parsed(line)
        try:
            check(row)
        except (KeyError, TypeError, ValueError):
            damaged.append(number)
        else:
            yield row
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
