"""The one place where Triton kernels are started.

The device of the tensors is made current for each launch, and observers see what runs: tests, that a kernel really
ran; the compile report, to compile without a GPU exactly what would be launched.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# triton.jit looks at it when a kernel is defined, so a later change has no effect
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Arguments of kernels that change from batch to batch, for ``triton.jit(do_not_specialize=...)``: else numbers that are
# 1 or divisible by 16 and pointers that are aligned make kernels of their own, and a run compiles again and again, its
# ranks at different steps. Strides are not among them: what they say of alignment makes loads wide, and they keep it.
VARYING = (
    *("starts", "lengths", "segments", "spans", "query_starts", "sink_logits", "sinks", "dsums", "dtotal"),
    *("window", "chunk", "prefix", "block_starts", "block_ends", "mask", "stride_maskb", "stride_maskm"),
    *("sequences", "number", "seqlen_q", "seqlen_k", "rows", "tokens", "parts", "chunks", "size"),
)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: its block sizes by name, and Triton's launch options."""

    blocks: dict[str, int]
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """What an observer sees: the kernel, its grid, the tile and all arguments (tensors, numbers, None) by name."""

    kernel: Any
    grid: tuple[int, ...]
    tile: Tile
    arguments: dict[str, Any]


_observers: list[Callable[[Launch], bool]] = []


@contextlib.contextmanager
def observe(observer: Callable[[Launch], bool]) -> Iterator[None]:
    """Calls ``observer`` with every launch inside; where it returns False the kernel is not run."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Runs ``kernel[grid]`` on the device of its tensors; an empty grid is no launch.

    Args:
        kernel: a ``triton.jit`` function whose block sizes are named as in ``tile.blocks``.
        grid: one to three sizes.
        tile: block sizes, warps and pipeline stages.
        arguments: all other arguments of the kernel, by name.
    """
    if 0 in grid:
        return
    seen = Launch(kernel, grid, tile, arguments)
    # no short cut: every observer is told
    if not all([observer(seen) for observer in _observers]):
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current:
        kernel[grid](**arguments, **tile.blocks, num_warps=tile.warps, num_stages=tile.stages)


def strides(tensors: dict[str, dict[str, Tensor]]) -> dict[str, int]:
    """Kernel arguments stride_<tensor><dimension> of the leading dimensions, one letter each, and UNIT, what all of
    them are multiples of: 16, which Triton finds out by itself, 8 (rows of 72 features are whole vectors of 16 bytes,
    too) or 1.

    Args:
        tensors: by the letters of their dimensions, by name.
    """
    found = {
        f"stride_{name}{dimension}": x.stride(i) if x.shape[i] > 1 else 0
        for dimensions, named in tensors.items()
        for name, x in named.items()
        for i, dimension in enumerate(dimensions)
    }
    common = math.gcd(*found.values(), 16)
    return found | {"UNIT": common if common >= 8 else 1}


def available() -> str:
    """``"usable"``, or what is missing besides triton itself."""
    if INTERPRETED:
        return "usable"
    reason = unsupported_gpu()
    if reason or torch.cuda.is_available():
        return reason or "usable"
    why = "there is no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
    return f"{why} (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"


def unsupported_gpu() -> str:
    """Why torch's GPUs, if there are any, are none that flashsink knows, or ""."""
    if torch.version.hip:  # such GPUs pass for CUDA devices, of a capability that means something else
        return "ROCm is not supported: kernels and tiles are made for NVIDIA's GPUs"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"it needs compute capability 8.0 or higher, this device has {major}.{minor}"
    return ""
