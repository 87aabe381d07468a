"""Which implementation runs: one table, no silent fallback."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("flashsink")

NAMES = ("reference", "cpu", "sdpa", "triton")
_USABLE = "usable"
_ABSENT = "this version has no {} kernels yet; the reference backend computes the same in plain PyTorch"

# What ``backend=None`` asks for, by device type; the first usable name wins.
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "sdpa", "reference")}


def backends() -> dict[str, str]:
    """Every backend's name with ``"usable"``, or the reason why it is not."""
    return {name: _USABLE if name == "reference" else _ABSENT.format(name) for name in NAMES}


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
        return backend
    for name in _PREFERRED.get(device_type, ("reference",)):
        if state[name] == _USABLE:
            return name
        _log_once(device_type, name, state[name])
    return "reference"


@functools.cache
def _log_once(device_type: str, name: str, reason: str) -> None:
    logger.info("backend %s is not used on %s: %s", name, device_type, reason)
