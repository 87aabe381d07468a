"""Where the clips of a feature cache are: the index of its shards.

A shard is a safetensors file with a float16 tensor (frames, width) for each of some hundred clips, named KEY.CHECKSUM:
32 hexadecimal digits of the clip's key, and the CRC-32 of both. It is written once and never changed. An empty
file ``SHARD.KEY.damaged`` beside it says that a reader found this clip damaged.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from avsr.runtime.folders import write_flushed

Array = np.ndarray[Any, Any]
Damaged = Callable[[Path, str], None]  # told the path of a damaged file and what is wrong with it
SHARD, MARK = ".safetensors", ".damaged"
_LONGEST = 2**22  # bytes of a header
_NO_SHARD = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class Place(NamedTuple):
    """Where a clip is: the name of its shard, its first byte there, frames, :func:`checksum`."""

    shard: str
    offset: int
    frames: int
    checksum: int


@dataclass(frozen=True)
class Index:
    """Clips by their keys.

    Attributes:
        names: of the shards and the marks of damage, sorted.
        keys: (clips,) of 16 bytes, sorted.
        places: (clips, 4) int64: as :class:`Place`, with the position in ``names`` as the shard.
    """

    names: list[str]
    keys: Array
    places: Array

    def rows(self, keys: Sequence[str]) -> Array:
        """(len(keys),) int64 rows of the clips, -1 of those that are not there."""
        wanted = np.array([bytes.fromhex(key[:32]) for key in keys], "S16")
        if not len(self.keys):
            return np.full(len(wanted), -1)
        rows = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[rows] == wanted, rows, -1)

    def place(self, key: str) -> Place | None:
        (row,) = self.rows([key])
        if row < 0:
            return None
        number, *rest = self.places[row].tolist()
        return Place(self.names[number], *rest)


EMPTY = Index([], np.zeros(0, "S16"), np.zeros((0, 4), np.int64))


def read_index(path: Path, damaged: Damaged) -> Index:
    """What :func:`write_index` wrote; empty if it is missing or damaged."""
    try:
        with safe_open(str(path), "np") as file:
            metadata, keys, places = file.metadata(), file.get_tensor("keys"), file.get_tensor("places")
        if metadata["checksum"] != _checksum(metadata["names"], keys, places):
            raise ValueError("a checksum is wrong")
        shapes = (keys.shape, keys.dtype, places.shape, places.dtype)
        if shapes != ((len(keys), 16), np.uint8, (len(keys), 4), np.int64):
            raise ValueError(f"{shapes} is no index")
        return Index(json.loads(metadata["names"]), keys.view("S16").reshape(-1), places)
    except FileNotFoundError:
        return EMPTY
    except (OSError, SafetensorError, *_NO_SHARD) as error:
        damaged(path, str(error))
        return EMPTY


def write_index(path: Path, index: Index) -> None:
    """Raises an OSError if it cannot be written."""
    keys = index.keys.view(np.uint8).reshape(-1, 16)
    names = json.dumps(index.names)
    metadata = {"names": names, "checksum": _checksum(names, keys, index.places)}
    write_flushed(path, save({"keys": keys, "places": index.places}, metadata))


def checksum(key: str, data: bytes | bytearray | memoryview) -> int:
    """CRC-32 of 32 digits of a clip's key and of the bytes of its features."""
    return zlib.crc32(data, zlib.crc32(key[:32].encode()))


def merge(old: Index, names: list[str], folder: Path, width: int, damaged: Damaged) -> Index:
    """``old`` without the shards that are not in ``names``, with those that are new there. Of those with a new mark it
    has the clips whose checksums are right.

    Args:
        old: what is known; its shards are not opened again.
        names: of shards and marks, sorted.
        folder: holds the shards.
        width: of the features.
        damaged: told of the first shard that is gone, and of damaged ones.
    """
    there, before = set(names), set(old.names)
    gone = sorted(name for name in before - there if name.endswith(SHARD))
    if gone:
        damaged(folder / gone[0], "it is gone")
    marked = {f"{name.partition(SHARD)[0]}{SHARD}" for name in there - before if name.endswith(MARK)}
    stay = (there & before) - marked
    numbers = {name: number for number, name in enumerate(names)}
    places = old.places.copy()
    places[:, 0] = np.array([numbers[n] if n in stay else -1 for n in old.names], np.int64)[places[:, 0]]
    kept = places[:, 0] >= 0
    keys, rows = [old.keys[kept]], [places[kept]]
    for name in names:
        if name.endswith(SHARD) and name not in stay:
            found = _read_shard(folder / name, width, name in marked, damaged)
            keys.append(np.array([bytes.fromhex(key) for key in found], "S16"))
            rows.append(np.array([(numbers[name], *place) for place in found.values()], np.int64).reshape(-1, 4))
    every = np.concatenate(keys)
    order = np.argsort(every, kind="stable")
    return Index(names, every[order], np.concatenate(rows)[order])


def read_header(file: BinaryIO, width: int) -> dict[str, tuple[int, int, int]]:
    """By 32 digits of their keys, the first byte, the frames and the checksum of the clips in a shard.

    Raises:
        ValueError: it is none, or one of the other errors in :data:`_NO_SHARD`.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _LONGEST:
        raise ValueError(f"its header has {length} bytes")
    found = {}
    for name, entry in json.loads(file.read(length)).items():
        key, _, digits = name.partition(".")
        (frames, wide), (begin, end) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F16" or wide != width or not 0 < 2 * frames * width == end - begin or begin < 0:
            raise ValueError(f"{entry}, expected F16 (frames, {width})")
        if len(bytes.fromhex(key)) != 16 or len(digits) != 8:
            raise ValueError(f"{name!r} is no key with a checksum")
        found[key] = 8 + length + int(begin), int(frames), int(digits, 16)
    return found


def _read_shard(path: Path, width: int, marked: bool, damaged: Damaged) -> dict[str, tuple[int, int, int]]:
    """The clips that a shard has whole; if it is ``marked`` those whose checksums are right."""
    try:
        with path.open("rb") as file:
            found = read_header(file, width)
            size = os.fstat(file.fileno()).st_size
            whole = {key: row for key, row in found.items() if row[0] + 2 * row[1] * width <= size}
            if len(whole) < len(found):
                damaged(path, "it is cut short")
            return {key: row for key, row in whole.items() if not marked or _sound(file, width, key, *row)}
    except (OSError, *_NO_SHARD) as error:
        damaged(path, f"{type(error).__name__}: {error}")
        return {}


def _sound(file: BinaryIO, width: int, key: str, offset: int, frames: int, expected: int) -> bool:
    file.seek(offset)
    return checksum(key, file.read(2 * frames * width)) == expected


def _checksum(names: str, keys: Array, places: Array) -> str:
    return f"{zlib.crc32(places.data, zlib.crc32(keys.data, zlib.crc32(names.encode()))):08x}"
