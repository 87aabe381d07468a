"""Features of one frozen encoder on disk: a few thousand shards instead of one file for every clip.

``shards`` holds them (see ``avsr.data.feature_index``). ``index.safetensors`` says where every clip is; it is brought
up to date when ``shards`` holds other names. A clip may also be alone in ``ab/cd....npy``: so were all of them before
there were shards, and so is one that is computed again while a training reads.

Shards are read, not mapped: a mapped file that gets shorter, or whose network file system fails, ends the process.
"""

from __future__ import annotations

import io
import os
import resource
import secrets
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors.numpy import save

from avsr.data.feature_index import (
    MARK,
    SHARD,
    Array,
    Damaged,
    Index,
    Place,
    checksum,
    merge,
    read_header,
    read_index,
    write_index,
)
from avsr.errors import UserError
from avsr.runtime.folders import drop_dead_parts, write_flushed

DIGITS = 34  # hexadecimal ones of a key
# a shard is written when it has so many clips, bytes, or seconds of work: a kill loses no more, memory holds no more
_CLIPS, _BYTES, _SECONDS = 512, 2**27, 60.0
_OPEN = 4096  # shards, but no more than an eighth of the files that the process may open


class FeatureCache:
    """Features by keys of :data:`DIGITS` hexadecimal digits.

    Any number of processes may use one folder at once: each writes shards of its own, and of two with the same clip
    either is right.

    Args:
        folder: made if it is missing.
        width: of the features.
        damaged: told of damaged files. Their clips count as not there.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, width: int, damaged: Damaged) -> None:
        self._folder, self._shards, self._width, self._damaged = folder, folder / "shards", width, damaged
        self._index: Index | None = None
        self._sent: Index | None = None  # to the other ranks
        self._written: list[str] = []  # shards of this process
        self._fresh: dict[str, Place] = {}  # their clips that the index may not have yet
        self._pending: dict[str, Array] = {}
        self._begun, self._size = 0.0, 0  # when the first of ``_pending`` came, bytes of all
        self._open: dict[str, int] = {}  # handles of shards, the last used last
        self._marked: set[str] = set()
        weakref.finalize(self, _close, self._open)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache: cannot write to {folder.parent}: {error}") from error

    def refresh(self) -> None:
        """Learns what the folder holds by now. In a training every rank must call it at the same time: rank 0 reads,
        and the others receive.

        Raises:
            UserError: the folder cannot be read.
        """
        together = dist.is_initialized() and dist.get_world_size() > 1
        written = [self._written] * (dist.get_world_size() if together else 1)
        if together:  # a network file system may list new files of other hosts a minute late
            dist.all_gather_object(written, self._written)
        found: list[Any] = [None, ""]
        if not together or dist.get_rank() == 0:
            try:
                index = self._updated([name for part in written for name in part])
                found[0] = None if index is self._sent else index
            except UserError as error:
                found[1] = str(error)
        if together:
            dist.broadcast_object_list(found, src=0)
        if found[1]:
            raise UserError(found[1])
        if found[0] is not None:
            self._index = self._sent = found[0]
        self._fresh.clear()  # the index has them

    @property
    def names(self) -> list[str]:
        """Of the shards and marks of damage that the folder holds, as far as is known."""
        return self._known.names

    def find(self, keys: Sequence[str]) -> Array:
        """(len(keys),) bool: which clips are there. Opens no file of any."""
        found: Array = self._known.rows(keys) >= 0
        for number in np.flatnonzero(~found):
            key = keys[number]
            found[number] = key in self._pending or key[:32] in self._fresh or self._alone(key).is_file()
        return found

    def frames(self, key: str) -> int:
        """Length of a clip; 0 if it is not there."""
        place = self._place(key)
        if place is not None:
            return place.frames
        held = self._read_alone(key, shape_alone=True)
        return 0 if held is None else len(held)

    def read(self, key: str) -> Array | None:
        """The (frames, width) float16 features of a clip, which the caller may change; None if it is not there."""
        place = self._place(key)
        if place is None:
            return self._read_alone(key)
        try:
            data = self._bytes(place)
            problem = "" if checksum(key, data) == place.checksum else "a checksum is wrong"
        except OSError as error:
            problem = error.strerror or str(error)
        if not problem:
            return np.frombuffer(data, np.float16).reshape(place.frames, self._width)
        self._mark(place.shard, key, problem)
        return self._read_alone(key)

    def where(self, key: str) -> Path:
        """The file that holds a clip, or would if it were there."""
        place = self._place(key)
        return self._alone(key) if place is None else self._shards / place.shard

    def add(self, key: str, features: Array) -> None:
        """Puts a clip's (frames, width) float16 features in a shard, which is written when it is full.

        Raises:
            UserError: it cannot be written.
        """
        if not self._pending:
            self._begun, self._size = time.monotonic(), 0
        self._pending[key] = features
        self._size += features.nbytes
        if len(self._pending) >= _CLIPS or self._size >= _BYTES or time.monotonic() - self._begun >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added as a shard.

        Raises:
            UserError: it cannot be written.
        """
        if not self._pending:
            return
        data = save({f"{key[:32]}.{checksum(key, part.data):08x}": part for key, part in self._pending.items()})
        name = f"{secrets.token_hex(8)}{SHARD}"
        try:
            self._shards.mkdir(exist_ok=True)
            if not self._written:
                drop_dead_parts(self._shards)
            write_flushed(self._shards / name, data)
        except OSError as error:
            raise self._unwritten(self._shards, error) from error
        self._written.append(name)
        for key, place in read_header(io.BytesIO(data), self._width).items():
            self._fresh[key] = Place(name, *place)
        self._pending.clear()

    def keep(self, key: str, features: Array) -> None:
        """Writes a clip's (frames, width) float16 features at once, as a file of their own.

        Raises:
            UserError: it cannot be written.
        """
        path, content = self._alone(key), io.BytesIO()
        np.save(content, features, allow_pickle=False)
        try:
            path.parent.mkdir(exist_ok=True)
            write_flushed(path, content.getvalue())
        except OSError as error:
            raise self._unwritten(path.parent, error) from error

    @property
    def _known(self) -> Index:
        if self._index is None:
            self._index = self._updated([])
        return self._index

    def _place(self, key: str) -> Place | None:
        if key[:32] in self._fresh:
            return self._fresh[key[:32]]
        return self._known.place(key)

    def _bytes(self, place: Place) -> bytearray:
        """Raises an OSError if the shard is gone; a shard that is too short gives zeros."""
        handle = self._open.pop(place.shard, None)
        if handle is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            most = _OPEN if limit == resource.RLIM_INFINITY else min(limit // 8, _OPEN)
            while len(self._open) >= most:
                os.close(self._open.pop(next(iter(self._open))))
            handle = os.open(self._shards / place.shard, os.O_RDONLY | os.O_CLOEXEC)
        self._open[place.shard] = handle
        data = bytearray(place.frames * self._width * 2)
        os.preadv(handle, [data], place.offset)  # without a position, which loader processes would share
        return data

    def _mark(self, shard: str, key: str, problem: str) -> None:
        """Has the next start look at every clip of a shard."""
        self._damaged(self._shards / shard, problem)
        if shard not in self._marked:
            self._marked.add(shard)
            with suppress(OSError):
                (self._shards / f"{shard}.{key}{MARK}").touch()

    def _alone(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:DIGITS]}.npy"

    def _read_alone(self, key: str, *, shape_alone: bool = False) -> Array | None:
        """``shape_alone``: the values are not looked at."""
        path = self._alone(key)
        try:
            held: Array = np.load(path, allow_pickle=False, mmap_mode="r" if shape_alone else None)
            problem = _damage(held, self._width, shape_alone)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._damaged(path, error.strerror or str(error))
            return None
        except Exception as error:  # numpy raises what it likes for a damaged header
            problem = str(error) or type(error).__name__
        if not problem:
            return held
        self._damaged(path, problem)
        with suppress(OSError):  # or the next start, which looks at no values, would take it for a good one
            path.unlink()
        return None

    def _unwritten(self, place: Path, error: OSError) -> UserError:
        return UserError(f"data.cache: cannot write features to {place}: {error}")

    def _updated(self, written: Iterable[str]) -> Index:
        """The index of all shards that are listed and of those in ``written``; kept on the disk if that is possible."""
        try:
            listed = os.listdir(self._shards) if self._shards.is_dir() else []
        except OSError as error:
            raise UserError(f"data.cache: cannot read {self._shards}: {error.strerror or error}") from error
        names = sorted({name for name in (*listed, *written) if name.endswith((SHARD, MARK))})
        path = self._folder / "index.safetensors"
        old = self._index or read_index(path, self._damaged)
        if names == old.names:
            return old
        index = merge(old, names, self._shards, self._width, self._damaged)
        with suppress(OSError):  # it only saves time
            drop_dead_parts(self._folder)
            write_index(path, index)
        return index


def _damage(held: Array, width: int, shape_alone: bool) -> str:
    """What is wrong with the features of a file, or ""."""
    if held.dtype != np.float16 or held.ndim != 2 or held.shape[1] != width or not len(held):
        return f"{held.dtype} {held.shape}, expected float16 (frames, {width})"
    if shape_alone:
        return ""
    if not np.isfinite(held).all():
        return "its values are not finite"
    return "" if held.any() else "all its values are zero"


def _close(handles: dict[str, int]) -> None:
    for handle in handles.values():
        os.close(handle)
