"""Sound files of many kinds are read, anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from avsr.data.audio import load_audio, refuse_unusable
from avsr.data.rates import SAMPLE_RATE
from avsr.data.video import read_video_sound
from avsr.errors import UserError


def tone(frequency: float, seconds: float, rate: int, amplitude: float = 0.5) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def peak_frequency(wave: torch.Tensor) -> float:
    spectrum = np.abs(np.fft.rfft(wave.numpy() * np.hanning(len(wave))))
    return float(np.argmax(spectrum)) * SAMPLE_RATE / len(wave)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_audio(path, where="m.jsonl:4")
    message = str(caught.value)
    assert message.startswith("m.jsonl:4: ") and str(path) in message and "\n" not in message
    return message


def test_a_wav_at_16_khz_comes_through_unchanged(tmp_path: Path) -> None:
    samples = tone(440, 0.5, 16_000)
    soundfile.write(str(tmp_path / "a.wav"), samples, 16_000, subtype="FLOAT")
    wave = load_audio(tmp_path / "a.wav")
    assert wave.dtype == torch.float32 and wave.shape == (8000,)
    assert torch.equal(wave, torch.from_numpy(samples))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_duration_frequency_and_level(tmp_path: Path, rate: int) -> None:
    soundfile.write(str(tmp_path / "a.wav"), tone(1000, 1.0, rate), rate)
    wave = load_audio(tmp_path / "a.wav")
    assert abs(len(wave) - 16_000) <= 1
    assert abs(peak_frequency(wave) - 1000) < 2
    middle = wave[2000:-2000]
    assert abs(float(middle.square().mean().sqrt()) - 0.5 / 2**0.5) < 0.01


def test_what_16_khz_cannot_hold_is_filtered_and_not_folded_down(tmp_path: Path) -> None:
    soundfile.write(str(tmp_path / "a.wav"), tone(1000, 1.0, 48_000) + tone(12_000, 1.0, 48_000, 0.4), 48_000)
    wave = load_audio(tmp_path / "a.wav")
    spectrum = np.abs(np.fft.rfft(wave.numpy() * np.hanning(len(wave))))
    assert spectrum[4000] < 0.01 * spectrum[1000]  # 12 kHz would fold to 4 kHz


def test_stereo_becomes_the_mean_of_its_channels(tmp_path: Path) -> None:
    left, right = tone(300, 0.2, 16_000), tone(700, 0.2, 16_000, 0.2)
    soundfile.write(str(tmp_path / "a.wav"), np.stack([left, right], 1), 16_000, subtype="FLOAT")
    wave = load_audio(tmp_path / "a.wav")
    assert wave.shape == (3200,)
    torch.testing.assert_close(wave, torch.from_numpy((left + right) / 2), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("name", "tolerance"), [("a.flac", 1e-4), ("a.ogg", 0.05), ("a.mp3", 0.1)])
def test_other_formats(tmp_path: Path, name: str, tolerance: float) -> None:
    if name.split(".")[1].upper() not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {name}")
    samples = tone(440, 1.0, 16_000)
    soundfile.write(str(tmp_path / name), samples, 16_000)
    wave = load_audio(tmp_path / name)
    assert abs(len(wave) - 16_000) < 1600  # MP3 pads
    assert abs(peak_frequency(wave) - 440) < 2
    assert abs(float(wave[4000:12_000].abs().max()) - 0.5) < tolerance


def test_a_quiet_clip_is_not_silent(tmp_path: Path) -> None:
    soundfile.write(str(tmp_path / "a.wav"), tone(440, 0.2, 16_000, 0.001), 16_000, subtype="FLOAT")
    assert 0.0009 < float(load_audio(tmp_path / "a.wav").abs().max()) < 0.0011


def written(path: Path, samples: np.ndarray, keep: int | None = None, **options: Any) -> None:
    soundfile.write(str(path), samples, 16_000, **options)
    path.write_bytes(path.read_bytes()[:keep])


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
TONE = tone(440, 0.5, 16_000)


@pytest.mark.parametrize(
    ("name", "make", "part"),
    [
        ("a.wav", lambda path: None, "no file"),
        ("a.wav", Path.mkdir, "no file"),
        *((name, Path.touch, "not a readable sound file") for name in ("a.wav", "a.flac", "a.ogg")),
        *((n, lambda path: path.write_text("no sound\n" * 50), "not a readable") for n in ("a.wav", "a.txt", "a.mp3")),
        ("a.wav", lambda path: written(path, np.zeros(0, np.float32)), "no samples"),
        *(("a.wav", lambda path, keep=keep: written(path, TONE, keep), "") for keep in (10, 30, 44)),
        ("a.wav", lambda path: written(path, TONE, 8044), "truncated"),  # 4,000 of 8,000 samples
        ("a.flac", lambda path: written(path, NOISE, 10_000), ""),
        ("a.wav", lambda path: written(path, np.zeros(16_000, np.float32)), "silent"),
        *(
            ("a.wav", lambda path, x=x: written(path, np.append(TONE, np.float32(x)), subtype="FLOAT"), "NaN or inf")
            for x in (np.nan, np.inf, -np.inf)
        ),
    ],
)
def test_what_is_no_sound_is_refused(tmp_path: Path, name: str, make: Callable[[Path], Any], part: str) -> None:
    make(tmp_path / name)
    assert part in refusal(tmp_path / name)


def heard_of_video(path: Path, where: str = "") -> torch.Tensor:
    """As clips read the sound of videos."""
    wave = read_video_sound(path, where=where)
    assert wave is not None
    refuse_unusable(wave, f"{where}: {path}")
    return wave


@pytest.mark.parametrize(
    ("wave", "part"),
    [
        (TONE * 32_767, "a peak of 16383.5"),  # 16-bit integers
        (TONE * 255, "integers in a file of floats?"),
        (tone(440, 0.5, 16_000, 100 / 32_768) * 32_767, "a peak of 99.9"),  # of a very quiet speaker
        (TONE * 8.1, "a peak of 4.05"),
        (TONE * 7.9, ""),  # 12 dB over full scale
        (TONE * 2.4, ""),
        (np.stack([TONE, -TONE], 1), "2 channels that cancel each other out (peak 0.5, of their mean 0)"),
        (np.stack([TONE, -0.98 * TONE], 1), "cancel each other out"),
        (np.stack([TONE, TONE, -TONE, -TONE], 1), "4 channels that cancel"),
        (np.stack([TONE, 0 * TONE], 1), ""),
        (np.stack([TONE, *[0 * TONE] * 7], 1), ""),
        (np.stack([TONE, -0.7 * TONE], 1), ""),
        (np.stack([0 * TONE, 0 * TONE], 1), "silent"),
    ],
)
@pytest.mark.parametrize("read", [load_audio, heard_of_video])
def test_what_cannot_be_speech(tmp_path: Path, wave: np.ndarray, part: str, read: Any) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(str(path), wave, 16_000, subtype="FLOAT")
    if part:
        with pytest.raises(UserError) as caught:
            read(path, where="m.jsonl:4")
        assert str(caught.value).startswith(f"m.jsonl:4: {path} ") and part in str(caught.value)
    else:
        mean = wave if wave.ndim == 1 else wave.mean(axis=1)
        torch.testing.assert_close(read(path), torch.from_numpy(mean), rtol=0, atol=1e-6)


def test_a_wav_written_to_a_pipe_is_not_truncated(tmp_path: Path) -> None:
    """Programs that cannot seek back leave the sizes in the header at their largest value."""
    path = tmp_path / "a.wav"
    soundfile.write(str(path), tone(440, 0.5, 16_000), 16_000, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    assert load_audio(path).shape == (8000,)


def test_without_a_place_the_message_begins_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_audio(tmp_path / "no.wav")
    assert not str(caught.value).startswith(":")


@pytest.mark.parametrize("name", ["a" * 300 + ".wav", "a\0b.wav"])
def test_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        load_audio(tmp_path / name)
