"""Reading sound: any format that soundfile knows, mixed to mono, resampled to 16 kHz."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor

from avsr.errors import UserError

SAMPLE_RATE = 16_000
SILENCE = 1e-4  # peak below which a clip counts as silent (-80 dB)


def load_audio(path: Path, *, where: str = "") -> Tensor:
    """(samples,) float32 at 16 kHz, in -1..1.

    Raises:
        UserError: missing, empty, truncated, non-audio, silent or not finite, naming the file.
    """
    prefix = f"{where}: " if where else ""
    if not os.path.isfile(path):
        raise UserError(f"{prefix}there is no file {path}")
    try:
        data, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise UserError(f"{prefix}{path} is not a readable sound file: {error}") from error
    if _truncated(path):
        raise UserError(f"{prefix}{path} is truncated: shorter than its header says")
    if data.shape[0] == 0:
        raise UserError(f"{prefix}{path} holds no samples")
    wave = torch.from_numpy(data).mean(dim=1)
    if not bool(torch.isfinite(wave).all()):
        raise UserError(f"{prefix}{path} holds NaN or infinite samples")
    if float(wave.abs().max()) < SILENCE:
        raise UserError(f"{prefix}{path} is silent (peak below {SILENCE})")
    if rate != SAMPLE_RATE:
        wave = torchaudio.functional.resample(wave, rate, SAMPLE_RATE)
    return wave


def _truncated(path: Path) -> bool:
    """A WAV file shorter than its header says; libsndfile reads what is there. Writers that cannot seek leave a
    size near 2^31 or 2^32."""
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] != b"RIFF":
        return False
    size = struct.unpack("<I", head[4:])[0]
    return size < 0x7FFFF000 and size + 8 > path.stat().st_size + 1
