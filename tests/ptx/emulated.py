"""A device without hardware: flashsink's launches, compiled ahead of time for an architecture, run on the emulator."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from emulator import Kernel

from bench.compile_report import Job, job_of, made_from
from flashsink.triton import launch as launches
from flashsink.triton import tiles


@dataclass(frozen=True)
class Ran:
    """A launch that ran: the kernel, its tile as text, the number of instructions."""

    kernel: str
    tile: str
    instructions: int


@functools.cache
def kernel_of(job: Job) -> tuple[Kernel, int, int]:
    """(the kernel, threads of a CTA, bytes of shared memory)."""
    made = made_from(job)
    return Kernel(made.asm["ptx"]), made.metadata.num_warps * 32, made.metadata.shared


def values_of(job: Job, launch: Any) -> list[Any]:
    """What the launch gives to the parameters of the kernel, in order: constants have none."""
    arguments = {**launch.arguments, **launch.tile.blocks}
    return [value for name, kind in job.signature for value in _flat(kind, arguments.get(name))]


def _flat(kind: Any, value: Any) -> Iterator[Any]:
    if isinstance(kind, tuple):
        for one, part in zip(kind, value, strict=True):
            yield from _flat(one, part)
    elif kind != "constexpr":
        yield value


class Device:
    """An observer for :func:`flashsink.triton.launch.observe` that runs what is launched.

    Attributes:
        races: (kernel, race) and how often it was seen.
        ran: every launch.
    """

    def __init__(self, capability: int, checks: bool = True) -> None:
        self.capability, self.checks = capability, checks
        self.races: Counter[tuple[str, str]] = Counter()
        self.ran: list[Ran] = []

    def __call__(self, launch: Any) -> bool:
        job = job_of(launch, self.capability)
        kernel, threads, shared = kernel_of(job)
        races, count = kernel.run(launch.grid, threads, shared, values_of(job, launch), self.checks)
        blocks = " ".join(f"{name}={size}" for name, size in launch.tile.blocks.items())
        self.ran.append(Ran(job.kernel, f"{blocks} warps={launch.tile.warps} stages={launch.tile.stages}", count))
        self.races.update({(job.kernel, race): times for race, times in races.items()})
        return False

    @contextlib.contextmanager
    def active(self) -> Iterator[Device]:
        """Inside, CPU tensors with ``backend="triton"`` are computed here, with the tiles of the architecture.

        Raises:
            RuntimeError: Triton was asked for its interpreter when the kernels were defined.
        """
        if launches.INTERPRETED:
            raise RuntimeError("TRITON_INTERPRET=1 keeps Triton from compiling: unset it")
        launches.INTERPRETED = True  # what makes the backend take tensors on the CPU
        try:
            with tiles.target(self.capability), launches.observe(self):
                yield self
        finally:
            launches.INTERPRETED = False
