"""The end of a micro-batch: DeepSpeed's update of the weights, and what it must not do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from avsr.runtime.transfer import Later


def update(engine: Any, parameters: Iterable[nn.Parameter]) -> Later | float | None:
    """Ends a micro-batch. The last one of a step updates the weights and returns the gradient's norm; with a gradient
    that is not finite no weight changes, but the schedule advances. To decide that, the host waits for the gradient."""
    boundary = engine.is_gradient_accumulation_boundary()
    plain = _plain_norm(engine, parameters) if boundary else None
    if plain is not None and not math.isfinite(plain):
        with _idle(engine.optimizer):
            engine.step()
    else:
        engine.step()
    if not boundary:
        return None
    if not engine.was_step_applied():
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.step()
        return math.inf
    norm = engine.get_global_grad_norm() if plain is None else plain
    return Later(norm) if isinstance(norm, Tensor) else norm


def _plain_norm(engine: Any, parameters: Iterable[nn.Parameter]) -> float | None:
    """The gradient's norm if DeepSpeed does not compute it: in float32 without ZeRO."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm())


@contextmanager
def _idle(optimizer: Any) -> Iterator[None]:
    """Inside this context the optimizer's steps change nothing."""
    step, optimizer.step = optimizer.step, lambda: None
    try:
        yield
    finally:
        optimizer.step = step
