"""Landmark files: 68 points of a face for each frame of a video at 25 fps.

The points are those of the usual 68-point scheme (iBUG 300-W), x and y in pixels of the video, pixel centres at whole
numbers. Three formats, looked for in this order:

* ``NAME.npz`` with the array ``landmarks``, (T, 68, 2) of floats; a frame without a face is NaN.
* ``NAME.npy``, the same array alone.
* ``NAME.pkl``, a pickled list with an array (68, 2) or None for each frame, as the landmarks of LRS2, LRS3 and
  VoxCeleb2 are handed out. It is read by ``avsr.prepare.inert``, which runs nothing.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from avsr.errors import UserError
from avsr.prepare.inert import read_pickle

POINTS = 68


def find_landmarks(folder: Path, name: str) -> Path | None:
    """The landmark file of the video ``name`` (with "/", without a suffix), or None."""
    return next((path for s in (".npz", ".npy", ".pkl") if (path := folder / f"{name}{s}").is_file()), None)


def read_landmarks(path: Path) -> np.ndarray:
    """(T, 68, 2) float32, NaN where a frame has none.

    Raises:
        UserError: the file cannot be read, holds something else, or a pickle names a class.
    """
    if path.suffix == ".pkl":
        value = read_pickle(path)
    else:
        try:
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.lib.npyio.NpzFile):
                with loaded:
                    if "landmarks" not in loaded.files:
                        raise UserError(f"{path} has no array 'landmarks' (it has {', '.join(loaded.files) or 'none'})")
                    value = loaded["landmarks"]
            else:
                value = loaded
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a readable array file: {error}") from error
    return _as_array(value, path)


def _as_array(value: Any, path: Path) -> np.ndarray:
    if isinstance(value, dict) and "landmarks" in value:
        value = value["landmarks"]
    if isinstance(value, np.ndarray):
        if value.ndim != 3 or value.shape[1] != POINTS or value.shape[2] < 2 or value.dtype.kind not in "fiu":
            raise UserError(f"{path}: expected (T, {POINTS}, 2) numbers, got {value.shape} {value.dtype}")
        return np.ascontiguousarray(value[:, :, :2], dtype=np.float32)
    if not isinstance(value, list | tuple):
        raise UserError(f"{path}: expected a list with the landmarks of each frame, got {type(value).__name__}")
    out = np.full((len(value), POINTS, 2), np.nan, np.float32)
    for index, points in enumerate(value):
        if points is None or (isinstance(points, list | tuple | np.ndarray) and len(points) == 0):
            continue
        try:
            array = np.asarray(points, dtype=np.float32)
        except (ValueError, TypeError):
            raise UserError(f"{path}: frame {index} does not hold numbers") from None
        if array.ndim != 2 or array.shape[0] != POINTS or array.shape[1] < 2:
            raise UserError(f"{path}: frame {index} has points of shape {array.shape}, expected ({POINTS}, 2)")
        out[index] = array[:, :2]
    return out
