"""The CPUs that this process may use, and how it shares them."""

from __future__ import annotations

import os

SPIN_COUNT = "1000"  # rounds: a step takes 1.17 times as long on an idle machine, 0.38 times next to two programs


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
