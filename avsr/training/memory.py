"""Memory of a training process, measured by part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avsr.training.metrics import peak_memory_mb
from avsr.training.optimizer_state import base_optimizer


def measured(engine: Any) -> dict[str, int]:
    """Bytes that this rank holds, by part; "activations and the rest" is the difference to the peak."""
    frozen, trained = 0, 0
    for parameter in engine.module.parameters():
        size = _bytes(getattr(parameter, "ds_tensor", parameter))
        if parameter.requires_grad:
            trained += size
        else:
            frozen += size
    seen: dict[int, int] = {}
    base = base_optimizer(engine)
    # between steps ZeRO-3 removes the masters from the groups, but they remain the keys of the state
    holders = [holder for group in base.param_groups for holder in group["params"]] + list(base.state)
    for holder in holders:
        for value in (holder, *base.state.get(holder, {}).values()):
            if isinstance(value, Tensor):
                seen[value.data_ptr()] = _bytes(value)
    own = {parameter.data_ptr() for parameter in engine.module.parameters()}
    optimizer = sum(size for place, size in seen.items() if place not in own)
    parts = {"frozen weights": frozen, "trained weights": trained, "optimizer": optimizer}
    parts["activations and the rest"] = max(int(peak_memory_mb() * 2**20) - sum(parts.values()), 0)
    return parts


def device_memory() -> float:
    """Bytes that this process may use: the device's, or the host's available memory plus what the process holds."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return free * 2.0**10 + int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
