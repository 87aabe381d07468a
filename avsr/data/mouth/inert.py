"""Reads pickles of numpy arrays without running anything that they name.

Landmarks of LRS2, LRS3 and VoxCeleb2 are distributed as pickles of lists of arrays. A pickle can call any function it
names. Here the few names that arrays need are mapped to stand-ins that only store their arguments, and every other name
is refused. numpy's own unpickling code never sees the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from avsr.errors import UserError


def read_pickle(path: Path) -> Any:
    """The content of a pickle of numbers, strings, None, lists, tuples, dicts and numpy arrays of numbers.

    Raises:
        UserError: the file cannot be read, is not a pickle, or names anything else; the message names it.
    """
    try:
        data = path.read_bytes()
        _refuse_large_memo(data)
        value = _Inert(io.BytesIO(data), path).load()
        return _finish(value, 0)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{path} is not a readable pickle of arrays: {type(error).__name__}: {error}") from error


def _refuse_large_memo(data: bytes) -> None:
    """The unpickler allocates memory for the largest memo index, which may be 2^32, and for a string before it checks
    that the string is that long, which ``genops`` does check."""
    for code, argument, _ in pickletools.genops(data):
        if "PUT" in code.name and isinstance(argument, int) and argument > len(data):
            raise ValueError(f"it keeps a value under the number {argument}")


class _Dtype:
    """Keeps the arguments of ``numpy.dtype`` and of its state."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def real(self) -> np.dtype:
        if not isinstance(self.name, str) or self.name[:1] not in ("f", "i", "u", "b"):
            raise ValueError(f"it holds an array of the type {self.name!r}; only arrays of numbers are read")
        return np.dtype((self.order if self.order in ("<", ">") else "=") + self.name)


class _Array:
    """Keeps the state of a ``numpy.ndarray``."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def real(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise ValueError("it holds an array that is not one of numbers")
        return np.frombuffer(bytes(data), dtype.real()).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(data))
    return array


def _scalar(dtype: Any, data: Any) -> _Array:
    array = _Array()
    array.state = (1, (), dtype, False, data)
    return array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise ValueError(f"it holds bytes written as {encoding!r}; only latin1 is read")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
for _module in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _STAND_INS[f"{_module}.multiarray", "_reconstruct"] = _reconstruct
    _STAND_INS[f"{_module}.multiarray", "scalar"] = _scalar
    _STAND_INS[f"{_module}.numeric", "_frombuffer"] = _from_buffer


class _Inert(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            stand_in = _STAND_INS[module, name]
        except KeyError:
            raise UserError(
                f"{self._path} is refused: it names {module}.{name}; only numpy arrays, lists, tuples, dicts, numbers,"
                " texts and None are read from a pickle"
            ) from None
        return lambda *given: stand_in(*given)  # a new function each time: a pickle can set attributes of what it names


def _finish(value: Any, depth: int) -> Any:
    """Replaces stand-ins by arrays, within lists, tuples and dicts."""
    if depth > 8:
        raise ValueError("it is nested deeper than landmarks are")
    if isinstance(value, _Array):
        return value.real()
    if isinstance(value, list):
        return [_finish(item, depth + 1) for item in value]
    if isinstance(value, tuple):
        return tuple(_finish(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return {key: _finish(item, depth + 1) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise ValueError(f"it holds a {type(value).__name__}, which landmarks do not")
