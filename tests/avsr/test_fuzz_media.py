"""Sound and video files with damaged bytes and headers that lie: read, or refused with a message."""

from __future__ import annotations

import runpy
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import strategies as st
from PIL import Image

from avsr.data import audio, video
from avsr.data.audio import load_audio
from avsr.data.rates import SAMPLE_RATE
from avsr.data.video import read_video, read_video_sound
from avsr.data.video_writer import write_video
from avsr.errors import UserError
from avsr.tools.analysis import composite

tools = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzzing.py"))))
few_and_many = pytest.mark.parametrize("count", tools.CASES)

RATES = [0, 1, 2, 7, 100, 999, 1_000, 4_001, 44_101, 99_991, 192_000, 400_001, 2**31 - 1, 2**31, 2**32 - 1]
TONE = (0.4 * np.sin(np.arange(4_000) / 9)).astype(np.float32)


def wav(rate: int, channels: int = 1, bits: int = 16, claimed: int | None = None) -> bytes:
    """A WAV file whose header says anything."""
    data = (TONE * 32_767).astype("<i2").tobytes()
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block % 2**32, block % 2**16, bits)
    size = len(data) if claimed is None else claimed
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt \x10\0\0\0"
        + form
        + b"data"
        + struct.pack("<I", size)
        + data
    )


def flac(rate: int, frames: int, tmp_path: Path) -> bytes:
    """A FLAC file whose header says anything: 20 bits of rate, 36 of length."""
    soundfile.write(str(tmp_path / "x.flac"), TONE, 16_000)
    data = bytearray((tmp_path / "x.flac").read_bytes())
    fields = int.from_bytes(data[18:26], "big")
    fields = (fields & ~(0xFFFFF << 44) & ~(2**36 - 1)) | (rate % 2**20) << 44 | frames % 2**36
    data[18:26] = fields.to_bytes(8, "big")
    return bytes(data)


@few_and_many
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_sound_files(count: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip.{kind}"
    soundfile.write(str(path), TONE, 16_000)
    whole = path.read_bytes()
    always = [*([wav(rate) for rate in RATES]), *(wav(8_000, n) for n in (0, 2, 255, 1024, 65_535))]
    always += [wav(8_000, bits=bits) for bits in (0, 1, 8, 24, 32, 255)]
    always += [wav(8_000, claimed=size) for size in (0, 1, 2**31 - 1, 2**32 - 1)]
    always += [flac(rate, len(TONE), tmp_path) for rate in RATES]
    always += [flac(16_000, frames, tmp_path) for frames in (0, 1, 2**31, 2**36 - 1)]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        wave = load_audio(path)
        assert wave.dtype == torch.float32 and bool(torch.isfinite(wave).all())

    tools.fuzz(count, tools.damaged(whole, 64), check, always if kind == "wav" else [])


@few_and_many
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures(count: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    drawn = Image.effect_noise((40, 24), 60)
    drawn.save(path, kind)
    whole = path.read_bytes()
    always = [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print", b"\x89PNG\r\n\x1a\n"]
    if kind == "PNG":  # headers that claim any size, with their checksum
        for width, height in ((0, 9), (2**31 - 1, 2**31 - 1), (9_000, 9_000), (2**20, 1)):
            header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
            always.append(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])

    def check(content: bytes) -> None:
        path.write_bytes(content)
        picture = composite.Media(composite.IMAGE, str(path)).load()
        assert picture.mode == "RGB" and picture.width * picture.height <= composite.MAX_PIXELS

    tools.fuzz(count, tools.damaged(whole, 64), check, always)


@few_and_many
def test_sound_files_by_name(count: int, tmp_path: Path) -> None:
    """A suffix may promise what the content is not; raw sound has no header at all."""
    suffixes = ["raw", "mp3", "aiff", "au", "caf", "w64", "sd2", "pcm", "txt", "RAW", "vox", "gsm"]

    def check(case: tuple[str, bytes]) -> None:
        path = tmp_path / f"clip.{case[0]}"
        path.write_bytes(case[1])
        load_audio(path)

    contents = st.one_of(st.binary(max_size=200), tools.damaged(wav(16_000), 64))
    tools.fuzz(count, st.tuples(st.sampled_from(suffixes), contents), check, [(s, wav(16_000)) for s in suffixes])


@few_and_many
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_video_files(count: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time stamp far away repeats a picture until it is reached, up to the limits, which are lower here."""
    monkeypatch.setattr(video, "MAX_BYTES", 2**25)
    path = tmp_path / f"clip.{kind}"
    frames = np.random.default_rng(0).integers(0, 255, (12, 96, 96), dtype=np.uint8)
    write_video(tmp_path / "whole.mp4", frames, sound=TONE[: 12 * 640])
    whole = _remuxed(tmp_path / "whole.mp4", path)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read_video(path)
        finally:
            sound = read_video_sound(path)
            assert sound is None or len(sound) <= 2 * video.MAX_SECONDS * SAMPLE_RATE

    fields = _atoms(whole) if kind == "mp4" else st.nothing()
    tools.fuzz(count, st.one_of(tools.damaged(whole, 400), fields, tools.damaged(whole)), check)


def _remuxed(source: Path, path: Path) -> bytes:
    """The same streams in another container."""
    if source.suffix != path.suffix:
        with av.open(str(source)) as given, av.open(str(path), "w") as made:
            streams = {stream.index: made.add_stream_from_template(stream) for stream in given.streams}
            for packet in given.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    made.mux(packet)
        return path.read_bytes()
    return source.read_bytes()


def _atoms(whole: bytes) -> st.SearchStrategy[bytes]:
    """A mp4 with a number of one of its tables replaced."""
    names = [b"mvhd", b"tkhd", b"mdhd", b"stts", b"stsz", b"stsc", b"stco", b"elst", b"avc1", b"avcC", b"mp4a", b"hdlr"]
    atoms = [whole.index(name) + 4 for name in names if name in whole]
    number = st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1])

    def put(case: tuple[int, int, int]) -> bytes:
        at = case[0] + 4 * case[1]
        return whole[:at] + struct.pack(">I", case[2]) + whole[at + 4 :]

    return st.tuples(st.sampled_from(atoms), st.integers(0, 24), number).map(put)


def test_a_sound_track_that_starts_hours_late_takes_no_memory(tmp_path: Path) -> None:
    """The silence before it would be as long as the file says."""
    write_video(tmp_path / "a.mp4", np.zeros((12, 96, 96), np.uint8), sound=TONE[: 12 * 640])
    with av.open(str(tmp_path / "a.mp4")) as given, av.open(str(tmp_path / "a.mkv"), "w") as made:
        streams = {stream.index: made.add_stream_from_template(stream) for stream in given.streams}
        for packet in given.demux():
            if packet.dts is not None:
                late = round(5_000 / packet.time_base) if packet.stream.type == "audio" else 0
                packet.pts, packet.dts = packet.pts + late, packet.dts + late
                packet.stream = streams[packet.stream.index]
                made.mux(packet)
    with tools.bounded(), pytest.raises(UserError, match="its sound starts after 5000 s|after 4999 s"):
        read_video_sound(tmp_path / "a.mkv")


@pytest.mark.parametrize("rate", [1, 44_101, 2**31 - 1])
def test_sample_rates_that_cannot_be_resampled_are_named(rate: int, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(rate))
    with tools.bounded(), pytest.raises(UserError, match=f"sample rate of {rate} Hz"):
        load_audio(tmp_path / "a.wav")


def test_long_sound_is_refused_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "MAX_SAMPLES", 2_000)
    (tmp_path / "a.wav").write_bytes(wav(16_000))
    with pytest.raises(UserError, match="holds more than 2000 samples"):
        load_audio(tmp_path / "a.wav")


def test_a_playlist_named_as_a_video_fetches_nothing(tmp_path: Path) -> None:
    """FFmpeg goes by the content: a playlist of that name would make it ask a server."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        for name, text in (
            ("hls", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n"),
            ("concat", f"ffconcat version 1.0\nfile {address}\n"),
        ):
            (tmp_path / f"{name}.mp4").write_text(text)
            with pytest.raises(UserError):
                read_video(tmp_path / f"{name}.mp4")
        with pytest.raises(TimeoutError):
            server.accept()
