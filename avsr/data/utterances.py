"""The rows of a manifest as columns of an Arrow table, which ranks and loader processes map from one file and share."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
import pyarrow as pa

from avsr.data.manifest import Line, Utterance
from avsr.data.marks import CLIPS, marks_of, repeated

CHUNK = 65_536  # rows that are in memory at once where columns are worked on
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "audio", "text")),
        ("duration", pa.float64()),
        *((name, pa.string()) for name in ("speaker", "video", "sha256", "times")),
        ("offset", pa.float64()),
        ("line", pa.int64()),  # number in the manifest
        *((name, pa.uint64()) for name in ("id_mark", "text_mark", *CLIPS)),  # see avsr.data.marks
    ]
)
_OWN = SCHEMA.names[: SCHEMA.get_field_index("line") + 1]  # what an utterance is made of
PATHS = ("audio", "video", "times")


class _Column:
    """A column by row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = column.chunks
        self._ends = list(accumulate(len(chunk) for chunk in self._chunks))

    def __getitem__(self, row: int) -> Any:
        number = bisect_right(self._ends, row)
        return self._chunks[number][row - (self._ends[number - 1] if number else 0)].as_py()


class Utterances(Sequence[Utterance]):
    """Utterances by number, each made when it is asked for.

    Args:
        table: columns of ``SCHEMA``; ``PATHS`` are relative to ``root`` or absolute.
        manifest: the manifest's path, for messages.
        root: the folder that its paths begin in.
        twice: what :func:`twice` returns for them, if it is known.
        rows: numbers of those rows of the table that are meant, in order, a range or (N,) int64; None = all.
    """

    def __init__(
        self,
        table: pa.Table,
        manifest: str,
        root: str = "",
        twice: tuple[int, str, str] | None = None,
        rows: range | np.ndarray[Any, Any] | None = None,
    ) -> None:
        self.table, self.manifest, self.root, self.twice = table, manifest, root, twice
        self._rows = range(len(table)) if rows is None else rows
        self._columns = [_Column(table.column(name)) for name in _OWN]
        self._stamps: tuple[_Column | None, _Column | None] = (None, None)

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Line]], manifest: str, root: str = "") -> Utterances:
        """Of lines with their numbers; with ``root``, paths below it become relative."""
        prefix = os.path.join(root, "") if root else ""
        columns = [
            list(column) for column in zip(*((*line, number, *marks_of(line)) for number, line in rows), strict=True)
        ]
        for place in map(SCHEMA.get_field_index, PATHS if columns and prefix else ()):
            paths = columns[place]
            columns[place] = ["." if path == root else path and path.removeprefix(prefix) for path in paths]
        return cls(pa.table(columns, schema=SCHEMA) if columns else SCHEMA.empty_table(), manifest, root)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> np.ndarray[Any, Any]:
        """(N,) int64 numbers of the rows in the table."""
        return np.asarray(self._rows)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> Utterances: ...
    def __getitem__(self, index: int | slice) -> Utterance | Utterances:
        if isinstance(index, slice):
            return self if index in (slice(None), slice(0, None)) else self._part(self._rows[index])
        row = int(self._rows[index])
        values = {name: column[row] for name, column in zip(_OWN, self._columns, strict=True)}
        line = values.pop("line")
        values |= {name: os.path.join(self.root, values[name]) for name in PATHS if values[name] is not None}
        audio, video = (None if column is None else column[row] for column in self._stamps)
        return Line(**values).utterance(f"{self.manifest}:{line}", (audio, video))

    def select(self, places: np.ndarray[Any, Any]) -> Utterances:
        """Those at ``places`` (M,) int64 of these, in that order."""
        return self._part(self.rows[places])

    def know(self, stamps: Mapping[str, pa.ChunkedArray]) -> None:
        """Gives utterances the stamps of their files: a column for every row of the table, by "audio" and "video"."""
        audio, video = stamps.get("audio"), stamps.get("video")
        self._stamps = None if audio is None else _Column(audio), None if video is None else _Column(video)

    def _part(self, rows: range | np.ndarray[Any, Any]) -> Utterances:
        part = Utterances(self.table, self.manifest, self.root, rows=rows)
        part._stamps = self._stamps
        return part

    def where(self, place: int) -> str:
        """ "manifest:line" of one, for messages."""
        return self[place].where

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of ``SCHEMA``."""
        whole = self.table.column(name)
        if isinstance(self._rows, range) and self._rows.step == 1:
            return whole.slice(self._rows.start, len(self))
        return whole.take(pa.array(self.rows))

    def numbers(self, name: str) -> np.ndarray[Any, Any]:
        """(N,) values of a column of numbers, NaN where there is none."""
        return np.asarray(self.column(name).to_numpy())


def twice(utterances: Utterances) -> tuple[int, str, str]:
    """The number of utterances that hold the same clip as one before, and the ids of the first such two."""
    first = repeated({column: utterances.numbers(column) for column in CLIPS})
    again = np.flatnonzero(first != np.arange(len(first)))
    if not len(again):
        return 0, "", ""
    second = int(again[0])
    return len(again), utterances[int(first[second])].id, utterances[second].id
