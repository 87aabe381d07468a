"""Reads sound files of any format that soundfile supports, as mono at 16 kHz."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from avsr.data.cut import Cut
from avsr.data.members import is_file, readable
from avsr.data.rates import SAMPLE_RATE
from avsr.data.truncation import truncated
from avsr.errors import UserError, at

SILENCE = 1e-4  # peak below which a clip counts as silent (-80 dB)
LOUDEST = 4.0  # peak: floats may be 12 dB over full scale; integers are above, unless silent (-78 dB of 16 bits)
CANCELLED = 0.05  # peak of the sum of channels, as a share of that of the loudest: one channel that is alone gives 1
MAX_SAMPLES = 3600 * 48_000  # of one file: an hour at 48 kHz
RATES = (1000, 400_000)  # Hz

_BLOCK = 2**20  # values read at once, over all channels
_SETTLING = 5  # seconds read before a part: libsndfile seeks into the last page of Vorbis 24 ms wrong
_MAX_FILTER = 2**22  # size of the resampling filter; 44.1 kHz needs 71,000, a rate without common factors 700 million


def load_audio(path: Path, *, where: str = "", cut: Cut | None = None) -> Tensor:
    """(samples,) float32 at 16 kHz, in -1..1; with ``cut`` that part of the file alone.

    Raises:
        UserError: the file is missing, empty, truncated, not audio, silent, not finite, far outside -1..1, longer than
            ``MAX_SAMPLES``, ends before the cut begins, has channels that cancel each other out, or a sample rate that
            cannot be resampled; the message names it.
    """
    name = f"{at(where)}{path}"
    if not is_file(path):
        raise UserError(f"{at(where)}there is no file {path}")
    missing = ""
    try:
        missing = truncated(path)
        with soundfile.SoundFile(readable(path)) as file:
            rate = _checked_rate(file.samplerate, name)
            count = MAX_SAMPLES + 1
            if cut is not None:
                first, wanted = cut.steps(rate)
                count = min(count, wanted)
                if first >= file.frames:
                    raise UserError(f"{name} lasts {file.frames / rate:.2f} s, and the 'offset' is {cut.offset:g} s")
                before = min(first, _SETTLING * rate) if file.format == "OGG" else 0
                file.seek(first - before)
                file.read(before)
            wave = _mono(file, count, name)
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError, ValueError) as error:
        why = f"truncated or damaged: {missing}" if missing else f"not a readable sound file: {error}"
        raise UserError(f"{name} is {why}") from error
    if missing:
        raise UserError(f"{name} is truncated or damaged: {missing}")
    if not len(wave):
        raise UserError(f"{name} holds no samples")
    if len(wave) > MAX_SAMPLES:
        raise UserError(f"{name} holds more than {MAX_SAMPLES} samples: cut it into utterances")
    refuse_unusable(wave, name)
    if rate != SAMPLE_RATE:
        wave = torchaudio.functional.resample(wave, rate, SAMPLE_RATE)
    return wave


def refuse_unusable(wave: Tensor, name: str) -> None:
    """Raises a ``UserError`` if samples cannot be heard, or all of them are silent; ``name`` is that of their file."""
    refuse_impossible(wave, name)
    if float(wave.abs().max()) < SILENCE:
        raise UserError(f"{name} is silent (peak below {SILENCE})")


def refuse_impossible(wave: Tensor, name: str) -> None:
    """Raises a ``UserError`` if samples are not finite, or far outside -1..1."""
    if not bool(torch.isfinite(wave).all()):
        raise UserError(f"{name} holds NaN or infinite samples")
    peak = float(wave.abs().max()) if len(wave) else 0.0
    if peak > LOUDEST:
        raise UserError(
            f"{name} has a peak of {peak:g}, and samples are shares of full scale, -1 to 1: integers in a file of "
            "floats? Divide them by the largest (32768 for 16 bits)"
        )


def refuse_cancelled(wave: Tensor, loudest: float, channels: int, name: str) -> None:
    """Raises a ``UserError`` if channels with the peak ``loudest`` have next to nothing as their mean ``wave``."""
    if loudest > SILENCE and float(wave.abs().max()) * channels < CANCELLED * loudest:
        raise UserError(
            f"{name} has {channels} channels that cancel each other out (peak {loudest:.2g}, of their mean "
            f"{float(wave.abs().max()):.2g}): one is inverted; invert it, or keep one channel"
        )


def _checked_rate(rate: int, where: str) -> int:
    """A header may claim any rate: at 1 Hz each sample becomes 16,000, and an odd rate needs a filter of gigabytes."""
    ours, theirs = (value // math.gcd(rate, SAMPLE_RATE) for value in (SAMPLE_RATE, rate))
    if not RATES[0] <= rate <= RATES[1] or ours * (theirs + 12 * max(1, theirs // ours)) > _MAX_FILTER:
        raise UserError(
            f"{where} has a sample rate of {rate} Hz, which cannot be resampled to 16 kHz: convert the file"
        )
    return rate


def _mono(file: soundfile.SoundFile, most: int, name: str) -> Tensor:
    """The mean of the channels, at most so many samples. In blocks: allocates memory for samples that exist, not for
    those the header claims."""
    blocks = [torch.empty(0)]
    count, loudest = 0, 0.0
    size = max(1, _BLOCK // file.channels)
    while count < most and len(data := file.read(min(size, most - count), dtype="float32", always_2d=True)):
        loudest = max(loudest, float(np.abs(data).max()))
        blocks.append(torch.from_numpy(np.ascontiguousarray(data)).mean(dim=1))
        count += len(data)
    wave = torch.cat(blocks)
    if count:
        refuse_cancelled(wave, loudest, file.channels, name)
    return wave
