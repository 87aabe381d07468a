"""Parts of files, as ``offset`` and ``duration`` name them: what slicing the whole gives, without decoding it all."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from torch.nn.functional import cosine_similarity

from avsr.data import container, video
from avsr.data.audio import load_audio
from avsr.data.clip import load_clip
from avsr.data.cut import Cut
from avsr.data.manifest import Utterance
from avsr.data.video import read_video, read_video_sound
from avsr.errors import UserError

SECONDS = 20
CUTS = [Cut(0.0, 1.0), Cut(3.301, 0.5), Cut(17.44, 0.5), Cut(7.02, 0.04), Cut(11.333, 3.1), Cut(19.5, 0.5)]


def speech(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """Tones that differ from one tenth of a second to the next."""
    time = np.arange(round(rate * seconds)) / rate
    hertz = np.random.default_rng(0).uniform(150, 900, round(seconds * 10) + 1)[(time * 10).astype(int)]
    return (0.3 * np.sin(2 * np.pi * np.cumsum(hertz) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [("a.wav", 16_000, 1), ("a.flac", 16_000, 2), ("a.ogg", 16_000, 1), ("a.mp3", 16_000, 1), ("b.wav", 44_100, 2)],
)
def test_a_part_of_a_sound_file(tmp_path: Path, name: str, rate: int, channels: int) -> None:
    wave = np.stack([speech(rate)] * channels, 1)
    soundfile.write(str(tmp_path / name), wave, rate)
    whole = torch.from_numpy(soundfile.read(str(tmp_path / name), dtype="float32", always_2d=True)[0]).mean(dim=1)
    for cut in CUTS:
        first = round(cut.offset * rate)
        wanted = whole[first : first + round(cut.seconds * rate)]
        if rate != 16_000:
            wanted = torchaudio.functional.resample(wanted, rate, 16_000)
        found = load_audio(tmp_path / name, cut=cut)
        if name == "a.mp3":  # libsndfile decodes it a little differently with every size of its blocks
            assert cosine_similarity(found, wanted, dim=0) > 0.99 and len(found) == len(wanted)
        else:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def film(path: Path, codec: str, sound: str, gop: int = 50, **options: str) -> None:
    """A bar that moves, and the sound of :func:`speech`."""
    columns = np.arange(48)[None]
    wave, rate = speech(48_000), 48_000
    with av.open(str(path), "w") as target:
        stream: Any = target.add_stream(codec, rate=25, options=options)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        stream.gop_size, stream.thread_count = gop, 1
        track: Any = target.add_stream(sound, rate=rate, layout="mono", bit_rate=96_000) if sound else None
        resampler = (
            av.AudioResampler(track.format, "mono", rate, track.codec_context.frame_size or 0) if sound else None
        )
        for index in range(SECONDS * 25):
            bar = np.abs(columns - index * 3 % 48) < 5
            grey = np.where(np.repeat(bar, 48, 0), 20 + index % 7, 140 + index % 100).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="gray").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            target.mux(stream.encode(frame))
            if resampler is not None:
                part = av.AudioFrame.from_ndarray(wave[None, index * 1920 : (index + 1) * 1920], "fltp", "mono")
                part.sample_rate, part.pts, part.time_base = rate, index * 1920, Fraction(1, rate)
                for piece in resampler.resample(part):
                    target.mux(track.encode(piece))
        target.mux(stream.encode())
        if track is not None:
            target.mux(track.encode())


FAST = {"preset": "ultrafast"}
FILMS: list[tuple[str, str, str, dict[str, str]]] = [
    ("a.mp4", "libx264", "aac", {**FAST, "bf": "3"}),
    ("open.mp4", "libx264", "", {**FAST, "bf": "3", "x264-params": "open-gop=1"}),
    ("a.mkv", "libx264", "libopus", FAST),
    ("a.avi", "mpeg4", "pcm_s16le", {}),
    ("a.ts", "libx264", "mp2", {**FAST, "bf": "2"}),
    ("a.mpg", "mpeg2video", "mp2", {"bf": "2"}),
    ("a.flv", "flv1", "", {}),
    ("a.h264", "libx264", "", FAST),
]


@pytest.mark.parametrize(("name", "codec", "sound", "options"), FILMS)
def test_a_part_of_a_film(tmp_path: Path, name: str, codec: str, sound: str, options: dict[str, str]) -> None:
    path = tmp_path / name
    film(path, codec, sound, **options)
    whole, heard = read_video(path), read_video_sound(path)
    for cut in CUTS:
        first = round(cut.offset * 25)
        assert torch.equal(read_video(path, cut=cut), whole[first : first + max(1, round(cut.seconds * 25))]), cut
        if heard is None:
            continue
        first = round(cut.offset * 16_000)
        wanted, found = heard[first : first + round(cut.seconds * 16_000)], read_video_sound(path, cut=cut)
        # Matroska counts milliseconds, and the last sample may fall to either side
        assert found is not None and abs(len(found) - len(wanted)) < 20
        shifts = range(-8, 9) if path.suffix == ".mkv" else (0,)
        middle = wanted[8 : min(len(found), len(wanted)) - 8]
        likeness = [cosine_similarity(found[8 + k :][: len(middle)], middle, dim=0) for k in shifts]
        assert max(likeness) > 0.99, cut


def test_a_key_frame_may_be_far_away(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", "libx264", "", gop=10_000, preset="ultrafast")
    whole = read_video(tmp_path / "a.mp4")
    assert torch.equal(read_video(tmp_path / "a.mp4", cut=Cut(18.0, 1.0)), whole[450:475])


@pytest.mark.parametrize(("name", "codec", "sound"), [("a.mp4", "libx264", "aac"), ("a.mkv", "libx264", "flac")])
def test_the_rest_of_a_film_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, sound: str
) -> None:
    film(tmp_path / name, codec, sound, gop=25)
    count = 0

    def counted(frame: Any) -> float | None:
        nonlocal count
        count += 1
        return container.seconds_of(frame)

    monkeypatch.setattr(video, "seconds_of", counted)
    assert len(read_video(tmp_path / name, cut=Cut(12.0, 1.0))) == 25
    assert count < 100
    monkeypatch.undo()
    taken = []
    monkeypatch.setattr(video, "_resampled", lambda *given: taken.append(given[1]) or [])
    read_video_sound(tmp_path / name, cut=Cut(18.0, 0.5))
    assert sum(frame.samples for frame in taken if frame is not None) < 4 * 48_000


def test_the_rest_of_a_sound_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(str(tmp_path / "a.flac"), speech(16_000), 16_000)
    read, count = soundfile.SoundFile.read, 0

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        found = read(self, *args, **options)
        count += len(found)
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert len(load_audio(tmp_path / "a.flac", cut=Cut(12.0, 1.0))) == count == 16_000


def test_parts_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    film(path, "libx264", "aac", preset="ultrafast")
    soundfile.write(str(tmp_path / "a.wav"), speech(16_000), 16_000)
    for offset in (20.0, 20.5, 4_000.0):
        cut = Cut(offset, 1.0)
        for read, file in ((read_video, path), (read_video_sound, path), (load_audio, tmp_path / "a.wav")):
            with pytest.raises(UserError, match=f"m:1: {file} .*'offset'.*{offset:g} s"):
                read(file, where="m:1", cut=cut)
    # what there is of a part that begins before the end; that it is shorter than declared is known by its length
    cut = Cut(19.0, 5.0)
    assert len(read_video(path, cut=cut)) == 25 and len(load_audio(tmp_path / "a.wav", cut=cut)) == 16_000
    wave = read_video_sound(path, cut=cut)
    assert wave is not None and abs(len(wave) - 16_000) < 20


def test_sound_and_mouth_of_a_clip_are_of_the_same_part(tmp_path: Path) -> None:
    from avsr.data.video_writer import write_video

    mouths = np.random.default_rng(0).integers(0, 255, (200, 12, 12)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    write_video(tmp_path / "a.mp4", mouths)
    soundfile.write(str(tmp_path / "a.wav"), speech(16_000, 8), 16_000, subtype="FLOAT")
    files = {"audio": tmp_path / "a.wav", "video": tmp_path / "a.mp4"}
    row = Utterance(id="u", text="x", duration=1.2, offset=6.4, **files)  # type: ignore[arg-type]
    clip = load_clip(row, {"audio", "video"}, 0.2)
    assert clip.wave is not None and clip.mouth is not None and (clip.samples, clip.video_frames) == (19_200, 30)
    assert torch.equal(clip.wave, load_audio(tmp_path / "a.wav")[102_400:121_600])
    assert torch.equal(clip.mouth, read_video(tmp_path / "a.mp4")[160:190])
