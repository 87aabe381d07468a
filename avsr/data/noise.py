"""Babble noise: a sound file, or talkers mixed from a corpus, added at a given signal-to-noise ratio."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch
import torchaudio
from torch import Tensor

from avsr.config import NoiseConfig
from avsr.data.audio import load_audio
from avsr.data.manifest import Utterance
from avsr.data.talkers import open_talkers, source_of
from avsr.errors import UserError

CLEAN = float("inf")  # dB


class Babble:
    """Noise for a clip; determined by the random generator that is passed in.

    From a manifest: the sum of ``talkers`` utterances of other speakers, each repeated from a random start over the
    clip's length and scaled to the same power. They are among ``config.pool`` utterances that are the same for all
    clips. From a file: a random segment of it. Where a manifest does not name speakers, every utterance except the clip
    itself may be used.

    Args:
        config: file, or manifest and number of talkers.
        manifest: used when ``config.babble`` is null.
        absolute: as of :func:`~avsr.data.manifest.read_manifest`.

    Raises:
        UserError: the file or manifest cannot be read.
    """

    def __init__(self, config: NoiseConfig, manifest: str, absolute: bool = False) -> None:
        self._count = config.talkers
        self._source = config.file or config.babble or manifest
        self._wave = load_audio(Path(config.file), where="noise.file") if config.file else None
        pool = ""
        if config.file is None:
            self._talkers = open_talkers(self._source, config.pool, absolute)
            speakers = self._talkers.speakers
            self._own = {
                name: (bisect_left(speakers, name), bisect_right(speakers, name)) for name in {*speakers} - {""}
            }
            self._place = {source: index for index, source in enumerate(self._talkers.sources)}
            pool = "" if len(self._talkers) == self._talkers.total else f" pool={config.pool}"
        stat = Path(self._source).stat()
        self.identity = f"babble {self._source} {stat.st_size} {stat.st_mtime_ns} talkers={config.talkers}{pool}"

    def draw(self, samples: int, clip: Utterance, rng: random.Random) -> Tensor:
        """(samples,) float32 noise for ``clip``.

        Raises:
            UserError: there is no usable sound of another speaker.
        """
        if self._wave is not None:
            return _segment(self._wave, samples, rng)
        total, count = torch.zeros(samples), 0
        for index in self._others(clip, rng):
            wave = self._talkers.wave(index)
            if wave is None:
                continue
            piece = _segment(wave, samples, rng)
            total += piece / piece.square().mean().sqrt()
            count += 1
            if count == self._count:
                break
        if not count:
            raise UserError(
                f"noise.babble: {self._source} holds no usable sound of another speaker than {clip.speaker!r} of "
                f"{clip.id!r}; name another manifest or a noise.file"
            )
        return total

    def _others(self, clip: Utterance, rng: random.Random) -> list[int]:
        """Twice as many utterances of other speakers as there are talkers, since some may be unusable. Never lists all
        others, which would be slow for every clip of a large corpus."""
        place = self._place.get(source_of(clip))
        itself = (0, 0) if place is None else (place, place + 1)
        first, last = self._own.get(clip.speaker, itself)
        count = len(self._talkers) - (last - first)
        chosen = rng.sample(range(count), min(2 * self._count, count))
        return [index if index < first else index + last - first for index in chosen]


def add_babble(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    """``wave`` with ``noise`` scaled so that 10 log10(power of wave / power of noise) = ``snr`` dB over the clip."""
    if snr == CLEAN:
        return wave
    return torchaudio.functional.add_noise(wave, noise, torch.tensor(float(snr)))


def make_babble(config: NoiseConfig, levels: Sequence[float], manifest: str, absolute: bool = False) -> Babble | None:
    """The noise source, with ``manifest`` as the default corpus; None when all ``levels`` (dB) are clean."""
    return None if all(level == CLEAN for level in levels) else Babble(config, manifest, absolute)


def _segment(wave: Tensor, samples: int, rng: random.Random) -> Tensor:
    """(samples,) of the repeated wave from a random start; never silent."""
    start = rng.randrange(len(wave))
    piece = _repeated(wave, start, samples)
    # silence cannot be scaled to a level
    return piece if bool(piece.any()) else _repeated(wave, int(wave.abs().argmax()), samples)


def _repeated(wave: Tensor, start: int, samples: int) -> Tensor:
    if start + samples <= len(wave):
        return wave[start : start + samples]
    return torch.cat([wave[start:], wave.repeat(-(-samples // len(wave)))])[:samples]
