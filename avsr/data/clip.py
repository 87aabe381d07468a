"""One clip in memory: what encoders take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SAMPLES_PER_VIDEO_FRAME = 640  # 16 kHz sound, 25 frames a second


@dataclass(frozen=True)
class Clip:
    """Sound, mouth or both of one utterance.

    Attributes:
        wave: (samples,) float32 mono at 16 kHz in -1..1.
        mouth: (T, H, W) uint8 grey at 25 fps; encoders crop it to what they need.
    """

    wave: Tensor | None
    mouth: Tensor | None
