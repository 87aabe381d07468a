"""Reads sound files of any format that soundfile supports, as mono at 16 kHz."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from avsr.data.rates import SAMPLE_RATE
from avsr.errors import UserError, at

SILENCE = 1e-4  # peak below which a clip counts as silent (-80 dB)
MAX_SAMPLES = 3600 * 48_000  # of one file: an hour at 48 kHz
RATES = (1000, 400_000)  # Hz

_BLOCK = 2**20  # values read at once, over all channels
_MAX_FILTER = 2**22  # size of the resampling filter; 44.1 kHz needs 71,000, a rate without common factors 700 million


def load_audio(path: Path, *, where: str = "") -> Tensor:
    """(samples,) float32 at 16 kHz, in -1..1.

    Raises:
        UserError: the file is missing, empty, truncated, not audio, silent, not finite, longer than ``MAX_SAMPLES``, or
            has a sample rate that cannot be resampled; the message names it.
    """
    name = f"{at(where)}{path}"
    if not os.path.isfile(path):
        raise UserError(f"{at(where)}there is no file {path}")
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = _checked_rate(file.samplerate, name)
            blocks = _mono(file, name)
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{name} is not a readable sound file: {error}") from error
    if _truncated(path):
        raise UserError(f"{name} is truncated: shorter than its header says")
    if not blocks:
        raise UserError(f"{name} holds no samples")
    wave = torch.cat(blocks)
    refuse_unusable(wave, name)
    if rate != SAMPLE_RATE:
        wave = torchaudio.functional.resample(wave, rate, SAMPLE_RATE)
    return wave


def refuse_unusable(wave: Tensor, name: str) -> None:
    """Raises a ``UserError`` if samples are not finite, or all of them silent; ``name`` is that of their file."""
    if not bool(torch.isfinite(wave).all()):
        raise UserError(f"{name} holds NaN or infinite samples")
    if float(wave.abs().max()) < SILENCE:
        raise UserError(f"{name} is silent (peak below {SILENCE})")


def _checked_rate(rate: int, where: str) -> int:
    """A header may claim any rate: at 1 Hz each sample becomes 16,000, and an odd rate needs a filter of gigabytes."""
    ours, theirs = (value // math.gcd(rate, SAMPLE_RATE) for value in (SAMPLE_RATE, rate))
    if not RATES[0] <= rate <= RATES[1] or ours * (theirs + 12 * max(1, theirs // ours)) > _MAX_FILTER:
        raise UserError(
            f"{where} has a sample rate of {rate} Hz, which cannot be resampled to 16 kHz: convert the file"
        )
    return rate


def _mono(file: soundfile.SoundFile, where: str) -> list[Tensor]:
    """The mean of the channels, in blocks: allocates memory for samples that exist, not for those the header claims."""
    blocks: list[Tensor] = []
    count = 0
    while len(data := file.read(max(1, _BLOCK // file.channels), dtype="float32", always_2d=True)):
        blocks.append(torch.from_numpy(np.ascontiguousarray(data)).mean(dim=1))
        count += len(data)
        if count > MAX_SAMPLES:
            raise UserError(f"{where} holds more than {MAX_SAMPLES} samples: cut it into utterances")
    return blocks


def _truncated(path: Path) -> bool:
    """Whether a WAV file is shorter than its header says, which libsndfile accepts. Writers that cannot seek leave a
    size near 2^31 or 2^32."""
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != b"RIFF":
        return False
    size = struct.unpack("<I", head[4:])[0]
    return size < 0x7FFFF000 and size + 8 > path.stat().st_size + 1
