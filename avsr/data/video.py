"""Reads video with PyAV: gray frames at 25 fps, and the sound track of a video file.

Time 0 is the start of the earlier of the two streams, so frames and sound of one file stay in sync.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE
from avsr.data.video_writer import encode_video, write_video
from avsr.errors import UserError, at

__all__ = ["encode_video", "read_video", "read_video_sound", "video_frames", "write_video"]

MAX_SIDE = 4096  # pixels
MAX_SECONDS = 3600
MAX_BYTES = 2**31  # of the frames of one clip in memory

_SLACK = 0.001  # seconds; some containers round timestamps to milliseconds
_LUMA_FIRST = frozenset(  # 8-bit formats whose first plane is the luma
    ("yuv420p", "yuv422p", "yuv444p", "yuv410p", "yuv411p", "yuv440p", "nv12", "nv21", "nv16", "gray")
)
_FULL_RANGE = frozenset(("yuvj420p", "yuvj422p", "yuvj444p", "yuvj411p", "yuvj440p"))
_EXPAND = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)  # BT.601/709 luma to gray
_JPEG_RANGE = 2  # AVCOL_RANGE_JPEG
# FFmpeg's names of the accepted formats, which are self-contained. Playlists (HLS, DASH, concat, SDP), numbered
# pictures and others refer to further files or addresses, which FFmpeg would open wherever they are.
_FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegts", "asf", "flv", "ogg", "nut", "mxf", "gxf", "rm", "wtv", "dv", "ivf"),
    *("h261", "h263", "h264", "hevc", "vvc", "m4v", "mpegvideo", "mjpeg", "vc1", "dirac", "av1", "obu"),
    *("gif", "apng", "yuv4mpegpipe", "wav", "w64", "aiff", "au", "caf", "voc", "flac", "mp3", "aac", "loas", "latm"),
    *("ac3", "eac3", "dts", "dtshd", "truehd", "mlp", "amr", "amrnb", "amrwb", "gsm", "ape", "tta", "wv"),
)
_OPTIONS = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "file"}


def read_video(path: Path, *, where: str = "") -> Tensor:
    """(T, H, W) uint8 gray at 25 fps, whatever the file's rate: frame k is the last one shown by k/25 s.

    Args:
        path: a video file of an accepted format.
        where: "file:line" for messages.

    Raises:
        UserError: as in ``video_frames``, or more than ``MAX_BYTES`` of frames.
    """
    frames = []
    size = 0
    for frame in video_frames(path, where=where):
        size += frame.nbytes
        if size > MAX_BYTES:
            raise UserError(
                f"{at(where)}{path} has more than {MAX_BYTES >> 20} MB of frames "
                f"({_size(frame)} pixels): cut it into utterances or crop the mouth"
            )
        frames.append(frame)
    return torch.from_numpy(np.stack(frames))


def video_frames(path: Path, *, where: str = "") -> Iterator[np.ndarray]:
    """The frames of ``read_video`` one at a time, (H, W) uint8 each, all of one size.

    Raises:
        UserError: the file is missing, damaged or truncated, has no video or no frame, sides over ``MAX_SIDE`` or more
            than ``MAX_SECONDS``; the message names it.
    """
    with _opened(path, where) as container:
        stream = _video_stream(container)
        if stream is None:
            raise UserError(f"{at(where)}{path} has no video stream")
        lead = max(0.0, _start(stream) - min(_starts(container)))
        due, shown = 0, None  # index of the next frame to yield, and the picture shown until the next one starts
        for grey, time in _decoded(stream, path, where):
            if shown is not None and grey.shape != shown.shape:
                raise UserError(f"{at(where)}{path} changes its size from {_size(shown)} to {_size(grey)}")
            time += round(lead * FRAMES_PER_SECOND) / FRAMES_PER_SECOND
            if time > MAX_SECONDS:
                raise UserError(f"{at(where)}{path} lasts longer than {MAX_SECONDS} s: cut it into utterances")
            while shown is not None and due / FRAMES_PER_SECOND < time - _SLACK:
                yield shown
                due += 1
            shown, end = grey, time + _frame_seconds(stream)
        if shown is None:
            raise UserError(f"{at(where)}{path} holds no video frame")
        while due == 0 or due / FRAMES_PER_SECOND < end - _SLACK:
            yield shown
            due += 1


def read_video_sound(path: Path, where: str = "") -> Tensor | None:
    """The sound track of a video file: (samples,) float32 mono at 16 kHz, or None where there is none.

    A track that starts after the video is padded with leading zeros, to stay in sync with ``read_video``.

    Raises:
        UserError: the file is missing, damaged or longer than ``MAX_SECONDS``; the message names it.
    """
    with _opened(path, where) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise UserError(f"{at(where)}{path} has a sound track of a kind that cannot be decoded")
        resampler = av.AudioResampler(format="fltp", rate=SAMPLE_RATE)
        parts: list[np.ndarray] = []
        samples = 0
        for frame in chain(_guarded_frames(container, stream, path, where), [None]):
            for part in _resampled(resampler, frame, f"{at(where)}{path}"):
                parts.append(part.to_ndarray().mean(axis=0, dtype=np.float32))
                samples += len(parts[-1])
            if samples > MAX_SECONDS * SAMPLE_RATE:
                raise UserError(f"{at(where)}{path} lasts longer than {MAX_SECONDS} s: cut it into utterances")
        if samples == 0:
            return None
        wave = np.concatenate(parts)
        if stream.duration:  # the codec's last block is padded
            wave = wave[: round(float(stream.duration * stream.time_base) * SAMPLE_RATE)]
        lead = round((_start(stream) - min(_starts(container))) * SAMPLE_RATE)
        if lead > MAX_SECONDS * SAMPLE_RATE:
            raise UserError(f"{at(where)}{path} is damaged: its sound starts after {lead // SAMPLE_RATE} s")
        return torch.from_numpy(np.concatenate([np.zeros(max(0, lead), np.float32), wave]))


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Any]:
    if not os.path.isfile(path):
        raise UserError(f"{at(where)}there is no file {path}")
    try:
        container = _open(path)
    except (av.FFmpegError, ValueError, OverflowError) as error:
        kind = _unlisted(path)
        reason = f"it is of the format {kind}, which is not read: convert it to mp4" if kind else _reason(error)
        raise UserError(f"{at(where)}{path} is not a readable video file: {reason}") from error
    with container:
        yield container


def _open(path: Path) -> Any:
    """The only place that opens video files. ``file:`` makes FFmpeg take the rest as a path, whatever it looks like."""
    return av.open(f"file:{path}", options=_OPTIONS)


def _unlisted(path: Path) -> str:
    """The format because of which a file was refused, else "": only FFmpeg's log names it."""
    before = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture():
            _open(path).close()
    except (av.FFmpegError, ValueError, OverflowError) as error:
        log = getattr(error, "log", None)
        return str(log[1]) if log and "not on whitelist" in log[2] else ""
    finally:
        av.logging.set_level(before)
    return ""


def _video_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture; None if there is none."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    return None


def _decoded(stream: Any, path: Path, where: str) -> Iterator[tuple[np.ndarray, float]]:
    """(H, W) uint8 gray frames, and their seconds since the first one."""
    context = stream.codec_context
    if context is None:
        raise UserError(f"{at(where)}{path} has a video stream of a kind that cannot be decoded")
    if not 0 < max(context.width, context.height) <= MAX_SIDE:
        raise UserError(
            f"{at(where)}{path} has pictures of {context.width}x{context.height} pixels, "
            f"allowed are sides of 1 to {MAX_SIDE}"
        )
    context.thread_type, context.thread_count = "NONE", 1
    first, last, count = None, 0.0, 0
    expected = _frames_to_come(stream)
    for frame in _guarded_frames(stream.container, stream, path, where):
        if frame.is_corrupt:
            raise UserError(f"{at(where)}{path} is damaged at frame {count}")
        # a raw stream has no timestamps
        time = count * _frame_seconds(stream) if frame.pts is None else float(frame.pts * frame.time_base)
        first = time if first is None else first
        last = max(last, time - first)
        yield _grey(frame), last
        count += 1
    if count < expected:
        raise UserError(f"{at(where)}{path} is truncated or damaged: {count} of its {expected} frames can be read")


def _frames_to_come(stream: Any) -> int:
    """The number of frames that the file promises; 0 when it does not say. Call it before the first frame is read.

    The frame count of an mp4 includes frames hidden by its edit list: a cut without re-encoding keeps the frames from
    the key frame on, and a phone that trims a video keeps them all. The index leaves them out or marks them. Other
    containers may build their index while they are read.
    """
    if "mp4" not in stream.container.format.name:
        return int(stream.frames)
    return min(stream.frames, sum(not entry.is_discard for entry in stream.index_entries))


def _guarded_frames(container: Any, stream: Any, path: Path, where: str) -> Iterator[Any]:
    try:
        yield from container.decode(stream)
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{at(where)}{path} is damaged: {_reason(error)}") from error


def _resampled(resampler: Any, frame: Any, where: str) -> list[Any]:
    try:
        return list(resampler.resample(frame))
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{where} is damaged: {_reason(error)}") from error


def _grey(frame: Any) -> np.ndarray:
    name = frame.format.name
    if name in _LUMA_FIRST or name in _FULL_RANGE:
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(
            -1, plane.line_size
        )  # a row of memory may be longer than the picture
        luma = rows[: frame.height, : frame.width]
        full = name in _FULL_RANGE or name == "gray" or int(frame.color_range) == _JPEG_RANGE
        grey = luma.copy() if full else _EXPAND[luma]
    else:
        grey = frame.to_ndarray(format="gray")
    turns = round(frame.rotation / 90) % 4  # phones store the rotation in the file
    return np.ascontiguousarray(np.rot90(grey, turns)) if turns else grey


def _frame_seconds(stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 1 / FRAMES_PER_SECOND


def _start(stream: Any) -> float:
    return float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0


def _starts(container: Any) -> list[float]:
    streams = [_video_stream(container), *container.streams.audio[:1]]
    return [_start(stream) for stream in streams if stream is not None]


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
