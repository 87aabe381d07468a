"""Shares of a command's work, for many hosts that write into one folder: ``--shard 3/16`` does the third of sixteen.

What a shard has done is in a file of its own, ``OUT/shard-3-of-16.jsonl``, which only it writes; ``--merge`` takes all
of them over. A process first takes its own lock and then looks for those of the others, so that of two that must not
run at once (a shard and the whole, or shards of different numbers) at least one sees the other, and ends.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from avsr.errors import UserError
from avsr.runtime.folders import flush
from avsr.runtime.locks import LOCK, claim, hold, refuse_held
from avsr.runtime.rows import Row, Rows, read_rows

Item = TypeVar("Item")

_NAME = re.compile(r"shard-([1-9]\d{0,5})-of-([1-9]\d{0,5})\.jsonl", re.ASCII)
_LISTED = 8  # shards in a message


@dataclass(frozen=True, order=True)
class Share:
    """The ``index``-th of ``count`` shares, from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Reads ``3/16``.

        Raises:
            UserError: it is no such pair.
        """
        match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text, re.ASCII)
        if match is None or int(match[1]) > int(match[2]):
            raise UserError(f"--shard: expected I/N with I from 1 to N, such as 3/16, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def file(self) -> str:
        """The name of the file with what this shard has done."""
        return f"shard-{self.index}-of-{self.count}.jsonl"

    def has(self, key: str) -> bool:
        """Whether the item with this key is of this share. What other items there are does not matter."""
        return owner(key, self.count) == self.index

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``count``-th item, for lists that are the same in all shards and too short to leave to chance."""
        return items[self.index - 1 :: self.count]


def owner(key: str, count: int) -> int:
    """The index of the share of ``count`` that has the item with this key."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) % count + 1


@contextmanager
def claim_share(out: Path, share: Share) -> Iterator[None]:
    """:func:`avsr.runtime.locks.claim` for one shard of the work in ``out``.

    Raises:
        UserError: the same shard, the whole, or shards of another number are running, ``out`` has what such shards have
            done, or it takes no files.
    """
    with claim(out, share.file):
        refuse_held(out)
        _refuse_running(out, [other for other in _found(out, LOCK) if other.count != share.count])
        other = next((other for other in _found(out) if other.count != share.count), None)
        if other is not None:
            advice = f"go on with --shard I/{other.count}, or run the command without --shard once"
            raise UserError(f"{out / other.file} is of {other.count} shards, not of {share.count}: {advice}")
        yield


@contextmanager
def claim_whole(out: Path) -> Iterator[None]:
    """:func:`avsr.runtime.locks.claim` for the whole work in ``out``.

    Raises:
        UserError: another process does it or a shard of it, or ``out`` takes no files.
    """
    with claim(out):
        _refuse_running(out, _found(out, LOCK))
        yield


def gather(out: Path, key: Callable[[Row], Hashable], made_by: Row) -> dict[Share, list[Row]]:
    """The rows of every shard's file in ``out``, of two with one key in a file the later; the files stay.

    Args:
        out: the folder, with :func:`claim_whole`.
        key: of a row; raises KeyError, TypeError or ValueError for what is none, which is left out with a message.
        made_by: what the rows depend on, the same for all shards (see :class:`avsr.runtime.rows.Rows`).

    Raises:
        UserError: shards of different numbers, one that was made by something else, or two with the same key.
    """
    shares = _found(out)
    other = next((share for share in shares if share.count != shares[0].count), None)
    if other is not None:
        advice = "delete those that are not to count"
        raise UserError(f"{out} has {shares[0].file} and {other.file}, shards of different numbers: {advice}")
    rows: dict[Share, list[Row]] = {}
    owners: dict[Hashable, Share] = {}
    for share in shares:
        content = read_rows(out / share.file, lambda row: row["made_by"] if "made_by" in row else hash(key(row)))
        own = {key(row): row for row in content if "made_by" not in row}
        if own and [row["made_by"] for row in content if "made_by" in row] != [made_by]:
            advice = f"delete it and run --shard {share} again"
            raise UserError(f"{out / share.file} was made with other options or by another version: {advice}")
        double = next((name for name in own if name in owners), None)
        if double is not None:
            raise UserError(
                f"{double!r} is both in {out / owners[double].file} and in {share.file}: delete one of them"
            )
        owners |= dict.fromkeys(own, share)
        rows[share] = list(own.values())
    return rows


def take_over(rows: Rows, shared: dict[Share, list[Row]]) -> None:
    """Moves what the shards have done, as :func:`gather` gives it, to ``rows`` in the same folder.

    Raises:
        OSError: a file cannot be written or deleted. After a stop in between another call takes over the same.
    """
    parts = [part for part in shared.values() if part]
    for part in parts:
        rows.add(*part)
    if parts:
        flush(rows.path)
    for share in shared:
        (rows.path.parent / share.file).unlink(missing_ok=True)


def drop_shares(out: Path) -> None:
    """Deletes what shards have done in ``out``, which needs :func:`claim_whole`."""
    for share in _found(out):
        (out / share.file).unlink(missing_ok=True)


def unfinished(out: Path, shared: Iterable[Share], owners: Callable[[int], Iterable[int]]) -> UserError:
    """The refusal of a merge. ``owners(count)`` are the indices of the shards with something left to do."""
    count = next((share.count for share in shared), 0)
    if not count:
        return UserError(
            f"{out} has no shards that could be merged: run the same command with --shard 1/N to N/N first"
        )
    indices = sorted(set(owners(count)))
    listed = ", ".join(f"{index}/{count}" for index in indices[:_LISTED]) + (", ..." if len(indices) > _LISTED else "")
    why = "are missing, unfinished or of other options"
    return UserError(f"{out}: {len(indices)} of {count} shards {why}: run the same command with --shard {listed}")


def _refuse_running(out: Path, shares: Iterable[Share]) -> None:
    """Raises a ``UserError`` that names the process if one of the shards is running; takes the locks of dead ones."""
    for share in shares:
        with hold(out, share.file):
            pass


def _found(out: Path, lock: str = "") -> list[Share]:
    """The shards that have a file in ``out``, or a lock."""
    start = "." if lock else ""
    names = [name.removeprefix(start).removesuffix(lock) for name in os.listdir(out) if name.endswith(lock)]
    return sorted(Share(int(match[1]), int(match[2])) for name in names if (match := _NAME.fullmatch(name)))
