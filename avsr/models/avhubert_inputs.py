"""Inputs of AV-HuBERT: stacked log mel energies of the sound, and normalized gray mouth frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from avsr.data.clip import center_crop
from avsr.data.rates import SAMPLE_RATE
from avsr.errors import UserError

WINDOW, HOP = 400, 160  # samples: 25 and 10 ms
FFT = 512
MELS = 26
STACK = 4  # mel frames per audio frame: 25 a second
AUDIO = STACK * MELS
SIDE = 88  # pixels
VIDEO = SIDE * SIDE
_PREEMPHASIS = 0.97
_MEAN, _STD = 0.421, 0.165


def audio_frames(samples: int) -> int:
    """Audio frames of this many samples: mel frames of 25 ms every 10 ms, the last one zero-padded, in groups of 4."""
    mel_frames = 1 + max(0, -(-(samples - WINDOW) // HOP))
    return -(-mel_frames // STACK)


def audio_features(wave: Tensor) -> Tensor:
    """(samples,) float32 in -1..1 at 16 kHz -> (frames, 104) float32.

    ``python_speech_features.logfbank`` of the 16-bit samples (25/10 ms, 26 mel filters, pre-emphasis 0.97), 4 mel
    frames per audio frame, layer-normalized over the 104 features. The 16-bit scale of the official model's training
    matters only where zeros pad the last group. Computed in float64, as there: the energies of near silence are
    differences of large numbers.
    """
    signal = wave.double() * 32768.0
    signal = torch.cat([signal[:1], signal[1:] - _PREEMPHASIS * signal[:-1]])
    count = 1 + max(0, -(-(len(signal) - WINDOW) // HOP))
    missing = (count - 1) * HOP + WINDOW - len(signal)
    windows = torch.nn.functional.pad(signal, (0, max(missing, 0))).unfold(0, WINDOW, HOP)
    power = torch.fft.rfft(windows, FFT).abs().square() / FFT
    energies = power @ _mel_filters().T.to(power.device)
    energies = torch.where(energies == 0, torch.finfo(torch.float64).eps, energies).log()
    stacked = torch.nn.functional.pad(energies, (0, 0, 0, -count % STACK)).reshape(-1, AUDIO)
    return torch.nn.functional.layer_norm(stacked.float(), (AUDIO,))


def video_crop(mouth: Tensor) -> Tensor:
    """The central (T, 88, 88) of (T, H, W) gray frames.

    Raises:
        UserError: the frames are smaller than that.
    """
    height, width = mouth.shape[1:]
    if height < SIDE or width < SIDE:
        raise UserError(f"AV-HuBERT reads mouth frames of {SIDE} x {SIDE} pixels; these are {width} x {height}")
    return center_crop(mouth, SIDE, SIDE)


def video_features(grey: Tensor) -> Tensor:
    """uint8 gray values of any shape -> float32, scaled as in the model's training."""
    return (grey.float() / 255.0 - _MEAN) / _STD


def _mel_filters() -> Tensor:
    """(26, 257) float64 triangles between FFT bins, which are rounded down: bin = floor(513 * hz / 16000)."""
    top = 2595.0 * math.log10(1.0 + SAMPLE_RATE / 2 / 700.0)
    mel = torch.linspace(0.0, top, MELS + 2, dtype=torch.float64)
    edges = torch.floor((FFT + 1) * 700.0 * (10.0 ** (mel / 2595.0) - 1.0) / SAMPLE_RATE)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = torch.arange(FFT // 2 + 1, dtype=torch.float64)
    return torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp(min=0.0)
