"""Which implementation runs: one table, no silent fallback."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from flashsink import cpu, native, reference
from flashsink.types import ActivationStats, Layout, Normed, SinkStats

logger = logging.getLogger("flashsink")

NAMES = ("reference", "cpu", "sdpa", "triton")
_USABLE = "usable"
_ABSENT = "this version has no {} kernels yet; the reference backend computes the same in plain PyTorch"

# What ``backend=None`` asks for, by device type; the first usable name wins.
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "sdpa", "reference")}


class Backend(Protocol):
    """What a backend's module offers; :mod:`flashsink.reference` says what the functions mean."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        *,
        causal: bool,
        scale: float,
        counted: Sequence[Tensor | None] = (),
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, list[SinkStats]]: ...

    def calibrated_attention(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, layout: Layout, *, beta: float, scale: float
    ) -> Tensor: ...

    def decorrelation_sums(self, layers: Sequence[Tensor], spans: Tensor, layout: Layout, margin: float) -> Tensor: ...

    def activation_stats(self, layers: Sequence[Tensor], layout: Layout, median: bool) -> ActivationStats: ...

    def rms_norm(
        self, h: Tensor, weight: Tensor, eps: float, layout: Layout, spans: Tensor | None, margin: float
    ) -> Normed: ...


_MODULES: dict[str, Backend] = {"reference": reference, "cpu": cpu}


def backends() -> dict[str, str]:
    """Every backend's name with ``"usable"``, or the reason why it is not."""
    state = {name: _ABSENT.format(name) for name in NAMES}
    return state | {"reference": _USABLE, "cpu": native.available()}


def implementation(backend: str | None, device_type: str) -> Backend:
    """The functions of the backend that :func:`select` chooses."""
    return _MODULES[select(backend, device_type)]


def select(backend: str | None, device_type: str) -> str:
    """The backend that runs on ``device_type``.

    Raises:
        ValueError: the name is unknown, or the named backend cannot be used here (with the reason).
    """
    state = backends()
    if backend is not None:
        if backend not in state:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)} or None, got {backend!r}")
        if state[backend] != _USABLE:
            raise ValueError(f"backend: {backend!r} cannot be used: {state[backend]}")
        if backend == "cpu" and device_type != "cpu":
            raise ValueError(f"backend: 'cpu' takes tensors on the CPU, got {device_type}")
        return backend
    for name in _PREFERRED.get(device_type, ("reference",)):
        if state[name] == _USABLE:
            return name
        _log_once(device_type, name, state[name])
    return "reference"


@functools.cache
def _log_once(device_type: str, name: str, reason: str) -> None:
    logger.info("backend %s is not used on %s: %s", name, device_type, reason)
