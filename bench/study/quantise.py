"""Simulated INT8: the inputs of every linear layer of the decoder are rounded to 8 bits with one scale a tensor.

Symmetric, dynamic: scale = max |x| / 127 over the whole batch, as the per-tensor baseline of SmoothQuant
(arXiv 2211.10438). Weights stay as they are. One outlier coarsens the grid of all others, so this is what massive
activations cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def int8_inputs(decoder: nn.Module) -> Iterator[None]:
    """Inside, every ``nn.Linear`` of the layers of ``decoder`` reads rounded inputs."""
    hooks = [module.register_forward_pre_hook(_round_input) for module in _linear(decoder)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear(decoder: nn.Module) -> list[nn.Module]:
    """The linear layers; one with an adapter counts as one, since the adapter would be merged."""
    layers: Any = decoder.layers
    found = dict(layers.named_modules())
    adapted = [name for name, module in found.items() if hasattr(module, "base_layer")]
    inside = tuple(f"{name}." for name in adapted)
    plain = [m for name, m in found.items() if isinstance(m, nn.Linear) and not name.startswith(inside)]
    return plain + [found[name] for name in adapted]


def rounded(x: Tensor) -> Tensor:
    """``x`` on 255 levels of one scale, in its own dtype."""
    scale = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (torch.round(x.float() / scale) * scale).to(x.dtype)


def _round_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded(args[0]), *args[1:])
