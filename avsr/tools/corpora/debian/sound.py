"""The sounds of the packages as waveforms."""

from __future__ import annotations

import functools
import importlib
import io

import numpy as np
import torch
import torchaudio

from avsr.data.audio import SILENCE
from avsr.data.rates import SAMPLE_RATE
from avsr.tools.corpora.debian.spoken import Spoken

SHORTEST, LONGEST = 0.3, 30.0  # seconds; Whisper's window
GAME_RATE = 11_025  # Hz, of Drascula's sounds


class Unusable(Exception):
    """A sound is left out: the short kind of the reason, and the reason in words."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def decode(spoken: Spoken) -> np.ndarray:
    """(samples,) float32 in -1..1 at 16 kHz; of a sound that is too long only so much is decoded.

    Raises:
        Unusable: it cannot be decoded, is shorter than ``SHORTEST``, longer than ``LONGEST``, or silent.
    """
    if spoken.kind == "u8":
        pcm = np.frombuffer(spoken.sound[: _most(GAME_RATE)], np.uint8)
        wave, rate = pcm.astype(np.float32) / 128 - 1, GAME_RATE
    else:
        wave, rate = _decoded(spoken)
    seconds = len(wave) / rate
    if not SHORTEST <= seconds <= LONGEST:
        long = f"more than {LONGEST:g}" if seconds > LONGEST else f"{seconds:.2f}"
        raise Unusable("length", f"{long} s, expected {SHORTEST} to {LONGEST:g}")
    if float(np.abs(wave).max()) < SILENCE:
        raise Unusable("silent", f"its sound is silent (peak below {SILENCE})")
    if rate != SAMPLE_RATE:
        wave = _resampler(rate)(torch.from_numpy(wave)).numpy()
    return wave


@functools.cache
def _resampler(rate: int) -> torchaudio.transforms.Resample:
    """To 16 kHz. To make its filter takes longer than to decode a clip."""
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE, dtype=torch.float32)


def _most(rate: int) -> int:
    """One sample more than the longest sound has."""
    return int(LONGEST * rate) + 1


def _decoded(spoken: Spoken) -> tuple[np.ndarray, int]:
    """The samples of an MP3 or G.722 file, and their rate."""
    av = importlib.import_module("av")  # of an extra
    frames: list[np.ndarray] = []
    count = 0
    try:
        with av.open(io.BytesIO(spoken.sound), format=spoken.kind) as container:
            stream = container.streams.audio[0]
            rate = stream.rate
            for frame in container.decode(stream):
                if len(frame.layout.channels) != 1 or frame.sample_rate != rate:
                    raise ValueError("its channels or its rate change")
                frames.append(frame.to_ndarray()[0])
                count += frame.samples
                if count >= _most(rate):
                    break
    except (av.FFmpegError, ValueError, IndexError, OverflowError) as error:
        raise Unusable("damaged", f"its sound cannot be decoded: {error}") from error
    if not frames:
        raise Unusable("damaged", "its sound has no samples")
    wave = np.concatenate(frames)
    return (wave if wave.dtype == np.float32 else wave.astype(np.float32) / 32768), rate
