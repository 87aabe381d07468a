"""The visual front end of AV-HuBERT and Auto-AVSR: a 3D convolution and a ResNet-18 over every frame.

Module names are those of the official state dicts (``frontend3D``, ``trunk.layer1`` and so on).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avsr.runtime.transfer import on_device

_REACH = 2  # frames that the 3D convolution sees on either side
_CHUNK = 256  # frames processed at once, which bounds the memory for long clips and large batches


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a PReLU with one slope for each channel."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.PReLU(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)


class Trunk(nn.Module):
    """ResNet-18 without its stem and classifier: (N, c, h, w) -> (N, 8 c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

        self.layer1 = stage(channels, channels, 1)
        self.layer2 = stage(channels, 2 * channels, 2)
        self.layer3 = stage(2 * channels, 4 * channels, 2)
        self.layer4 = stage(4 * channels, 8 * channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))


class VisualFrontEnd(nn.Module):
    """Gray frames to one vector per frame. ``channels`` is 64 in the official models, ``width`` 8 times that."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.width = 8 * channels
        self.frontend3D = nn.Sequential(
            nn.Conv3d(1, channels, (5, 7, 7), (1, 2, 2), (_REACH, 3, 3), bias=False),
            nn.BatchNorm3d(channels),
            nn.PReLU(channels),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.trunk = Trunk(channels)

    def use_channels_last(self) -> None:
        """Lays the weights of the 2D convolutions out as tensor cores read them; their inputs and outputs follow."""
        self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, H, W) normalized frames, (B,) lengths (0 allowed) -> (B, T, width), zeros after a row's end.

        The rows are concatenated with as many zero frames between them as the 3D convolution reaches: every row gives
        what it gives alone, and nothing is computed on padding.
        """
        rows, steps = frames.shape[:2]
        counts, device = lengths.tolist(), frames.device
        # of every packed frame: its place in ``frames``, or none for the zeros after a row
        places = [b * steps + t if t < count else None for b, count in enumerate(counts) for t in range(count + _REACH)]
        padding = on_device([place is None for place in places], device)
        packed = frames.flatten(0, 1).index_select(0, on_device([place or 0 for place in places], device))
        packed = packed.masked_fill(padding[:, None, None], 0)
        chunks = range(0, len(places), _CHUNK)
        parts = [self._chunk(packed, places[first : first + _CHUNK], first) for first in chunks]
        filled = on_device([place for place in places if place is not None], device, torch.int64)
        out = frames.new_zeros(rows * steps, self.width)
        return out.index_copy(0, filled, torch.cat(parts)).unflatten(0, (rows, steps))

    def _chunk(self, packed: Tensor, places: list[int | None], first: int) -> Tensor:
        begin = max(first - _REACH, 0)
        x = self.frontend3D(packed[None, None, begin : first + _CHUNK + _REACH])
        real = [index + first - begin for index, place in enumerate(places) if place is not None]
        return self.trunk(x[0].index_select(1, on_device(real, packed.device, torch.int64)).transpose(0, 1))
