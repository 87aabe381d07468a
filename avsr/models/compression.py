"""Temporal compression: frames are averaged or stacked in groups of ``rate``; an incomplete last group is dropped."""

from __future__ import annotations

from torch import Tensor


def compressed_length(frames: int, rate: int) -> int:
    return frames // rate


def compressed_width(width: int, kind: str, rate: int) -> int:
    return width * rate if kind == "stack" else width


def compress(features: Tensor, kind: str, rate: int) -> Tensor:
    """(B, T, D) -> (B, T // rate, D) for "average", (B, T // rate, rate * D) for "stack".

    Groups start at frame 0, so a padded row of n valid frames has n // rate valid tokens.
    """
    batch, frames, width = features.shape
    tokens = compressed_length(frames, rate)
    groups = features[:, : tokens * rate].reshape(batch, tokens, rate, width)
    return groups.flatten(2) if kind == "stack" else groups.mean(dim=2)
