"""One utterance's sound and mouth: what is read, how both are cut, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from avsr.data.audio import load_audio
from avsr.data.clip import Clip, load_clip
from avsr.data.manifest import Utterance
from avsr.data.rates import SAMPLE_RATE, SAMPLES_PER_FRAME
from avsr.data.video import read_video, read_video_sound
from avsr.data.video_writer import write_video
from avsr.errors import UserError

BOTH = frozenset({"audio", "video"})


def pictures(frames: int, side: int) -> np.ndarray:
    """(T, side, side) uint8: a bar that moves."""
    columns = np.arange(side)[None, None]
    bar = np.abs(columns - (8 + 2 * np.arange(frames)[:, None, None]) % side) < 6
    return np.broadcast_to(np.where(bar, 40, 160), (frames, side, side)).astype(np.uint8)


def utterance(**paths: Path) -> Utterance:
    return Utterance(id="u", text="x", duration=1.0, where="m.jsonl:3", **{"audio": None, "video": None, **paths})


def sound(path: Path, samples: int) -> Path:
    wave = 0.3 * np.sin(np.arange(samples) / 9)
    soundfile.write(str(path), wave.astype(np.float32), 16_000, subtype="FLOAT")
    return path


def video(path: Path, frames: int, side: int = 96, **options: Any) -> Path:
    write_video(path, pictures(frames, side), **options)
    return path


@pytest.mark.parametrize(
    ("samples", "frames", "expected"),
    [
        (640 * 20, 20, 20),
        (640 * 20 + 1, 20, 20),
        (640 * 22, 20, 20),  # more sound
        (640 * 20 - 1, 20, 20),  # one sample short: filled up
        (640 * 18, 20, 18),  # more video
        (640 * 18 + 7, 20, 19),
    ],
)
def test_both_are_cut_to_the_shorter(tmp_path: Path, samples: int, frames: int, expected: int) -> None:
    row = utterance(audio=sound(tmp_path / "a.wav", samples), video=video(tmp_path / "a.mp4", frames))
    clip = load_clip(row, BOTH, max_mismatch=0.2)
    assert clip.wave is not None and clip.mouth is not None
    assert clip.video_frames == expected and clip.samples == expected * SAMPLES_PER_FRAME
    assert clip.seconds == pytest.approx(expected / 25)
    kept = min(samples, clip.samples)
    assert torch.equal(clip.wave[:kept], load_audio(tmp_path / "a.wav")[:kept])
    assert not clip.wave[kept:].any()
    assert torch.equal(clip.mouth, read_video(tmp_path / "a.mp4")[:expected])
    assert clip.wave.dtype == torch.float32 and clip.mouth.dtype == torch.uint8


def test_streams_that_disagree_are_named_with_both_lengths(tmp_path: Path) -> None:
    row = utterance(audio=sound(tmp_path / "a.wav", 640 * 20), video=video(tmp_path / "a.mp4", 26))
    with pytest.raises(UserError) as caught:
        load_clip(row, BOTH, max_mismatch=0.2)
    for part in ("m.jsonl:3", "'u'", "0.80 s", "1.04 s", "data.max_mismatch = 0.2 s"):
        assert part in str(caught.value)
    assert load_clip(row, BOTH, max_mismatch=0.25).video_frames == 20
    # a single stream is never cut
    assert load_clip(row, {"audio"}, max_mismatch=0.0).samples == 640 * 20
    assert load_clip(row, {"video"}, max_mismatch=0.0).video_frames == 26


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    path, gone = sound(tmp_path / "a.wav", 7000), tmp_path / "gone"
    clip = load_clip(utterance(audio=path, video=gone), {"audio"}, 0.2)
    assert clip.mouth is None and clip.samples == 7000 and clip.video_frames == 0
    clip = load_clip(utterance(audio=gone, video=video(tmp_path / "a.mp4", 9)), {"video"}, 0.2)
    assert clip.wave is None and clip.video_frames == 9 and clip.samples == 0
    assert clip.seconds == pytest.approx(9 / 25)
    assert Clip().seconds == 0


def test_the_sound_may_be_in_the_video_file(tmp_path: Path) -> None:
    wave = 0.3 * np.sin(np.arange(640 * 25) / 9)
    path = video(tmp_path / "a.mp4", 25, sound=wave)
    clip = load_clip(utterance(video=path), BOTH, 0.2)
    assert clip.wave is not None and clip.video_frames == 25 and clip.samples == 640 * 25
    track = read_video_sound(path)
    assert track is not None
    torch.testing.assert_close(clip.wave, track[: 640 * 25], rtol=0, atol=0)
    spoken = torch.from_numpy(wave).float()
    assert torch.nn.functional.cosine_similarity(clip.wave[640:-640], spoken[640:-640], dim=0) > 0.99  # AAC, in step
    # a path to a video as the sound of a row
    assert load_clip(utterance(audio=path), {"audio"}, 0.2).samples == len(track)


@pytest.mark.parametrize(
    ("needs", "parts"),
    [({"audio"}, ["'u' has no audio"]), ({"video"}, ["'u' has no video"]), (BOTH, ["'u' has no audio"])],
)
def test_a_row_without_a_stream(needs: set[str], parts: list[str]) -> None:
    with pytest.raises(UserError, match="m.jsonl:3: ") as caught:
        load_clip(utterance(), needs, 0.2)
    assert all(part in str(caught.value) for part in parts)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    still = np.zeros(640 * 10)
    (tmp_path / "text.mp4").write_text("no video")
    cases = [
        (utterance(audio=tmp_path / "gone.wav"), {"audio"}, ["gone.wav", "no file"]),
        (utterance(video=tmp_path / "gone.mp4"), {"video"}, ["gone.mp4", "no file"]),
        (utterance(video=tmp_path / "gone.mp4"), {"audio"}, ["gone.mp4", "no file"]),
        (utterance(video=tmp_path / "text.mp4"), {"video"}, ["text.mp4", "not a readable video"]),
        (utterance(video=video(tmp_path / "mute.mp4", 10)), {"audio"}, ["mute.mp4", "no sound track"]),
        (utterance(video=video(tmp_path / "still.mp4", 10, sound=still)), {"audio"}, ["still.mp4", "silent"]),
        (utterance(video=video(tmp_path / "small.mp4", 10, 64)), {"video"}, ["small.mp4", "64x64", "96x96", "prepare"]),
        (utterance(video=video(tmp_path / "face.mp4", 10, 256)), {"video"}, ["face.mp4", "256x256", "96x96"]),
        (utterance(audio=sound(tmp_path / "a.wav", 9000)), {"video"}, ["'u' has no video"]),
    ]
    write_video(tmp_path / "wide.mp4", np.full((5, 88, 96), 99, np.uint8))
    cases.append((utterance(video=tmp_path / "wide.mp4"), {"video"}, ["wide.mp4", "96x88"]))
    for row, needs, parts in cases:
        with pytest.raises(UserError) as caught:
            load_clip(row, needs, 0.2)
        for part in ["m.jsonl:3", *parts]:
            assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize("side", [88, 96, 128])
def test_usual_mouth_sizes_are_kept_as_they_are(tmp_path: Path, side: int) -> None:
    clip = load_clip(utterance(video=video(tmp_path / "a.mp4", 4, side)), {"video"}, 0.2)
    assert clip.mouth is not None and clip.mouth.shape == (4, side, side)


@pytest.mark.parametrize(
    ("name", "format", "codec"),
    [
        ("a.m4a", "ipod", "aac"),
        ("a.M4A", "ipod", "alac"),
        ("a.aac", "adts", "aac"),
        ("a.wma", "asf", "wmav2"),
        ("a.mka", "matroska", "ac3"),
        ("a.ac3", "ac3", "ac3"),
        ("a.ts", "mpegts", "mp2"),
        ("a.flv", "flv", "aac"),
        ("a.3gp", "3gp", "aac"),
    ],
)
def test_sound_that_libsndfile_does_not_read(tmp_path: Path, name: str, format: str, codec: str) -> None:
    """The frequency, level and length of a tone survive; encoders may add up to 0.15 s of padding."""
    seconds, hertz = 1.5, 440
    rate = 48_000 if codec in ("ac3", "wmav2") else 16_000
    tone = 0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    with av.open(str(tmp_path / name), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", bit_rate=64_000)
        frame = av.AudioFrame.from_ndarray(np.rint(tone * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.rate = rate
        container.mux([packet for part in (frame, None) for packet in stream.encode(part)])
    wave = load_clip(Utterance("a", tmp_path / name, "x", seconds), {"audio"}, 0.2).wave
    assert wave is not None and abs(len(wave) / SAMPLE_RATE - seconds) < 0.15
    middle = wave[8000:16000].numpy()
    assert np.abs(np.fft.rfft(middle)).argmax() == hertz // 2  # bins of 2 Hz
    assert abs(np.sqrt(2 * np.square(middle).mean()) - 0.4) < 0.04


NOISE = np.rint(np.random.default_rng(1).normal(0, 1, (60, 96, 96)))  # of a camera in the dark, or of a codec


# a dark mouth that opens and closes, 7 grey levels from black to white
DIM = 20 + np.rint(7 * (np.hypot(*np.mgrid[-48:48, -48:48]) < 20 + 9 * np.sin(np.arange(60) / 4)[:, None, None]))
DIM = DIM.astype(np.uint8)


@pytest.mark.parametrize(
    ("frames", "part"),
    [
        (np.zeros((10, 96, 96), np.uint8), "shows nothing: all of its pictures are of one grey (0 of 255)"),
        (np.full((1, 96, 96), 255, np.uint8), "shows nothing"),
        (np.arange(60, dtype=np.uint8)[:, None, None].repeat(96, 1).repeat(96, 2), "shows nothing"),
        ((100 + NOISE).astype(np.uint8), "shows nothing"),
        (pictures(1, 96).repeat(60, 0), "stands still: its 60 frames show the same picture"),
        ((pictures(1, 96) + 4 * NOISE).astype(np.uint8), ""),  # a live camera, even if nothing moves
        (pictures(1, 96).repeat(25, 0), ""),  # a second, as before a word
        (np.concatenate([pictures(1, 96).repeat(59, 0), pictures(9, 96)[8:]]), ""),
        (np.concatenate([np.zeros((30, 96, 96), np.uint8), pictures(30, 96)]), ""),
        (DIM, ""),  # it moves by less than the levels of a bright one
    ],
)
def test_mouths_that_show_nothing(tmp_path: Path, frames: np.ndarray, part: str) -> None:
    """As a camera with its lid on, or a player that hangs; compressed, with a little noise."""
    write_video(tmp_path / "a.mp4", frames)
    row = utterance(video=tmp_path / "a.mp4")
    if not part:
        assert load_clip(row, {"video"}, 0.2).video_frames == len(frames)
        return
    with pytest.raises(UserError) as caught:
        load_clip(row, {"video"}, 0.2)
    assert str(caught.value).startswith(f"m.jsonl:3: {tmp_path / 'a.mp4'} ") and part in str(caught.value)


def test_sound_of_no_known_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.m4a").write_bytes(b"no sound")
    with pytest.raises(UserError, match=r"a\.m4a"):
        load_clip(Utterance("a", tmp_path / "a.m4a", "x", 1.0), {"audio"}, 0.2)
