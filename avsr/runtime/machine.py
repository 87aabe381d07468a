"""The CPUs that this process may use, how it shares them, and what is said when its memory is too small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from avsr.errors import UserError

SPIN_COUNT = "1000"  # rounds: a step takes 1.17 times as long on an idle machine, 0.38 times next to two programs

_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def cpus() -> int:
    """The number of CPUs that this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spin_briefly() -> None:
    """Makes OpenMP's idle threads yield their core after some microseconds of spinning, unless the user has configured
    how they wait.

    By default they spin for milliseconds. On a machine that runs other programs, this takes the cores from the very
    threads they wait for (``bench/LOG.md`` has the measurements). gcc's OpenMP, which torch uses, reads the variable
    when it is loaded, so call this before the first import of torch.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def settled_precision(precision: str) -> str:
    """``training.precision`` as "fp32" or "bf16": "auto" is bf16 where the device multiplies it fast."""
    import torch  # not before spin_briefly

    if precision != "auto":
        return precision
    capabilities = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if fast else "fp32"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that the machine or its device has too little memory."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


@contextmanager
def enough_memory(doing: str, advice: str) -> Iterator[None]:
    """Raises a ``UserError`` with ``advice`` where there is too little memory inside while ``doing`` something."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        if not lacks_memory(error):
            raise
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"out of memory while {doing} ({cause}): {advice}") from error
