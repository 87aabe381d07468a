"""Norms that can observe a layer's output on the way: those that compute :func:`flashsink.reference.rms_norm`.

A norm is known by what it computes on a few random numbers, not by its class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger("flashsink")

_ROWS = 64  # enough that another order of rounding shows


class Form(NamedTuple):
    """RMSNorm of h with ``eps`` times (``offset`` + weight)."""

    eps: float
    offset: float

    def weight(self, norm: nn.Module) -> Tensor:
        weight: Any = norm.weight
        return weight + self.offset if self.offset else weight


def undecided(norm: Any) -> bool:
    """Whether the weight is elsewhere (ZeRO-3, meta), so that only a forward can tell the form."""
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and (weight.numel() == 0 or weight.is_meta)


def form_of(norm: Any, run: Callable[[Tensor], Tensor]) -> Form | None:
    """The form of ``norm``, whose own forward is ``run``, or None with a logged reason."""
    form, why = _recognize(norm, run)
    if form is None:
        logger.info("%s %s: the states are read once more instead", type(norm).__name__, why)
    return form


def _recognize(norm: Any, run: Callable[[Tensor], Tensor]) -> tuple[Form | None, str]:
    if hasattr(norm, "_hf_hook"):
        return None, "moves with accelerate's hooks"
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, key) for key in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, key)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or undecided(norm) or not isinstance(eps, float):
        return None, "has no weight (C,) and epsilon"
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, _ROWS, weight.shape[0], generator=generator).to(weight)
    with torch.no_grad():
        try:
            got = run(h)
        except (TypeError, ValueError, RuntimeError) as error:
            return None, f"does not take hidden states alone ({error})"
        for offset in (0.0, 1.0):
            size = h.to(torch.promote_types(h.dtype, torch.float32))
            normed = size * torch.rsqrt(size.square().mean(dim=-1, keepdim=True) + eps)
            want = (weight + offset if offset else weight) * normed.to(h.dtype)
            same = got.shape == h.shape and got.dtype == h.dtype
            # in half precision every bit: norms that round elsewhere are left alone
            exact = h.dtype not in (torch.float32, torch.float64)
            if same and (torch.equal(got, want) if exact else torch.allclose(got, want, rtol=1e-5, atol=1e-6)):
                return Form(eps, offset), ""
    return None, "is not RMSNorm in Llama's form" + (
        ", but Liger's in another" if hasattr(norm, "casting_mode") else ""
    )


def patch(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Restore:
    """Replaces ``forward`` of this one module. Hooks of the module, such as ZeRO-3's that gather its weight, run around
    it as before."""
    undo = Restore(module, module.__dict__.get("forward"))
    module.forward = forward  # type: ignore[method-assign, assignment]
    return undo


class Restore:
    """Called, it gives a module its own ``forward`` back."""

    def __init__(self, module: nn.Module, own: Any) -> None:
        self.module, self.own = module, own

    def __call__(self) -> None:
        if self.own is None:
            del self.module.forward
        else:
            self.module.forward = self.own
