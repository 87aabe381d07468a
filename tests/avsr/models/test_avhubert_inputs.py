"""AV-HuBERT's inputs against the definition of python_speech_features, written down here in plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from avsr.errors import UserError
from avsr.models.avhubert_inputs import _mel_filters, audio_features, audio_frames, video_crop, video_features


def filter_banks() -> np.ndarray:
    """python_speech_features.base.get_filterbanks for 26 filters, 512 points, 16 kHz."""

    def mel_to_hz(mel: float) -> float:
        return 700 * (10 ** (mel / 2595.0) - 1)

    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700.0), 28)
    edges = [math.floor(513 * mel_to_hz(mel) / 16000) for mel in mels]
    bank = np.zeros((26, 257))
    for j in range(26):
        for i in range(edges[j], edges[j + 1]):
            bank[j, i] = (i - edges[j]) / (edges[j + 1] - edges[j])
        for i in range(edges[j + 1], edges[j + 2]):
            bank[j, i] = (edges[j + 2] - i) / (edges[j + 2] - edges[j + 1])
    return bank


def reference(wave: np.ndarray) -> np.ndarray:
    """(samples,) in -1..1 -> (frames, 104), frame by frame in float64."""
    signal = wave.astype(np.float64) * 32768
    signal = np.append(signal[0], signal[1:] - 0.97 * signal[:-1])
    count = 1 if len(signal) <= 400 else 1 + math.ceil((len(signal) - 400) / 160)
    signal = np.append(signal, np.zeros((count - 1) * 160 + 400))
    bank = filter_banks()
    rows = []
    for i in range(count):
        power = np.abs(np.fft.rfft(signal[i * 160 : i * 160 + 400], 512)) ** 2 / 512
        energy = bank @ power
        rows.append(np.log(np.where(energy == 0, np.finfo(float).eps, energy)))
    while len(rows) % 4:
        rows.append(np.zeros(26))
    stacked = np.concatenate(rows).reshape(-1, 104)
    mean, variance = stacked.mean(1, keepdims=True), stacked.var(1, keepdims=True)
    return (stacked - mean) / np.sqrt(variance + 1e-5)


def test_mel_filters_are_those_of_the_definition() -> None:
    np.testing.assert_allclose(_mel_filters().numpy(), filter_banks(), atol=1e-12)


@pytest.mark.parametrize("samples", [1, 399, 400, 401, 560, 1000, 1041, 16000, 12801])
def test_audio_features_against_numpy(samples: int) -> None:
    rng = np.random.default_rng(samples)
    wave = (0.1 * rng.standard_normal(samples)).astype(np.float32)
    wave[samples // 2 : samples // 2 + 700] = 0.0  # digital silence
    ours = audio_features(torch.from_numpy(wave))
    expected = reference(wave)
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape == (audio_frames(samples), 104)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)


def test_the_loudness_is_normalised_away() -> None:
    """Four of the five frames have no filled-up part: their log gain cancels."""
    wave = torch.randn(5 * 640, generator=torch.Generator().manual_seed(0)) * 0.1
    torch.testing.assert_close(audio_features(wave)[:4], audio_features(wave * 0.01)[:4], rtol=0, atol=1e-4)


def test_a_clip_has_as_many_audio_frames_as_video_frames() -> None:
    assert [audio_frames(640 * n) for n in range(1, 60)] == list(range(1, 60))


@pytest.mark.parametrize(("height", "width", "top", "left"), [(96, 96, 4, 4), (88, 88, 0, 0), (101, 90, 6, 1)])
def test_video_is_the_centre_scaled(height: int, width: int, top: int, left: int) -> None:
    mouth = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = (mouth.numpy()[:, top : top + 88, left : left + 88] / 255.0 - 0.421) / 0.165
    np.testing.assert_allclose(video_features(video_crop(mouth)).numpy(), expected, atol=1e-6)


def test_small_mouth_frames_are_refused_with_their_size() -> None:
    with pytest.raises(UserError, match="88 x 88 pixels; these are 96 x 64"):
        video_crop(torch.zeros(2, 64, 96, dtype=torch.uint8))
