"""The memory that a step needs beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_memory(step: Callable[[], object], device: torch.device) -> float:
    """Peak of the bytes that one call allocates beyond what was there before."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    recorded = profile.profiler.kineto_results.events()
    now = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return float(peak)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
