"""Changes to a clip before it is encoded: noise, time masks, a random crop. Every draw is reproducible."""

from __future__ import annotations

import math
import random
from collections.abc import Set
from dataclasses import dataclass

from torch import Tensor

from avsr.config import AugmentConfig
from avsr.data.clip import Clip
from avsr.data.manifest import Utterance
from avsr.data.noise import CLEAN, Babble, add_babble

CROP = 88  # pixels a side
VIDEO_MASK = (10, 25)  # frames: window of a mask, and one mask per so many (Auto-AVSR)
AUDIO_MASK = (6400, 16000)  # the same in samples
_TEST_SEED = 0


@dataclass(frozen=True)
class Version:
    """A version of a clip: unchanged, with noise at ``snr`` dB, or augmented version number ``draw``."""

    snr: float = CLEAN
    draw: int | None = None

    @property
    def plain(self) -> bool:
        return self.draw is None and self.snr == CLEAN


PLAIN = Version()


class Transforms:
    """Makes versions of clips; everything random depends on the seed, the utterance and the version alone.

    Augmented versions depend on ``seed``; the noise of test sets has a fixed seed, so that runs can be compared.
    """

    def __init__(self, config: AugmentConfig, noise: Babble | None, seed: int) -> None:
        self._config, self._noise, self._seeds = config, noise, (seed, _TEST_SEED)

    def identity(self, version: Version, needs: Set[str]) -> str:
        """Names the changes of a version for an encoder that ``needs`` sound, mouth or both; "" when nothing does."""
        config, parts = self._config, []
        if version.draw is not None and config.time_mask:
            parts.append("time_mask")
        if version.draw is not None and config.random_crop and "video" in needs:
            parts.append("random_crop")
        if "audio" in needs and (version.snr != CLEAN or (version.draw is not None and config.snr)):
            levels = config.snr if version.draw is not None else version.snr
            parts.append(f"snr={levels} {self._noise.identity if self._noise else ''}")
        return f"{' '.join(parts)} draw={version.draw} seed={self._seed(version)}" if parts else ""

    def _seed(self, version: Version) -> int:
        return self._seeds[version.draw is None]

    def __call__(self, clip: Clip, utterance: Utterance, version: Version) -> Clip:
        if version.plain:
            return clip

        def rng(purpose: str) -> random.Random:
            # one generator per change, so that no change depends on the others (see identity)
            return random.Random(f"{self._seed(version)} {utterance.id} {version.draw} {purpose}")

        wave, mouth, snr = clip.wave, clip.mouth, version.snr
        if version.draw is not None:
            if self._config.snr:
                snr = rng("snr").choice(self._config.snr)
            if mouth is not None and self._config.random_crop:
                mouth = random_crop(mouth, CROP, rng("crop"))
            if self._config.time_mask:
                mouth = None if mouth is None else time_mask(mouth, *VIDEO_MASK, rng("video mask"))
                wave = None if wave is None else time_mask(wave, *AUDIO_MASK, rng("audio mask"))
        if wave is not None and snr != CLEAN:
            assert self._noise is not None
            wave = add_babble(wave, self._noise.draw(len(wave), utterance, rng("noise")), snr)
        return Clip(wave, mouth)


def random_crop(frames: Tensor, size: int, rng: random.Random) -> Tensor:
    """One random (size, size) window of all (T, H, W) frames."""
    top = rng.randint(0, frames.shape[1] - size)
    left = rng.randint(0, frames.shape[2] - size)
    return frames[:, top : top + size, left : left + size]


def time_mask(signal: Tensor, window: int, stride: int, rng: random.Random) -> Tensor:
    """Auto-AVSR's adaptive time mask: sets floor((length + stride - 0.1) / stride) spans of fewer than ``window`` steps
    along the first axis to 0."""
    length = len(signal)
    masked = signal.clone()
    for _ in range(math.floor((length + stride - 0.1) / stride)):
        bound, width = rng.randrange(window), rng.randrange(window)
        if bound == 0 or length <= bound:
            continue
        start = rng.randrange(length - bound)
        masked[start : start + width] = 0
    return masked
