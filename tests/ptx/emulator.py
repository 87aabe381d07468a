"""The emulator's C++ core, compiled when it is first used, and kernels that run on it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ptx_program as ptx
from torch import Tensor

HERE = Path(__file__).parent
FLAGS = ["-O3", "-std=c++20", "-march=native", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-strict-aliasing", "-fwrapv", "-D_GLIBCXX_ASSERTIONS"]
SPECIAL = ("tid", "ctaid", "ntid", "nctaid")
GUARD = 4096  # bytes between allocations that belong to none
LIMIT = 2_000_000  # instructions of a CTA


class Fault(Exception):
    """A kernel does what a GPU would stop it for, or what the emulator does not know."""


@functools.cache
def library() -> ctypes.CDLL:
    """The core, built once for a state of its sources."""
    sources = sorted(HERE.glob("*.cpp"))
    text = b"".join(path.read_bytes() for path in [*sources, HERE / "machine.h"]) + " ".join(FLAGS).encode()
    target = HERE.parents[1] / "build" / "ptx" / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), *FLAGS, *map(str, sources), "-o", str(part)]
        subprocess.run(command, check=True)
        part.replace(target)
    core = ctypes.CDLL(str(target))
    core.ptx_load.restype = ctypes.c_void_p
    core.ptx_run.restype = ctypes.c_int64
    return core


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def _taken(text: ctypes.c_char_p | ctypes.c_void_p) -> str:
    """The text that the core has made, which is freed."""
    made = ctypes.string_at(text).decode() if text else ""
    library().ptx_free(text)
    return made


class Kernel:
    """PTX that can be run.

    Raises:
        Fault: it has an instruction that is not emulated.
    """

    def __init__(self, text: str) -> None:
        self.program = made = ptx.parse(text)
        constants = [x if x < 1 << 63 else x - (1 << 64) for constant in made.constants for x in constant]
        special = [x for name, register in made.special for x in (_which(name), register)]
        fault = ctypes.c_void_p()
        self._handle = ctypes.c_void_p(
            library().ptx_load(
                "\n".join(made.operations).encode(),
                _integers(made.words),
                _integers(made.registers),
                *(_integers(constants), ctypes.c_int64(len(made.constants))),
                *(_integers(special), ctypes.c_int64(len(made.special))),
                ctypes.byref(fault),
            )
        )
        if fault:
            raise Fault(_taken(fault))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            library().ptx_unload(self._handle)

    def run(
        self, grid: Sequence[int], threads: int, shared: int, values: Sequence[Tensor | float], checks: bool = True
    ) -> tuple[Counter[str], int]:
        """Runs the kernel; tensors are read and written in place.

        Args:
            grid: one to three sizes.
            threads: of a CTA, a multiple of 32.
            shared: bytes of shared memory.
            values: of the parameters in order; those that are missing are 0.
            checks: look for races and for shared memory that nobody wrote.

        Returns:
            (races and how often each was seen, instructions that ran).

        Raises:
            Fault: an access out of bounds or misaligned, a barrier in divergent code, a kernel that does not end.
        """
        arena = Arena([value for value in values if isinstance(value, Tensor)])
        words = [
            arena.address(value) if isinstance(value, Tensor) else _bits(kind, value)
            for (kind, _), value in zip(self.program.parameters, values, strict=False)
        ]
        words += [0] * (len(self.program.parameters) - len(words))
        report, fault = ctypes.c_void_p(), ctypes.c_void_p()
        count = library().ptx_run(
            *(self._handle, _integers([*grid, 1, 1][:3]), ctypes.c_int64(threads), ctypes.c_int64(shared)),
            (ctypes.c_uint64 * max(len(words), 1))(*words),
            *(ctypes.c_void_p(arena.data.ctypes.data), ctypes.c_void_p(arena.owner.ctypes.data)),
            *(ctypes.c_int64(len(arena.data)), ctypes.c_int64(checks), ctypes.c_int64(LIMIT)),
            *(ctypes.byref(report), ctypes.byref(fault)),
        )
        lines = [line.split("\t") for line in _taken(report).splitlines()]
        if fault:
            raise Fault(_taken(fault))
        arena.give_back()
        return Counter({what: int(times) for times, what in lines}), count


def _which(special: str) -> int:
    """A special register's number: see begin() in machine.cpp."""
    name, _, axis = special[1:].partition(".")
    if name in SPECIAL:
        return SPECIAL.index(name) * 4 + "xyz".index(axis)
    return 4 * 4 + ("laneid", "warpid").index(name)


def _bits(kind: str, value: float) -> int:
    if kind == "f32":
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value) & ((1 << 64) - 1)


class Arena:
    """Global memory: copies of the tensors' storages, far from each other, so that an access beyond one is in none."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        self._places: dict[int, int] = {}
        top = GUARD
        for pointer, storage in self._storages.items():
            self._places[pointer] = top
            top += -(-storage.nbytes() // 512) * 512 + GUARD
        self.data = np.zeros(top, np.uint8)
        self.owner = np.zeros(top, np.uint16)
        for number, pointer in enumerate(self._storages, start=1):
            self._part(self.data, pointer)[:] = self._memory(pointer)
            self._part(self.owner, pointer)[:] = number

    def _memory(self, pointer: int) -> np.ndarray:
        size = self._storages[pointer].nbytes()
        return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), np.uint8) if size else np.empty(0, np.uint8)

    def _part(self, of: np.ndarray, pointer: int) -> np.ndarray:
        first = self._places[pointer]
        return of[first : first + self._storages[pointer].nbytes()]

    def address(self, x: Tensor) -> int:
        pointer = x.untyped_storage().data_ptr()
        return self._places[pointer] + x.data_ptr() - pointer

    def give_back(self) -> None:
        for pointer in self._storages:
            self._memory(pointer)[:] = self._part(self.data, pointer)
