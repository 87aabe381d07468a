"""Finds files inside tar files by an index, which is made once and kept beside the tar as ``NAME.tar.index``.

Without it, every process that opens a tar reads the headers of all members: thousands of small reads, which take long
on a network file system. The index is an array as ``numpy.save`` writes it, uint64 of shape (3, members + 1): by
column the BLAKE2b of a member's name (64 bits, in order), its place and its size; the last column is a checksum of all
others, and the time (ns) and size of the tar. One that does not fit the tar is made again.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from avsr.errors import UserError
from avsr.runtime.folders import write_flushed

INDEX = ".index"  # after the name of a tar
_VERSION = b"1"
_OPEN = 256  # tar files that a process keeps open
_END = bytes(512)  # every tar ends with two of these
Index = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Found:
    """A member: its place and size in bytes, and the time (ns) of its tar."""

    file: BinaryIO
    offset: int
    size: int
    changed: int

    def read(self, place: int, count: int) -> bytes:
        """At most ``count`` bytes from ``place`` on, whatever other threads and forks read."""
        return os.pread(self.file.fileno(), max(0, min(count, self.size - place)), self.offset + place)


def find_member(path: Path, name: str) -> Found | None:
    """A member of the tar ``path`` by its name; None if there is none. Of several with one name it is the last.

    Raises:
        UserError: as :func:`scan`.
    """
    stat = os.stat(path)
    held = _opened(str(path), stat.st_size, stat.st_mtime_ns)
    if isinstance(held, str):
        raise UserError(held)
    file, index = held
    key, keys = np.uint64(_key(name)), index[0, :-1]
    at = int(np.searchsorted(keys, key))
    if at == len(keys) or keys[at] != key:
        return None
    return Found(file, int(index[1, at]), int(index[2, at]), stat.st_mtime_ns)


def scan(path: Path) -> dict[str, tuple[int, int]]:
    """(place, size) in bytes of the regular files in a tar by their names, in its order; reads all headers.

    Raises:
        UserError: it is missing, truncated, damaged or compressed, or has a sparse member; the message names it.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                name = _plain(info.name)
                if info.size < 0 or info.offset_data < info.offset:
                    raise tarfile.ReadError(f"the header at byte {info.offset} is damaged")
                if info.issparse():
                    raise UserError(f"{path}: its member {name} is sparse, which is not read: pack it again")
                if info.islnk() and _plain(info.linkname) in found:
                    found[name] = found[_plain(info.linkname)]
                elif info.isreg():
                    found[name] = info.offset_data, info.size
            file.seek(tar.offset)
            if file.read(len(_END)) != _END:  # tarfile ends silently at a header that is none
                raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset}")
    except tarfile.CompressionError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is truncated, damaged or not a plain tar (a compressed one has to be unpacked): {error}"
        ) from error
    return found


def write_index(path: Path, members: dict[str, tuple[int, int]]) -> Index:
    """Makes the index of the tar ``path`` of what :func:`scan` returned, and keeps it beside the tar if that folder
    takes files."""
    stat = os.stat(path)
    by_key = {_key(name): place for name, place in members.items()}
    if len(by_key) < len(members):  # of 100,000 names two have one hash once in 10^9 tars
        raise UserError(f"{path}: two of its members cannot be told apart: pack it again under other names")
    index: Index = np.zeros((3, len(by_key) + 1), np.uint64)
    for column, key in enumerate(sorted(by_key)):
        index[:, column] = key, *by_key[key]
    index[:, -1] = 0, stat.st_mtime_ns, stat.st_size
    index[0, -1] = _checksum(index)
    content = io.BytesIO()
    np.save(content, index, allow_pickle=False)
    with suppress(OSError):
        write_flushed(path.with_name(path.name + INDEX), content.getvalue())
    return index


@lru_cache(maxsize=_OPEN)
def _opened(path: str, size: int, changed: int) -> tuple[BinaryIO, Index] | str:
    """The tar and its index, or why it cannot be read: its many clips are not to scan it again."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed when it leaves the cache and nobody reads it)
        index = _read_index(Path(path), size, changed)
        return file, write_index(Path(path), scan(Path(path))) if index is None else index
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"


def _read_index(path: Path, size: int, changed: int) -> Index | None:
    """None if there is none, or it is damaged or of another tar."""
    try:
        index = np.load(path.with_name(path.name + INDEX), allow_pickle=False)
        whole = index.dtype == np.uint64 and index.ndim == 2 and len(index) == 3 and index.shape[1] > 0
        if whole and tuple(map(int, index[:, -1])) == (_checksum(index), changed, size):
            return index
    except Exception:  # numpy raises what it likes for a damaged header
        return None
    return None


def _checksum(index: Index) -> int:
    body = np.delete(index.reshape(-1), index.shape[1] - 1)  # all but the checksum itself
    return int.from_bytes(hashlib.blake2b(_VERSION + body.tobytes(), digest_size=8).digest(), "little")


def _plain(name: str) -> str:
    """A member's name as a path has it below that of the tar."""
    return posixpath.normpath(name).lstrip("/")


def _key(name: str) -> int:
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
