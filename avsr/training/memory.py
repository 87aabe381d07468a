"""What the memory of a training is made of: measured by part."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from avsr.training.metrics import peak_memory_mb
from avsr.training.optimizer_state import base_optimizer


def measured(engine: Any) -> dict[str, int]:
    """Bytes that this rank holds, by part; "activations and the rest" is what the peak has above them."""
    frozen, trained = 0, 0
    for parameter in engine.module.parameters():
        size = _bytes(getattr(parameter, "ds_tensor", parameter))
        if parameter.requires_grad:
            trained += size
        else:
            frozen += size
    seen: dict[int, int] = {}
    base = base_optimizer(engine)
    for group in base.param_groups:
        for holder in group["params"]:
            for value in (holder, *base.state.get(holder, {}).values()):
                if isinstance(value, Tensor):
                    seen[value.data_ptr()] = _bytes(value)
    own = {parameter.data_ptr() for parameter in engine.module.parameters()}
    optimizer = sum(size for place, size in seen.items() if place not in own)
    parts = {"frozen weights": frozen, "trained weights": trained, "optimizer": optimizer}
    parts["activations and the rest"] = max(int(peak_memory_mb() * 2**20) - sum(parts.values()), 0)
    return parts


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
