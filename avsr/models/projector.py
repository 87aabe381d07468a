"""The projector from encoder features to the language model's embedding space."""

from __future__ import annotations

from torch import nn


def make_projector(width: int, hidden: int, out: int, layernorm: bool, scale: float) -> nn.Sequential:
    """Linear(width, hidden) - ReLU - Linear(hidden, out) [- LayerNorm(out)], as Llama-AVSR.

    ``scale`` is the standard deviation of the embedding table and the LayerNorm's initial weight: with the default
    of 1, speech tokens would be several times larger than text tokens.
    """
    layers: list[nn.Module] = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out)]
    if layernorm:
        norm = nn.LayerNorm(out)
        nn.init.constant_(norm.weight, scale)
        layers.append(norm)
    return nn.Sequential(*layers)
