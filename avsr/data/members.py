"""Clips inside containers, named by virtual paths.

``shards/000012.tar/spk1/utt3.flac`` is that member of a tar file, and ``data-00000-of-00002.arrow/17/audio`` the column
``audio`` of row 17 of an Arrow file of Hugging Face datasets: bytes, or the path of a file, absolute or relative to the
Arrow file's folder. Nothing is extracted, and any clip is read without those before it. A path that names nothing in a
container is that of a missing file. ``avsr.data.tars`` and ``avsr.data.arrows`` find the bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from avsr.data.arrows import find_cell
from avsr.data.tars import find_member

_WHOLE = 2**20  # bytes of a member that is read at once
_BUFFER = 2**18  # bytes read at a time of a larger one


@dataclass(frozen=True)
class Member:
    """Bytes inside a container.

    Attributes:
        path: the virtual path.
        suffix: that of a file with these bytes, in small letters; "" if the container does not tell.
        size: their number.
        stamp: changes when they do.
        read: (place from their begin, number) to bytes; fewer at their end alone.
    """

    path: Path
    suffix: str
    size: int
    stamp: str
    read: Callable[[int, int], bytes]

    def open(self) -> BinaryIO:
        """A seekable stream of the bytes; small ones are read at once."""
        if self.size <= _WHOLE:
            return _Held(self.read(0, self.size), str(self.path))
        return cast(BinaryIO, io.BufferedReader(_Part(self), _BUFFER))


def located(path: Path) -> Path | Member:
    """What a path names: a member of a container, or a file, which may be missing.

    Raises:
        UserError: the container is damaged, or not of a kind that is read.
    """
    text = str(path)
    for kind, find in (".tar/", _in_tar), (".arrow/", _in_arrow):
        end = text.find(kind)
        while end >= 0:
            container, inside = Path(text[: end + len(kind) - 1]), text[end + len(kind) :]
            if os.path.isfile(container):
                return find(path, container, inside)
            end = text.find(kind, end + 1)
    return path


def is_file(path: Path) -> bool:
    """Whether there is a file or a member of this name. Raises a ``UserError`` as :func:`located`."""
    found = located(path)
    return isinstance(found, Member) or os.path.isfile(found)


def open_media(path: Path) -> BinaryIO:
    """Opens a file or a member for reading.

    Raises:
        OSError: there is none.
        UserError: as :func:`located`.
    """
    found = located(path)
    return found.open() if isinstance(found, Member) else found.open("rb")


def readable(path: Path) -> str | BinaryIO:
    """What decoders take: the name of a file, or an open member. Raises a ``UserError`` as :func:`located`."""
    found = located(path)
    return found.open() if isinstance(found, Member) else str(found)


def read_text(path: Path) -> str:
    """The UTF-8 text of a file or a member, without a byte order mark.

    Raises:
        OSError: there is none.
        ValueError: it is not UTF-8.
        UserError: as :func:`located`.
    """
    with open_media(path) as file:
        return file.read().decode("utf-8-sig")


def stamp(path: Path) -> str:
    """Changes when the file or member does: size and time of a file, place and size of a member and its container's
    time.

    Raises:
        OSError: there is none.
        UserError: as :func:`located`.
    """
    found = located(path)
    if isinstance(found, Member):
        return found.stamp
    stat = os.stat(found)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def suffix_of(path: Path) -> str:
    """As ``path.suffix`` in small letters, of the bytes: that of ``x.arrow/17/audio`` is in its row.

    Raises:
        UserError: as :func:`located`.
    """
    found = located(path)
    return found.suffix if isinstance(found, Member) else found.suffix.lower()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file or a member as hexadecimal digits.

    Raises:
        OSError: there is none.
        UserError: as :func:`located`.
    """
    with open_media(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def _in_tar(path: Path, container: Path, name: str) -> Path | Member:
    found = find_member(container, name)
    if found is None:
        return path
    return Member(path, path.suffix.lower(), found.size, f"{found.offset} {found.size} {found.changed}", found.read)


def _in_arrow(path: Path, container: Path, inside: str) -> Path | Member:
    row, _, column = inside.partition("/")
    found = find_cell(container, int(row), column) if row.isdecimal() and len(row) < 19 else None
    if found is None:
        return path
    name = found.path or ""
    if "\0" in name:
        return path
    if found.data is None:
        return container.parent / name if name else path  # an absolute name stays
    data, suffix = found.data, os.path.splitext(name)[1].lower()
    mark = f"{len(data)} {found.changed}"
    return Member(path, suffix, len(data), mark, lambda place, count: bytes(data[place : place + count]))


class _Held(io.BytesIO):
    """Bytes with the name by which decoders guess their format."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


class _Part(io.RawIOBase):
    """A member that is read as it is needed."""

    def __init__(self, member: Member) -> None:
        self.name = str(member.path)
        self._member, self._place = member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._member.size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as view:
            data = self._member.read(self._place, len(view))
            view[: len(data)] = data
        self._place += len(data)
        return len(data)
