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
    layers: Any = decoder.layers
    hooks = [
        module.register_forward_pre_hook(_round_input)
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name  # which would be merged
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounded(x: Tensor) -> Tensor:
    """``x`` on 255 levels of one scale, in its own dtype."""
    scale = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (torch.round(x.float() / scale) * scale).to(x.dtype)


def _round_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded(args[0]), *args[1:])
