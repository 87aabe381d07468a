"""Babble noise: a sound file, or talkers mixed out of a corpus, added at a given signal-to-noise ratio."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

import torch
import torchaudio
from torch import Tensor

from avsr.config import Config, NoiseConfig
from avsr.data.audio import load_audio
from avsr.data.manifest import Utterance, read_manifest
from avsr.errors import UserError

CLEAN = float("inf")  # dB


class Babble:
    """Noise for a clip, the same for the same random generator.

    From a manifest: ``talkers`` utterances of other speakers, each repeated from a random start over the clip's
    length and brought to the same power, are added up. From a file: a random segment of it.
    """

    def __init__(self, config: NoiseConfig, manifest: str) -> None:
        self._talkers = config.talkers
        self._wave = load_audio(Path(config.file), where="noise.file") if config.file else None
        self._utterances: list[Utterance] = []
        if config.file is None:
            bad: list[str] = []
            rows = read_manifest(config.babble or manifest, on_bad=bad.append)
            self._utterances = [row for row in rows if row.audio is not None]
            if not self._utterances:
                raise UserError(f"noise.babble: {config.babble or manifest} names no sound; name a noise.file")
        self.identity = f"babble {config.file or config.babble or manifest} talkers={config.talkers}"

    def draw(self, samples: int, speaker: str, rng: random.Random) -> Tensor:
        """(samples,) float32 noise for a clip of ``speaker``."""
        if self._wave is not None:
            return _segment(self._wave, samples, rng)
        others = [u for u in self._utterances if not speaker or u.speaker != speaker] or self._utterances
        total = torch.zeros(samples)
        for utterance in rng.sample(others, min(self._talkers, len(others))):
            assert utterance.audio is not None
            piece = _segment(_cached(utterance.audio), samples, rng)
            total += piece / piece.square().mean().sqrt().clamp(min=1e-6)
        return total


def add_babble(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    """``wave`` with ``noise`` scaled so that 10 log10(power of wave / power of noise) = ``snr`` dB over the clip."""
    if snr == CLEAN:
        return wave
    return torchaudio.functional.add_noise(wave, noise, torch.tensor(float(snr)))


def make_babble(config: Config) -> Babble | None:
    """The noise source that the config's levels need, or None when they are all clean."""
    levels = [*config.noise.snr, *config.augment.snr]
    if all(level == CLEAN for level in levels):
        return None
    return Babble(config.noise, config.data.train)


def _segment(wave: Tensor, samples: int, rng: random.Random) -> Tensor:
    start = rng.randrange(len(wave))
    repeated = torch.cat([wave[start:], wave.repeat(-(-samples // len(wave)))])
    return repeated[:samples]


@lru_cache(maxsize=512)
def _cached(path: Path) -> Tensor:
    return load_audio(path, where="noise.babble")
