"""Sound of a clip as a file."""

from __future__ import annotations

import importlib
import io

import numpy as np

from avsr.data.rates import SAMPLE_RATE


def encode_wav(waveform: np.ndarray) -> bytes:
    """A 16-bit mono WAV file of a waveform in -1..1 at ``SAMPLE_RATE``."""
    soundfile = importlib.import_module("soundfile")  # of an extra, and only workers need it
    pcm = np.clip(np.rint(waveform.astype(np.float64) * 32767.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
