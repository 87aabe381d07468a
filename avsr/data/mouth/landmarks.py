"""Landmark files: 68 points of a face for each frame of a video at 25 fps.

The points are those of the usual 68-point scheme (iBUG 300-W), x and y in pixels of the video, pixel centres at whole
numbers. Three formats, searched in this order:

* ``NAME.npz`` with the array ``landmarks``, (T, 68, 2) of floats; a frame without a face is NaN.
* ``NAME.npy``, the same array alone.
* ``NAME.pkl``, a pickled list with an array (68, 2) or None for each frame, as the landmarks of LRS2, LRS3 and
  VoxCeleb2 are distributed. ``avsr.data.mouth.inert`` reads it without running anything.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from avsr.data.mouth.inert import read_pickle
from avsr.errors import UserError

POINTS = 68
MAX_FRAMES = 90_000  # an hour
_MAX_BYTES = MAX_FRAMES * POINTS * 3 * 8


def find_landmarks(folder: Path, name: str) -> Path | None:
    """The landmark file of the video ``name`` (with "/", without a suffix), or None."""
    return next((path for s in (".npz", ".npy", ".pkl") if os.path.isfile(path := folder / f"{name}{s}")), None)


def read_landmarks(path: Path) -> np.ndarray:
    """(T, 68, 2) float32, NaN where a frame has none.

    Raises:
        UserError: the file cannot be read, contains something else, or is a pickle that names a class.
    """
    if path.suffix == ".pkl":
        value = read_pickle(path)
    else:
        try:
            value = _array(_bytes(path))
        except UserError:
            raise
        except Exception as error:  # damaged zip files and headers raise almost anything
            raise UserError(f"{path} is not a readable array file: {type(error).__name__}: {error}") from error
    return _as_array(value, path)


def _bytes(path: Path) -> bytes:
    """The bytes of a .npy file, or of landmarks.npy in a .npz file."""
    if not zipfile.is_zipfile(path):
        _refuse_large(path.stat().st_size, path)
        return path.read_bytes()
    with zipfile.ZipFile(path) as file:
        names = [name.removesuffix(".npy") for name in file.namelist()]
        if "landmarks" not in names:
            raise UserError(f"{path} has no array 'landmarks' (it has {', '.join(names) or 'none'})")
        _refuse_large(file.getinfo("landmarks.npy").file_size, path)  # no more than this is unpacked
        return file.read("landmarks.npy")


def _refuse_large(size: int, path: Path) -> None:
    if size > _MAX_BYTES:
        raise UserError(f"{path} holds an array of {size} bytes, more than landmarks of an hour")


def _array(data: bytes) -> np.ndarray:
    """The array of a .npy file. numpy's own reader allocates what the header claims before it checks the size."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds objects, no numbers")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _refuse_long(frames: int, path: Path) -> None:
    if frames > MAX_FRAMES:
        raise UserError(f"{path} holds {frames} frames, more than the {MAX_FRAMES} of an hour")


def _as_array(value: Any, path: Path) -> np.ndarray:
    if isinstance(value, dict) and "landmarks" in value:
        value = value["landmarks"]
    if isinstance(value, np.ndarray):
        if value.ndim != 3 or value.shape[1] != POINTS or value.shape[2] < 2 or value.dtype.kind not in "fiu":
            raise UserError(f"{path}: expected (T, {POINTS}, 2) numbers, got {value.shape} {value.dtype}")
        _refuse_long(len(value), path)
        return np.ascontiguousarray(value[:, :, :2], dtype=np.float32)
    if not isinstance(value, list | tuple):
        raise UserError(f"{path}: expected a list with the landmarks of each frame, got {type(value).__name__}")
    _refuse_long(len(value), path)
    out = np.full((len(value), POINTS, 2), np.nan, np.float32)
    for index, points in enumerate(value):
        empty = points.shape[:1] == (0,) if isinstance(points, np.ndarray) else points in (None, [], ())
        if empty:
            continue
        try:
            array = np.asarray(points, dtype=np.float32)
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{path}: frame {index} does not hold numbers") from None
        if array.ndim != 2 or array.shape[0] != POINTS or array.shape[1] < 2:
            raise UserError(f"{path}: frame {index} has points of shape {array.shape}, expected ({POINTS}, 2)")
        out[index] = array[:, :2]
    return out
