"""Reading and writing video: levels, frame rates, sound in sync, and files that are not video."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from avsr.data import video
from avsr.data.video import encode_video, read_video, read_video_sound, write_video
from avsr.errors import UserError


def pictures(count: int, height: int = 96, width: int = 96) -> np.ndarray:
    """Smooth moving waves over the whole range of grey, with one black and one white block."""
    y, x = np.mgrid[:height, :width]
    waves = [127.5 + 120 * np.sin(x / 9 + t / 3) * np.cos(y / 11 - t / 5) for t in range(count)]
    frames = np.clip(np.rint(np.stack(waves)), 0, 255).astype(np.uint8)
    frames[:, : height // 8, : width // 2], frames[:, : height // 8, width // 2 :] = 0, 255
    return frames


def write(path: Path, frames: np.ndarray, *, codec: str, form: str, times: list[Fraction] | None = None, fps: int = 25,
          full: bool = False, rotation: int = 0) -> None:  # fmt: skip
    """Any codec and pixel format, with time stamps in seconds if given; independent of ``encode_video``."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = form
        stream.codec_context.time_base = Fraction(1, 1000 if times else fps)
        if full:
            stream.codec_context.color_range = 2
        if rotation:
            stream.set_display_rotation(rotation)
        for index, grey in enumerate(frames):
            source = av.VideoFrame.from_ndarray(grey, format="gray")
            source.color_range = 2
            frame = source.reformat(format=form, dst_color_range="JPEG" if full else "MPEG")
            frame.pts = round(times[index] * 1000) if times else index
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbered(count: int, size: int = 32) -> np.ndarray:
    """Frame k is flat grey of level 5k: what is read says which frame it was."""
    return np.repeat((np.arange(count) * 5).astype(np.uint8), size * size).reshape(count, size, size)


def numbers(path: Path) -> list[int]:
    levels = read_video(path).float().mean(dim=(1, 2)).numpy()
    return [int(n) for n in np.rint(levels / 5)]


def refusal(path: Path, read: Any = read_video) -> str:
    with pytest.raises(UserError) as caught:
        read(path, where="m.jsonl:4")
    message = str(caught.value)
    assert message.startswith("m.jsonl:4: ") and str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("shape", [(60, 96, 96), (1, 96, 96), (7, 44, 130)])
def test_a_round_trip_keeps_shape_and_grey_levels(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    frames = pictures(*shape)
    write_video(tmp_path / "a.mp4", frames)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == shape and str(back.dtype) == "torch.uint8"
    assert np.abs(back.numpy().astype(int) - frames).mean() < 2
    # the ends of the range come back: luma is not taken as it is
    assert back[:, : shape[1] // 8, 2 : shape[2] // 2 - 4].float().mean() < 3
    assert back[:, : shape[1] // 8, shape[2] // 2 + 4 :].float().mean() > 252


@pytest.mark.parametrize(
    ("name", "codec", "form", "full", "tolerance"),
    [
        ("a.mkv", "ffv1", "gray", True, 0.0),
        ("a.mkv", "ffv1", "yuv420p", False, 0.6),
        ("a.mkv", "ffv1", "yuv444p10le", False, 0.6),
        ("a.mkv", "ffv1", "bgr0", True, 1.0),
        ("a.avi", "mjpeg", "yuvj420p", True, 4.0),
        ("a.avi", "mpeg4", "yuv420p", False, 4.0),
        ("a.mp4", "libx264", "yuv420p", True, 4.0),
        ("a.webm", "libvpx-vp9", "yuv420p", False, 4.0),
    ],
)
def test_codecs_and_pixel_formats(
    tmp_path: Path, name: str, codec: str, form: str, full: bool, tolerance: float
) -> None:
    frames = pictures(5, 50, 70)  # not what a line of memory is rounded to
    write(tmp_path / name, frames, codec=codec, form=form, full=full)
    back = read_video(tmp_path / name).numpy().astype(int)
    assert back.shape == frames.shape
    assert np.abs(back - frames).mean() <= tolerance


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "ffv1"), ("a.avi", "ffv1")])
@pytest.mark.parametrize("fps", [10, 24, 25, 30, 50])
def test_any_constant_rate_becomes_25_frames_a_second(tmp_path: Path, name: str, codec: str, fps: int) -> None:
    write(tmp_path / name, numbered(40), codec=codec, form="yuv420p", fps=fps)
    count = -(-40 * 25 // fps)
    assert numbers(tmp_path / name) == [k * fps // 25 for k in range(count)]


def test_a_variable_rate_goes_by_time_stamps(tmp_path: Path) -> None:
    times = [Fraction(ms, 1000) for ms in (0, 40, 90, 100, 105, 300, 320, 333, 500)]
    write(tmp_path / "a.mkv", numbered(9), codec="ffv1", form="yuv420p", times=times)
    shown = numbers(tmp_path / "a.mkv")
    assert shown[:13] == [max(i for i, t in enumerate(times) if t <= Fraction(k, 25)) for k in range(13)]
    assert set(shown[13:]) <= {8} and len(shown) <= 14


def test_time_stamps_need_not_start_at_zero(tmp_path: Path) -> None:
    times = [Fraction(k, 25) + 3 for k in range(10)]
    write(tmp_path / "a.mkv", numbered(10), codec="ffv1", form="yuv420p", times=times)
    assert numbers(tmp_path / "a.mkv") == list(range(10))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_phone_video_is_turned_back(tmp_path: Path, degrees: int) -> None:
    frames = pictures(2, 32, 64)
    write(tmp_path / "a.mov", frames, codec="libx264", form="yuv420p", rotation=degrees)
    with av.open(str(tmp_path / "a.mov")) as container:
        assert next(container.decode(video=0)).rotation % 360 == degrees
    back = read_video(tmp_path / "a.mov").numpy().astype(int)
    turned = np.rot90(frames, degrees // 90, axes=(1, 2))
    assert back.shape == turned.shape and np.abs(back - turned).mean() < 3


# --- sound --------------------


def chirp(samples: int, rate: int = 16_000) -> np.ndarray:
    time = np.arange(samples) / rate
    return (0.4 * np.sin(2 * np.pi * (200 * time + 150 * time**2))).astype(np.float32)


def lag(found: np.ndarray, wanted: np.ndarray) -> int:
    """Samples by which ``found`` comes later."""
    size = 2 ** int(np.ceil(np.log2(len(found) + len(wanted))))
    product = np.fft.irfft(np.fft.rfft(found, size) * np.conj(np.fft.rfft(wanted, size)))
    peak = int(np.argmax(product))
    return peak if peak < size // 2 else peak - size


@pytest.mark.parametrize("samples", [16_000, 38_777])
def test_the_sound_is_trimmed_and_in_step(tmp_path: Path, samples: int) -> None:
    wave = chirp(samples)
    write_video(tmp_path / "a.mp4", pictures(-(-samples // 640)), sound=wave)
    found = read_video_sound(tmp_path / "a.mp4")
    assert found is not None and found.ndim == 1 and str(found.dtype) == "torch.float32"
    assert 0 <= len(found) - samples < 16  # mp4 counts milliseconds; the codec's blocks have 1024 samples
    assert lag(found.numpy(), wave) == 0
    assert np.abs(found.numpy()[:samples] - wave).mean() < 0.01
    assert len(read_video(tmp_path / "a.mp4")) == -(-samples // 640)


def test_no_sound_track_is_none(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", pictures(3))
    assert read_video_sound(tmp_path / "a.mp4") is None


def mux(path: Path, wave: np.ndarray, rate: int, video_start: float, sound_start: float) -> None:
    """25 numbered frames and (channels, samples) of lossless sound, each with its own start in seconds."""
    with av.open(str(path), "w") as container:
        pixels: Any = container.add_stream("ffv1", rate=25)
        pixels.width = pixels.height = 32
        pixels.pix_fmt = "yuv420p"
        track: Any = container.add_stream("pcm_s16le", rate=rate, layout="stereo" if len(wave) == 2 else "mono")
        for index, grey in enumerate(numbered(25)):
            frame = av.VideoFrame.from_ndarray(grey, format="gray").reformat(format="yuv420p", dst_color_range="MPEG")
            frame.pts, frame.time_base = round(1000 * video_start) + 40 * index, Fraction(1, 1000)
            container.mux(pixels.encode(frame))
        for first in range(0, wave.shape[1], 1000):
            pcm = np.rint(wave[:, first : first + 1000] * 32767).astype(np.int16)
            sound = av.AudioFrame.from_ndarray(pcm.T.reshape(1, -1).copy(), layout=track.layout.name, format="s16")
            sound.sample_rate, sound.time_base = rate, Fraction(1, rate)
            sound.pts = first + round(sound_start * rate)
            container.mux(track.encode(sound))
        for stream in (pixels, track):
            container.mux(stream.encode())


def test_stereo_at_another_rate_becomes_the_mean_of_its_channels(tmp_path: Path) -> None:
    left, right = chirp(48_000, 48_000), 0.5 * np.flip(chirp(48_000, 48_000))
    mux(tmp_path / "a.mkv", np.stack([left, right]), 48_000, 0, 0)
    found = read_video_sound(tmp_path / "a.mkv")
    assert found is not None and abs(len(found) - 16_000) <= 32
    wanted = ((left + right) / 2)[::3]  # below 1 kHz every third sample is a resampling
    size = min(len(found), 16_000)
    assert lag(found.numpy(), wanted) == 0
    assert np.abs(found.numpy()[100 : size - 100] - wanted[100 : size - 100]).max() < 0.01


@pytest.mark.parametrize(("video_start", "sound_start"), [(0.0, 0.1), (0.2, 0.0), (1.0, 1.0)])
def test_streams_with_different_starts_stay_in_step(tmp_path: Path, video_start: float, sound_start: float) -> None:
    wave = chirp(16_000)
    mux(tmp_path / "a.mkv", wave[None], 16_000, video_start, sound_start)
    sound, shown = read_video_sound(tmp_path / "a.mkv"), numbers(tmp_path / "a.mkv")
    assert sound is not None
    earliest = min(video_start, sound_start)
    assert lag(sound.numpy(), wave) == round(16_000 * (sound_start - earliest))
    late = round(25 * (video_start - earliest))
    assert shown == [0] * late + list(range(25))


# --- bad files --------------------


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "none.mp4")
    (tmp_path / "a.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("a.mp4", "empty.mp4"):
        assert "not a readable video" in refusal(tmp_path / name)
        assert "not a readable video" in refusal(tmp_path / name, read_video_sound)
    soundfile.write(str(tmp_path / "a.wav"), chirp(1000), 16_000)
    assert "no video stream" in refusal(tmp_path / "a.wav")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    data = encode_video(pictures(20))
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 3])  # without its index, which is at the end
    assert "not a readable video" in refusal(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"g": "5"})
        stream.width = stream.height = 96
        for grey in pictures(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="gray").reformat(format="yuv420p")))
        container.mux(stream.encode())
    whole = (tmp_path / "b.mp4").read_bytes()
    assert len(read_video(tmp_path / "b.mp4")) == 40
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert "truncated" in refusal(tmp_path / "b.mp4") or "damaged" in refusal(tmp_path / "b.mp4")


def test_frames_missing_at_the_end_are_noticed_even_without_a_damaged_one(tmp_path: Path) -> None:
    """A file cut between two pictures that need no other: only the index says that there were more."""
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("mjpeg", rate=25)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuvj420p"
        for grey in pictures(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="gray").reformat(format="yuvj420p")))
    with av.open(str(tmp_path / "a.mp4")) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][6]
        end = (packet.pos or 0) + packet.size
    data = bytearray((tmp_path / "a.mp4").read_bytes()[:end])
    box = data.index(b"mdat") - 4
    data[box : box + 4] = (end - box).to_bytes(4, "big")  # not even the size of the file tells
    (tmp_path / "a.mp4").write_bytes(data)
    assert "truncated or damaged: 7 of its 10 frames" in refusal(tmp_path / "a.mp4")


def test_a_clip_that_hides_its_first_frames_is_not_truncated(tmp_path: Path) -> None:
    """As phones trim: all frames are in the file, an edit list says where the clip begins."""
    write(tmp_path / "a.mp4", numbered(30), codec="libx264", form="yuv420p")
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy: Any = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None and packet.time_base is not None:
                shift = round(Fraction(5, 25) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    assert numbers(tmp_path / "b.mp4") == list(range(5, 30))


def long_video(path: Path, bframes: int) -> None:
    """60 numbered frames in two groups of pictures, the index in front."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        options = {"g": "30", "bf": str(bframes), "b-pyramid": "none", "sc_threshold": "0"}
        stream: Any = container.add_stream("libx264", rate=25, options=options)
        stream.width = stream.height = 32
        for grey in numbered(60) // 2 + 20:
            frame = av.VideoFrame.from_ndarray(grey, format="gray")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_color_range="MPEG")))
        container.mux(stream.encode())


def copy_from(path: Path, target: Path, seconds: Fraction) -> None:
    """What ``ffmpeg -ss SECONDS -c copy`` does: all packets are kept, and an edit list says where to begin."""
    with av.open(str(path)) as container, av.open(str(target), "w", options={"movflags": "+faststart"}) as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size and packet.pts is not None and packet.dts is not None:
                earlier = int(seconds / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, stream
                out.mux(packet)


def trim(path: Path, milliseconds: int) -> None:
    """Shortens what the edit list shows; the frames stay in the file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # its name, version and flags, number of edits; then the length of the first
    data[at : at + 4] = milliseconds.to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize("bframes", [0, 2])
@pytest.mark.parametrize(("first", "last"), [(10, 60), (45, 60), (0, 21), (10, 35), (33, 34)])
def test_what_an_edit_list_hides_is_not_missed(tmp_path: Path, bframes: int, first: int, last: int) -> None:
    long_video(tmp_path / "long.mp4", bframes)
    copy_from(tmp_path / "long.mp4", tmp_path / "a.mp4", Fraction(first, 25))
    trim(tmp_path / "a.mp4", 40 * (last - first))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 60  # they are all still there
    levels = read_video(tmp_path / "a.mp4").float().mean(dim=(1, 2)).numpy()
    wanted = numbered(60)[first:last].mean(axis=(1, 2)) // 2 + 20
    assert levels.shape == wanted.shape and np.abs(levels - wanted).max() < 2
    # what it does show may not be missing
    with av.open(str(tmp_path / "a.mp4")) as container:
        end = max(packet.pos or 0 for packet in container.demux(video=0) if packet.size and not packet.is_discard)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:end])
    message = refusal(tmp_path / "a.mp4")
    assert "truncated" in message or "damaged" in message or "no video frame" in message


def test_an_avi_without_its_index_is_truncated(tmp_path: Path) -> None:
    write(tmp_path / "a.avi", pictures(40), codec="mjpeg", form="yuvj420p", full=True)
    data = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(data[: data.rindex(b"00dc", 0, len(data) * 2 // 3)])
    assert "is truncated or damaged: it has" in refusal(tmp_path / "a.avi")


def test_flipped_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    data = encode_video(pictures(30))
    begin, end = data.index(b"mdat") + 1000, data.index(b"moov")
    refused = 0
    for seed in range(10):
        broken = bytearray(data)
        for position in np.random.default_rng(seed).integers(begin, end, 20):
            broken[position] ^= 0x55
        (tmp_path / "a.mp4").write_bytes(broken)
        try:
            assert len(read_video(tmp_path / "a.mp4")) == 30
        except UserError as error:
            assert "a.mp4" in str(error) and "damaged" in str(error)
            refused += 1
    assert refused >= 8


def test_a_video_stream_without_a_frame_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        sound: Any = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), layout="mono", format="s16")
        silence.sample_rate = 16_000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    assert "no video frame" in refusal(tmp_path / "a.mkv")


def test_absurd_sizes_and_lengths_are_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.zeros((1, 2, 4098), np.uint8)
    write(tmp_path / "a.mkv", wide, codec="ffv1", form="gray", full=True)
    assert "4098x2 pixels" in refusal(tmp_path / "a.mkv")
    gap = [Fraction(0), Fraction(4000)]
    write(tmp_path / "b.mkv", numbered(2), codec="ffv1", form="yuv420p", times=gap)
    assert "longer than 3600 s" in refusal(tmp_path / "b.mkv")
    write_video(tmp_path / "c.mp4", pictures(20))
    monkeypatch.setattr(video, "MAX_BYTES", 19 * 96 * 96)
    assert "cut it into utterances" in refusal(tmp_path / "c.mp4")
