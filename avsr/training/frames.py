"""The utterances that a run begins with, in order, and their encoder frames. They determine the batches, which must be
the same after a resume even if clips have vanished since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from avsr.data.dataset import Sizes
from avsr.data.index import read_arrow, write_arrow
from avsr.errors import UserError
from avsr.runtime import folders

FRAMES = "frames.json"
MANY = {name: f"frames.{name}.arrow" for name in ("train", "validation")}  # instead, of large corpora
_READABLE = 50_000  # utterances that are written as JSON
_MOST = 2**53  # floats represent every integer up to here


def read_frames(run: Path) -> dict[str, Sizes]:
    """What :func:`write_frames` wrote when the run began, or an empty dict.

    Raises:
        UserError: it is damaged.
    """
    path = run / FRAMES
    try:
        if all((run / name).is_file() for name in MANY.values()):
            return {name: _read_many(path := run / file) for name, file in MANY.items()}
        if not path.is_file():
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.keys() != MANY.keys():
            raise ValueError("it is not that of a training")
        for part in found.values():
            if not part or not all(type(count) is int and 0 <= count <= _MOST for count in part.values()):
                raise ValueError("these are no numbers of frames")
        return {
            name: Sizes(pa.chunked_array([list(part)], pa.string()), np.array(list(part.values()), dtype=np.int64))
            for name, part in found.items()
        }
    except (OSError, ValueError, AttributeError, KeyError, RecursionError) as error:
        advice = "restore it, or delete it if all clips are there that the run began with"
        raise UserError(f"resume: {path} cannot be read ({error}); {advice}") from error


def write_frames(run: Path, sets: Mapping[str, Sizes]) -> None:
    """Records the datasets of a run by name, "train" and "validation".

    Raises:
        UserError: they cannot be written.
    """
    try:
        if sum(len(part.ids) for part in sets.values()) <= _READABLE:
            pairs = {name: zip(ids.to_pylist(), frames.tolist(), strict=True) for name, (ids, frames) in sets.items()}
            found = {name: dict(part) for name, part in pairs.items()}
            folders.write_durably(run / FRAMES, json.dumps(found).encode())
            return
        for name, part in sets.items():
            write_arrow(run / MANY[name], pa.table({"id": part.ids, "frames": part.frames}))
        folders.flush(run)
    except OSError as error:
        raise UserError(f"run: cannot write to {run}: {error}") from error


def _read_many(path: Path) -> Sizes:
    table = read_arrow(path)
    frames = np.asarray(table.column("frames"))
    if frames.dtype != np.int64 or not len(frames) or frames.min() < 0 or frames.max() > _MOST:
        raise ValueError("these are no numbers of frames")
    return Sizes(table.column("id"), frames)
