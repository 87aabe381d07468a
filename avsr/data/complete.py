"""Which rows of an indexed manifest a feature cache holds, so that a start need not look for every clip: a file in
``CACHE/complete`` for each manifest, encoders and versions. It counts as long as the shards are there that held the
features when it was written, and nobody has marked one as damaged since."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from avsr.data.feature_index import MARK
from avsr.runtime.folders import write_flushed

Numbers = np.ndarray[Any, Any]


class Complete:
    """Args:
    cache: the folder of ``data.cache``.
    state: names everything that the keys of the clips depend on.
    shards: names of shards and marks of damage by stream, as they are now.
    """

    def __init__(self, cache: Path, state: str, shards: Mapping[str, list[str]]) -> None:
        digest = hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        self._path = cache / "complete" / f"{digest}.npz"
        self._names = sorted(f"{stream}/{name}" for stream, names in shards.items() for name in names)

    def rows(self, count: int) -> Numbers:
        """(count,) bool: which of the manifest's rows are certainly there."""
        none = np.zeros(count, dtype=bool)
        try:
            with np.load(self._path, allow_pickle=False) as held:
                names, bits = set(held["names"].tolist()), held["rows"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return none
        now = set(self._names)
        new_marks = any(name.endswith(MARK) for name in now - names)
        if new_marks or not names <= now or bits.dtype != np.uint8 or len(bits) != -(-count // 8):
            return none
        return np.unpackbits(bits, count=count).astype(bool)

    def keep(self, rows: Numbers) -> None:
        """Keeps (count,) bool which rows are there. A cache that takes no files just starts as slowly again."""
        if np.array_equal(self.rows(len(rows)), rows):
            return
        content = io.BytesIO()
        np.savez_compressed(content, names=np.array(self._names, dtype=np.str_), rows=np.packbits(rows))
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            write_flushed(self._path, content.getvalue())
