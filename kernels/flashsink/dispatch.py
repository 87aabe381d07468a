"""Which implementation runs: one table, no silent fallback."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flashsink import checks, reference, sdpa, selfcheck, verdicts
from flashsink.cpu import backend as cpu
from flashsink.cpu import library
from flashsink.triton import backend as triton
from flashsink.triton import launch
from flashsink.types import ActivationStats, Layout, Normed, Pattern, Segments, SinkStats

logger = logging.getLogger("flashsink")

NAMES = ("reference", "cpu", "sdpa", "triton")
_USABLE = "usable"

# What ``backend=None`` asks for, by device type; the first usable name wins.
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "sdpa", "reference")}


class Backend(Protocol):
    """What a backend's module offers; :mod:`flashsink.reference` says what the functions mean."""

    def refusal(
        self, q: Tensor, v: Tensor | None = None, pattern: Pattern | None = None, softcap: float | None = None
    ) -> str: ...

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
        pattern: Pattern | None = None,
        softcap: float | None = None,
        segments: Segments | None = None,
    ) -> tuple[Tensor, list[SinkStats]]: ...

    def calibrated_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        layout: Layout,
        *,
        beta: float,
        scale: float,
        causal: bool = True,
        pattern: Pattern | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor: ...

    def decorrelation_sums(self, layers: Sequence[Tensor], spans: Tensor, layout: Layout, margin: float) -> Tensor: ...

    def activation_stats(self, layers: Sequence[Tensor], layout: Layout, median: bool) -> ActivationStats: ...

    def rms_norm(
        self, h: Tensor, weight: Tensor, eps: float, layout: Layout, spans: Tensor | None, margin: float
    ) -> Normed: ...


_MODULES: dict[str, Backend] = {"reference": reference, "cpu": cpu, "sdpa": sdpa, "triton": triton}
_GENERAL = ("reference", "cpu")  # take any tokens and anchors of the loss


def backends() -> dict[str, str]:
    """Every backend's name with ``"usable"``, or the reason why it is not."""
    return {name: _state(name) for name in NAMES}


@verdicts.constant
def _state(name: str) -> str:
    if name == "reference" or (name == "sdpa" and torch.cuda.is_available()):
        return (name == "sdpa" and launch.unsupported_gpu()) or _USABLE
    return triton.available() if name == "triton" else library.available()


def implementation(
    backend: str | None,
    device_type: str,
    x: Tensor | None = None,
    v: Tensor | None = None,
    pattern: Pattern | None = None,
    softcap: float | None = None,
    family: str = "attention",
    segments: bool = False,
) -> Backend:
    """The functions of the backend that :func:`select` chooses."""
    return _MODULES[select(backend, device_type, x, v, pattern, softcap, family, segments)]


def select(
    backend: str | None,
    device_type: str,
    x: Tensor | None = None,
    v: Tensor | None = None,
    pattern: Pattern | None = None,
    softcap: float | None = None,
    family: str = "attention",
    segments: bool = False,
) -> str:
    """The backend that runs on ``device_type``; with the arguments of attention, the one that takes them.

    Args:
        x: q (B, H, Sq, D), or the states (B, S, C) of another ``family``: with it, kernels that fail their check on
            this device are passed over.
        family: what x is for, one of :data:`flashsink.selfcheck.FAMILIES`.
        segments: whether attention's statistics are asked for by segment.

    Raises:
        ValueError: the name is unknown, or the named backend cannot be used here (with the reason).
    """
    state, kinds = backends(), [family]
    if x is not None and family in selfcheck.ATTENTION and checks.beyond_plain(x, v, pattern, softcap):
        kinds = ["patterns"]
    kinds += ["segments"] if segments else []
    if backend is not None:
        if backend not in state:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)} or None, got {backend!r}")
        if state[backend] != _USABLE:
            raise ValueError(f"backend: {backend!r} cannot be used: {state[backend]}")
        if backend == "cpu" and device_type != "cpu":
            raise ValueError(f"backend: 'cpu' takes tensors on the CPU, got {device_type}")
        if backend in ("sdpa", "triton") and device_type not in ("cpu", "cuda"):
            raise ValueError(f"backend: {backend!r} takes tensors on CUDA, got {device_type}")
        if backend == "triton" and device_type == "cpu" and not launch.INTERPRETED:
            raise ValueError("backend: 'triton' takes tensors on the CPU only under TRITON_INTERPRET=1")
        reason = _refusal(backend, x, v, pattern, softcap, family, segments) or _failed(backend, x, kinds)
        if reason:
            raise ValueError(f"backend: {backend!r} cannot be used: {reason}")
        return backend
    for name in _PREFERRED.get(device_type, ("reference",)):
        reason = state[name] if state[name] != _USABLE else _refusal(name, x, v, pattern, softcap, family, segments)
        if not reason and not _failed(name, x, kinds):
            return name
        if reason and not torch.compiler.is_compiling():
            _log_once(device_type, name, reason)
    return "reference"


def module(name: str) -> Backend:
    """The functions of a backend by its name, usable or not."""
    return _MODULES[name]


def require_general(backend: str | None) -> None:
    """Raises:
    ValueError: the named backend has no decorrelation loss over token masks and anchors.
    """
    if backend in NAMES and backend not in _GENERAL:
        raise ValueError(
            f"backend: {backend!r} cannot be used: its decorrelation loss takes no token mask and no anchors; "
            f"expected {' or '.join(_GENERAL)}, or None for the reference"
        )


def _refusal(
    name: str,
    x: Tensor | None,
    v: Tensor | None,
    pattern: Pattern | None,
    softcap: float | None,
    family: str,
    segments: bool,
) -> str:
    """Why the backend's attention does not take these, or ""."""
    if x is None or family not in selfcheck.ATTENTION:
        return ""
    if segments and name == "sdpa":
        return checks.beyond_plain(x, None, None, None, segments)
    return _MODULES[name].refusal(x, v, pattern, softcap)


def _failed(name: str, x: Tensor | None, families: list[str]) -> str:
    """Why the backend's kernels are not to be trusted here, or ""; a warning has said so already."""
    if name != "triton" or x is None:
        return ""
    return next(filter(None, (verdicts.refusal(family, x) for family in families)), "")


@functools.cache
def _log_once(device_type: str, name: str, reason: str) -> None:
    logger.info("backend %s is not used on %s: %s", name, device_type, reason)
