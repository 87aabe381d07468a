"""What counts as a video file: one that holds its pictures and sound itself. What names other files is not followed."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.format import formats_available

from avsr.data import container
from avsr.data.video import read_video, read_video_sound, write_video
from avsr.errors import UserError

PICTURES = np.full((25, 96, 96), 90, np.uint8)
TONE = (0.4 * np.sin(np.arange(16_000) / 9)).astype(np.float32)


def remux(source: Path, path: Path) -> None:
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        streams = {stream.index: made.add_stream_from_template(stream) for stream in given.streams}
        for packet in given.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder next to one with the clip secret.mp4 and secret.ts."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    write_video(secrets / "secret.mp4", PICTURES, sound=TONE)
    remux(secrets / "secret.mp4", secrets / "secret.ts")
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def playlist(target: str) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"


def refuse(path: Path, kind: str) -> None:
    for read in (read_video, read_video_sound):
        with pytest.raises(UserError) as caught:
            read(path, where="m.jsonl:4")
        message = str(caught.value)
        assert message.startswith(f"m.jsonl:4: {path} ") and "\n" not in message
        assert f"of the format {kind}, which is not read" in message


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("hls", {"a.m3u8": playlist("../secrets/secret.ts")}),
        ("hls", {"a.m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nb.m3u8\n", "b.m3u8": playlist("{}/secret.ts")}),
        ("concat", {"a.mp4": "ffconcat version 1.0\nfile b.m3u8\n", "b.m3u8": playlist("{}/secret.ts")}),
        ("concat", {"a.mp4": "ffconcat version 1.0\nfile b.mp4\n", "b.mp4": ""}),  # "": a link to the clip
    ],
)
def test_no_other_file_is_read(folder: Path, kind: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        if text:
            (folder / name).write_text(text.format(folder.parent / "secrets"))
        else:
            (folder / name).symlink_to(folder.parent / "secrets" / "secret.mp4")
    path = folder / next(iter(files))
    with av.open(str(path)) as container:  # FFmpeg itself follows it
        assert sum(1 for _ in container.decode(video=0)) == len(PICTURES)
    refuse(path, kind)
    assert av.logging.get_level() is None  # looked up for the message, and put back


def test_a_name_is_a_path_whatever_it_looks_like(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's protocol of this name joins the files named after it."""
    monkeypatch.chdir(folder)
    (folder / "b.ts").symlink_to(folder.parent / "secrets" / "secret.ts")
    path = Path("concat:b.ts")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable video file"):
        read_video(path)
    path.write_bytes((folder.parent / "secrets" / "secret.mp4").read_bytes())
    assert len(read_video(path)) == len(PICTURES)


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [
        ("a.mp4", "libx264", "aac"),
        ("a.mov", "prores_ks", "pcm_s16le"),
        ("a.m4v", "mpeg4", "aac"),
        ("a.mkv", "ffv1", "flac"),
        ("a.webm", "libvpx-vp9", "libopus"),
        ("a.avi", "mpeg4", "pcm_s16le"),
        ("a.mpg", "mpeg2video", "mp2"),
        ("a.ts", "libx264", "ac3"),
        ("a.wmv", "wmv2", "libmp3lame"),
        ("a.flv", "flv1", "libmp3lame"),
        ("a.ogg", "", "libopus"),
        ("a.mxf", "mpeg2video", "pcm_s16le"),
        ("a.nut", "ffv1", "pcm_s16le"),
        ("a.h264", "libx264", ""),
        ("a.gif", "gif", ""),
        ("a.m4a", "", "aac"),
        ("a.wav", "", "pcm_s16le"),
        ("a.w64", "", "pcm_s16le"),
        ("a.aiff", "", "pcm_s16be"),
        ("a.caf", "", "alac"),
        ("a.mp3", "", "libmp3lame"),
        ("a.aac", "", "aac"),
        ("a.ac3", "", "ac3"),
        ("a.flac", "", "flac"),
        ("a.oga", "", "flac"),
        ("a.amr", "", "libopencore_amrnb"),
    ],
)
def test_formats_that_are_read(tmp_path: Path, name: str, codec: str, sound: str) -> None:
    path = tmp_path / name
    rate = 8_000 if "amr" in name else 48_000
    with av.open(str(path), "w") as container:
        if codec:
            pictures = container.add_stream(codec, rate=25)
            pictures.width = pictures.height = 96
            pictures.pix_fmt = {"prores_ks": "yuv422p10le", "gif": "rgb8"}.get(codec, "yuv420p")
        if sound:
            track = container.add_stream(sound, rate=rate, layout="mono")
        for grey in PICTURES if codec else ():
            frame = av.VideoFrame.from_ndarray(grey, format="gray").reformat(format=pictures.pix_fmt)
            container.mux(pictures.encode(frame))
        if codec:
            container.mux(pictures.encode())
        if sound:
            wave = np.sin(np.arange(rate) / 9)[None].astype(np.float32)
            part = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            part.sample_rate, part.pts = rate, 0
            for resampled in av.AudioResampler(format=track.format, layout="mono", rate=rate).resample(part):
                container.mux(track.encode(resampled))
            container.mux(track.encode())
    if codec:
        assert abs(len(read_video(path)) - 25) <= 1
    track_read = read_video_sound(path)
    assert (track_read is not None) == bool(sound)
    assert track_read is None or abs(len(track_read) - 16_000) < 3_000


def test_every_name_is_a_format_of_ffmpeg() -> None:
    """A misspelled one would shut its files out in silence."""
    known = {part for name in formats_available for part in name.split(",")}
    assert set(container._FORMATS) <= known
