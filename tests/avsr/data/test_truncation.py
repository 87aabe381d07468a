"""Files that end before they should: whole ones pass in every format, half ones in those alone that cannot tell."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from avsr.data.audio import load_audio
from avsr.data.truncation import truncated
from avsr.data.video import read_video, read_video_sound
from avsr.errors import UserError

FRAMES, RATE = 50, 48_000
RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.integers(0, 255, (FRAMES, 64, 64), dtype=np.uint8)
NOISE = (0.3 * RANDOM.standard_normal(FRAMES * RATE // 25)).astype(np.float32)
SHORT = NOISE[::3][:16_000]  # a second at 16 kHz


def media(path: Path, codec: str, sound: str, **options: str) -> None:
    """Two seconds of pictures and sound, interleaved."""
    with av.open(str(path), "w", options=options) as container:
        video: Any = container.add_stream(codec, rate=25) if codec else None
        if codec:
            video.width, video.height = (720, 576) if path.suffix == ".gxf" else (64, 64)
            video.pix_fmt = {"prores_ks": "yuv422p10le", "gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            video.gop_size = 5
        rate = 8_000 if "amr" in sound else RATE
        track: Any = container.add_stream(sound, rate=rate, layout="mono", bit_rate=64_000) if sound else None
        resampler = av.AudioResampler(
            format=track.format if sound else "s16",
            layout="mono",
            rate=rate,
            frame_size=track.codec_context.frame_size if sound and "pcm" not in sound else 0,
        )
        for index, grey in enumerate(PICTURES):
            if codec:
                frame = av.VideoFrame.from_ndarray(grey, format="gray")
                frame = frame.reformat(width=video.width, height=video.height, format=video.pix_fmt)
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(video.encode(frame))
            if sound:
                samples = NOISE[index * RATE // 25 : (index + 1) * RATE // 25]
                part = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
                part.sample_rate, part.pts, part.time_base = RATE, index * RATE // 25, Fraction(1, RATE)
                for piece in resampler.resample(part):
                    container.mux(track.encode(piece))
        for stream in (video, track):
            if stream is not None:
                container.mux(stream.encode())


def halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def refuses(path: Path, read: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, where="m:1")
    message = str(caught.value)
    assert message.startswith(f"m:1: {path} ") and "\n" not in message
    return message


TOLD = [
    ("a.mp4", "libx264", "aac", {}),
    ("front.mp4", "libx264", "aac", {"movflags": "+faststart"}),
    ("parts.mp4", "libx264", "aac", {"movflags": "+frag_keyframe+empty_moov"}),
    ("a.mov", "prores_ks", "pcm_s16le", {"movflags": "+faststart"}),
    ("a.mkv", "libx264", "aac", {}),
    ("a.webm", "libvpx-vp9", "libopus", {"speed": "8"}),
    ("a.avi", "mpeg4", "pcm_s16le", {}),
    ("mjpeg.avi", "mjpeg", "libmp3lame", {}),
    ("a.wmv", "wmv2", "libmp3lame", {}),
    ("a.flv", "flv1", "libmp3lame", {}),
    ("a.mxf", "mpeg2video", "pcm_s16le", {}),
    ("a.gxf", "mpeg2video", "", {}),
    ("a.ivf", "libvpx-vp9", "", {"speed": "8"}),
    ("a.m4a", "", "aac", {}),
    ("a.mka", "", "flac", {}),
    ("a.wma", "", "wmav2", {}),
    ("a.ogg", "", "libopus", {}),
    ("a.oga", "", "flac", {}),
    ("a.mp3", "", "libmp3lame", {}),
    ("a.flac", "", "flac", {}),
    ("a.tta", "", "tta", {}),
    ("a.wv", "", "wavpack", {}),
    ("a.aiff", "", "pcm_s16be", {}),
    ("a.au", "", "pcm_s16be", {}),
    ("a.w64", "", "pcm_s16le", {}),
    ("a.wav", "", "pcm_s16le", {}),
    ("a.caf", "", "alac", {}),
]
NOT_TOLD = [
    ("a.ts", "libx264", "ac3", {}),
    ("a.mpg", "mpeg2video", "mp2", {}),
    ("a.nut", "ffv1", "pcm_s16le", {}),
    ("a.h264", "libx264", "", {}),
    ("a.gif", "gif", "", {}),
    ("bare.mp3", "", "libmp3lame", {"write_xing": "0"}),
    ("a.aac", "", "aac", {}),
    ("a.ac3", "", "ac3", {}),
    ("a.amr", "", "libopencore_amrnb", {}),
]


@pytest.mark.parametrize(("name", "codec", "sound", "options"), [*TOLD, *NOT_TOLD])
def test_half_a_file(tmp_path: Path, name: str, codec: str, sound: str, options: dict[str, str]) -> None:
    path = tmp_path / name
    media(path, codec, sound, **options)
    if codec:
        assert abs(len(read_video(path)) - FRAMES) <= 2
    if sound:
        wave = read_video_sound(path)
        assert wave is not None and abs(len(wave) - 32_000) < 3_000
    halve(path)
    for read in [read_video] * bool(codec) + [read_video_sound] * bool(sound):
        if (name, codec, sound, options) in TOLD:
            message = refuses(path, read)
            assert any(part in message for part in ("truncated", "damaged", "not a readable video file"))
        else:  # half of it is read, or what is torn is damaged
            try:
                found = read(path)
                assert found is not None and len(found) <= (30 if read is read_video else 20_000)
            except UserError as error:
                assert "damaged" in str(error)


@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "SVX", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.95])
def test_part_of_a_sound_file(tmp_path: Path, format: str, share: float) -> None:
    path = tmp_path / "a.sound"
    soundfile.write(str(path), SHORT, 16_000, format=format)
    assert abs(len(load_audio(path)) - 16_000) < 1600 and truncated(path) == ""
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * share)])
    refuses(path, load_audio)


@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
def test_au_of_either_byte_order(tmp_path: Path, endian: str) -> None:
    path = tmp_path / "a.au"
    soundfile.write(str(path), SHORT, 16_000, endian=endian)
    assert len(load_audio(path)) == 16_000
    halve(path)
    assert "truncated" in refuses(path, load_audio)


def test_sizes_that_a_pipe_left_unknown(tmp_path: Path) -> None:
    """They say nothing, so the file counts as whole."""
    soundfile.write(str(tmp_path / "a.au"), SHORT, 16_000)
    data = bytearray((tmp_path / "a.au").read_bytes())
    data[8:12] = b"\xff" * 4
    (tmp_path / "a.au").write_bytes(data)
    assert len(load_audio(tmp_path / "a.au")) == 16_000
    media(tmp_path / "a.mkv", "libx264", "aac", live="1")
    assert len(read_video(tmp_path / "a.mkv")) == FRAMES


def test_what_follows_the_sound_is_no_matter(tmp_path: Path) -> None:
    """Tags are put after an MP3, and padding after anything."""
    for name in ("a.mp3", "a.wav", "a.aiff"):
        soundfile.write(str(tmp_path / name), SHORT, 16_000)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole + b"TAG" + b"\0" * 125)
        assert truncated(tmp_path / name) == ""
    soundfile.write(str(tmp_path / "b.mp3"), SHORT, 16_000)
    tag = b"ID3\x04\x00\x00\x00\x00\x02\x01" + b"\0" * 257  # its length has 7 bits a byte
    (tmp_path / "b.mp3").write_bytes(tag + (tmp_path / "b.mp3").read_bytes())
    assert truncated(tmp_path / "b.mp3") == ""
    halve(tmp_path / "b.mp3")
    assert "bytes" in truncated(tmp_path / "b.mp3")


def test_an_avi_of_several_parts(tmp_path: Path) -> None:
    """Above 1 GB an AVI goes on in parts of their own."""
    path = tmp_path / "a.avi"
    part = b"RIFF" + struct.pack("<I", 104) + b"AVIX" + b"\0" * 100
    path.write_bytes(b"RIFF" + struct.pack("<I", 1004) + b"AVI " + b"\0" * 1000 + part + part)
    assert truncated(path) == ""
    path.write_bytes(path.read_bytes()[:-60])
    assert truncated(path)


def test_an_avi_that_repeats_pictures_is_whole(tmp_path: Path) -> None:
    """Its header counts the pictures that are not stored, since they show what the one before shows."""
    times = [k for k in range(57) if k % 3 != 2]
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64), 4 * time, np.uint8), format="gray")
            frame = frame.reformat(format="yuv420p", dst_color_range="MPEG")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.avi")) as container:
        assert container.streams.video[0].frames > len(times)
    levels = read_video(tmp_path / "a.avi").float().mean(dim=(1, 2)).numpy() / 4
    assert np.rint(levels).astype(int).tolist() == [k if k % 3 != 2 else k - 1 for k in range(56)]
