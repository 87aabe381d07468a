"""Random augmentation of mouth frames: changes as by another face, camera or light."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from avsr.errors import UserError


@dataclass
class FaceAugmentConfig:
    """Each is drawn once per clip; 0 switches it off.

    Attributes:
        shift: maximal shift of the crop each way, in pixels of the full 96 x 96 frame.
        zoom: maximal relative change of size, once of both sides together and once of each side.
        turn: maximal rotation in degrees.
        gamma: standard deviation of the logarithm of the exponent of the grey values.
        flip: probability that left and right are swapped.
        hide: maximal share of a clip's frames, in one run, that is replaced by the clip's mean.
    """

    shift: float = 4.0
    zoom: float = 0.1
    turn: float = 5.0
    gamma: float = 0.2
    flip: float = 0.5
    hide: float = 0.0


def augment(
    clips: list[Tensor], side: int, pool: int, config: FaceAugmentConfig, draw: torch.Generator
) -> list[Tensor]:
    """[(T, h, w) uint8] averaged by ``pool`` -> [(T, side * side) float32 in 0..255], each augmented on its own."""
    out = []
    for clip in clips:
        frames = 255.0 * (clip.float() / 255.0) ** math.exp(config.gamma * _normal(draw))
        size = torch.tensor([frames.shape[2], frames.shape[1]], dtype=torch.float32)
        grid = affine_grid(_transform(size, side, pool, config, draw)[None], [1, 1, side, side], align_corners=False)
        seen = grid_sample(frames[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
        out.append(_hidden(seen.flatten(1), config.hide, draw))
    return out


def check_augment(config: FaceAugmentConfig, prefix: str = "") -> None:
    """Raises a ``UserError`` that names the key, after ``prefix``, of a value out of range."""
    for key, most in (("shift", 44.0), ("zoom", 0.5), ("turn", 180.0), ("gamma", 2.0), ("flip", 1.0), ("hide", 1.0)):
        if not 0.0 <= getattr(config, key) <= most:
            raise UserError(f"{prefix}{key}: expected 0 to {most:g}, got {getattr(config, key)}")


def _transform(size: Tensor, side: int, pool: int, config: FaceAugmentConfig, draw: torch.Generator) -> Tensor:
    """(2, 3): the pixels of the augmented picture in a frame of ``size`` (x, y), in affine_grid's coordinates."""
    both, across, along = (1.0 + config.zoom * _uniform(draw) for _ in range(3))
    mirror = -1.0 if float(torch.rand((), generator=draw)) < config.flip else 1.0
    angle = math.radians(config.turn * _uniform(draw))
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    scale = torch.tensor([mirror * both * across, both * along])
    # affine_grid's coordinates run from -1 to 1, over the augmented picture and over the frame
    linear = turn * scale * side / size[:, None]
    shift = torch.tensor([_uniform(draw), _uniform(draw)]) * config.shift / pool * 2.0 / size
    return torch.cat([linear, shift[:, None]], dim=1)


def _hidden(frames: Tensor, share: float, draw: torch.Generator) -> Tensor:
    count = int(share * float(torch.rand((), generator=draw)) * len(frames))
    if count:
        first = int(torch.randint(len(frames) - count + 1, (), generator=draw))
        frames[first : first + count] = frames.mean()
    return frames


def _uniform(draw: torch.Generator) -> float:
    return 2.0 * float(torch.rand((), generator=draw)) - 1.0


def _normal(draw: torch.Generator) -> float:
    return float(torch.randn((), generator=draw))
