"""Stages of a step, reported to the watchdog, torch's profiler and, on CUDA, to Nsight as NVTX ranges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from avsr.training.watchdog import Watchdog


class Stages:
    """Named stages of a step, one at a time."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._nvtx = torch.cuda.is_available()

    @contextmanager
    def enter(self, name: str, step: int) -> Iterator[None]:
        """``name`` is one of :data:`avsr.training.watchdog.STAGES`."""
        self._watchdog.enter(name, step)
        if self._nvtx:
            torch.cuda.nvtx.range_push(f"avsr/{name}")
        try:
            with record_function(f"avsr/{name}"):
                yield
        finally:
            if self._nvtx:
                torch.cuda.nvtx.range_pop()
