"""What the machine lets this process use."""

from __future__ import annotations

import os


def cpus() -> int:
    """The CPUs this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
