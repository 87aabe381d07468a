"""Reads video with PyAV: gray frames at 25 fps, and the sound track of a video file.

Time 0 is the start of the earlier of the two streams, so frames and sound of one file stay in sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import torch
from torch import Tensor

from avsr.data.audio import refuse_cancelled
from avsr.data.container import (
    decoded_from,
    earliest_start,
    frame_seconds,
    opened,
    reason,
    seconds_of,
    start,
    video_stream,
)
from avsr.data.cut import Cut
from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE
from avsr.data.video_writer import encode_video, write_video
from avsr.errors import UserError, at

__all__ = ["encode_video", "read_video", "read_video_sound", "video_frames", "write_video"]

MAX_SIDE = 4096  # pixels
MAX_SECONDS = 3600
MAX_BYTES = 2**31  # of the frames of one clip in memory
_MOST_SAMPLES = MAX_SECONDS * SAMPLE_RATE

_SLACK = 0.001  # seconds; some containers round timestamps to milliseconds
_LUMA_FIRST = frozenset(  # 8-bit formats whose first plane is the luma
    ("yuv420p", "yuv422p", "yuv444p", "yuv410p", "yuv411p", "yuv440p", "nv12", "nv21", "nv16", "gray")
)
_FULL_RANGE = frozenset(("yuvj420p", "yuvj422p", "yuvj444p", "yuvj411p", "yuvj440p"))
_EXPAND = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)  # BT.601/709 luma to gray
_JPEG_RANGE = 2  # AVCOL_RANGE_JPEG


def read_video(path: Path, *, where: str = "", cut: Cut | None = None) -> Tensor:
    """(T, H, W) uint8 gray at 25 fps, whatever the file's rate: frame k is the last one shown by k/25 s.

    Args:
        path: a video file of an accepted format.
        where: "file:line" for messages.
        cut: the part to read, those frames of the whole that are nearest to it.

    Raises:
        UserError: as in ``video_frames``, or more than ``MAX_BYTES`` of frames.
    """
    frames = []
    size = 0
    for frame in video_frames(path, where=where, cut=cut):
        size += frame.nbytes
        if size > MAX_BYTES:
            raise UserError(
                f"{at(where)}{path} has more than {MAX_BYTES >> 20} MB of frames "
                f"({_size(frame)} pixels): cut it into utterances or crop the mouth"
            )
        frames.append(frame)
    return torch.from_numpy(np.stack(frames))


def video_frames(path: Path, *, where: str = "", cut: Cut | None = None) -> Iterator[np.ndarray]:
    """The frames of ``read_video`` one at a time, (H, W) uint8 each, all of one size.

    Raises:
        UserError: the file is missing, damaged or truncated, has no video or no frame, sides over ``MAX_SIDE`` or more
            than ``MAX_SECONDS``, or ends before the cut begins; the message names it.
    """
    name = f"{at(where)}{path}"
    with opened(path, where) as container:
        stream = video_stream(container)
        if stream is None:
            raise UserError(f"{name} has no video stream")
        lead = round(max(0.0, start(stream) - earliest_start(container)) * FRAMES_PER_SECOND) / FRAMES_PER_SECOND
        first, count = (0, 0) if cut is None else cut.steps(FRAMES_PER_SECOND)
        due, shown = first, None  # index of the next frame to yield, and the picture shown until the next one starts
        for grey, time in _decoded(stream, name, None if cut is None else first / FRAMES_PER_SECOND - lead):
            if shown is not None and grey.shape != shown.shape:
                raise UserError(f"{name} changes its size from {_size(shown)} to {_size(grey)}")
            time += lead
            if time > first / FRAMES_PER_SECOND + MAX_SECONDS:
                raise UserError(f"{name} lasts longer than {MAX_SECONDS} s: cut it into utterances")
            while shown is not None and due / FRAMES_PER_SECOND < time - _SLACK:
                yield shown
                due += 1
                if due - first == count:
                    return
            shown, end = grey, time + frame_seconds(stream)
        if shown is None:
            raise UserError(f"{name} holds no video frame")
        if cut is not None and first / FRAMES_PER_SECOND >= end - _SLACK:
            raise UserError(f"{name} lasts {end:.2f} s, and the 'offset' is {cut.offset:g} s")
        while due == 0 or due / FRAMES_PER_SECOND < end - _SLACK:
            yield shown
            due += 1
            if due - first == count:
                return


def read_video_sound(path: Path, where: str = "", cut: Cut | None = None) -> Tensor | None:
    """The sound track of a video file: (samples,) float32 mono at 16 kHz, or None where there is none.

    A track that starts after the video is padded with leading zeros, to stay in sync with ``read_video``.

    Args:
        path: a sound or video file of an accepted format.
        where: "file:line" for messages.
        cut: the part to read, to the sample where time stamps are that fine (in Matroska to the millisecond).

    Raises:
        UserError: the file is missing, damaged, truncated or longer than ``MAX_SECONDS``, its channels cancel each
            other out, or it ends before the cut begins; the message names it.
    """
    name = f"{at(where)}{path}"
    with opened(path, where) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise UserError(f"{name} has a sound track of a kind that cannot be decoded")
        first, count = (0, _MOST_SAMPLES + 1) if cut is None else cut.steps(SAMPLE_RATE)
        lead = round((start(stream) - earliest_start(container)) * SAMPLE_RATE)
        if cut is None and lead > _MOST_SAMPLES:
            raise UserError(f"{name} is damaged: its sound starts after {lead // SAMPLE_RATE} s")
        wave, skipped = _heard(stream, first - lead, min(count, _MOST_SAMPLES + 1), name)
        if wave is None:
            return None
        if len(wave) > max(0, first - lead - skipped) + _MOST_SAMPLES:
            raise UserError(f"{name} lasts longer than {MAX_SECONDS} s: cut it into utterances")
        if stream.duration:  # the codec's last block is padded
            wave = wave[: max(0, round(float(stream.duration * stream.time_base) * SAMPLE_RATE) - skipped)]
        begin = lead + skipped - first  # of the wave, in samples of the result
        wave = np.concatenate([np.zeros(min(max(0, begin), count), np.float32), wave[max(0, -begin) :]])
        if cut is None:
            return torch.from_numpy(wave)
        if not len(wave):
            raise UserError(f"{name} ends before the 'offset' of {cut.offset:g} s")
        return torch.from_numpy(wave[:count])


def _heard(stream: Any, first: int, count: int, name: str) -> tuple[np.ndarray | None, int]:
    """Samples of a track from ``first`` or before on, at least ``count`` from there if it has so many; None if it has
    none at all. Also how many were skipped."""
    begin, frames = decoded_from(stream, first / SAMPLE_RATE, name)
    # interleaved: PyAV reads beyond its planes where there are 8 channels
    resampler = av.AudioResampler(format="flt", rate=SAMPLE_RATE)
    parts: list[np.ndarray] = []
    samples, loudest, count_of_channels = 0, 0.0, 1
    skipped: int | None = None
    for frame in chain(frames, [None]):
        if skipped is None:
            time = begin if frame is None else seconds_of(frame)
            skipped = 0 if time is None else max(0, round((time - begin) * SAMPLE_RATE))
        for part in _resampled(resampler, frame, name):
            channels = np.ascontiguousarray(part.to_ndarray().reshape(-1, part.layout.nb_channels).T)
            loudest = max(loudest, float(np.abs(channels).max(initial=0)))
            count_of_channels = len(channels)
            parts.append(channels.mean(axis=0, dtype=np.float32))
            samples += len(parts[-1])
        if skipped + samples >= first + count:
            break
    if not samples:
        return None, 0
    wave = np.concatenate(parts)
    refuse_cancelled(torch.from_numpy(wave), loudest, count_of_channels, name)
    return wave, skipped or 0


def _decoded(stream: Any, name: str, begin: float | None) -> Iterator[tuple[np.ndarray, float]]:
    """(H, W) uint8 gray frames, and their seconds since the first one, from second ``begin`` or before on."""
    context = stream.codec_context
    if context is None:
        raise UserError(f"{name} has a video stream of a kind that cannot be decoded")
    if not 0 < max(context.width, context.height) <= MAX_SIDE:
        raise UserError(
            f"{name} has pictures of {context.width}x{context.height} pixels, allowed are sides of 1 to {MAX_SIDE}"
        )
    context.thread_type, context.thread_count = "NONE", 1
    last, count = 0.0, 0
    expected = _frames_to_come(stream)
    first, frames = decoded_from(stream, begin or 0.0, name)
    for frame in _progressive(_whole(frames, name), name):
        time = seconds_of(frame)
        last = max(last, count * frame_seconds(stream) if time is None else time - first)
        yield _grey(frame), last
        count += 1
    if begin is None and count < expected:
        raise UserError(f"{name} is truncated or damaged: {count} of its {expected} frames can be read")


def _whole(frames: Iterator[Any], name: str) -> Iterator[Any]:
    for count, frame in enumerate(frames):
        if frame.is_corrupt:
            raise UserError(f"{name} is damaged at frame {count}")
        yield frame


def _progressive(frames: Iterator[Any], name: str) -> Iterator[Any]:
    """Frames of which those flagged as interlaced, whose lines are of two moments, get the lines of one. The others
    are unchanged."""
    graph: Any = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
            graph.configure()
        if graph is None:
            yield frame
            continue
        yield from _filtered(graph, frame, name)
    if graph is not None:
        yield from _filtered(graph, None, name)


def _filtered(graph: Any, frame: Any, name: str) -> Iterator[Any]:
    """What the graph can give once it has a frame, or the end."""
    try:
        graph.push(frame)
        while True:
            yield graph.pull()
    except (av.BlockingIOError, av.EOFError):
        return
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{name} is damaged: {reason(error)}") from error


def _frames_to_come(stream: Any) -> int:
    """The number of frames that the index of an mp4 promises; 0 for other formats, whose headers may also count the
    pictures that are not stored because they repeat the one before. Call it before the first frame is read.

    The frame count of an mp4 includes frames hidden by its edit list: a cut without re-encoding keeps the frames from
    the key frame on, and a phone that trims a video keeps them all. The index leaves them out or marks them.
    """
    if "mp4" not in stream.container.format.name:
        return 0
    return min(stream.frames, sum(not entry.is_discard for entry in stream.index_entries))


def _resampled(resampler: Any, frame: Any, where: str) -> list[Any]:
    try:
        return list(resampler.resample(frame))
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{where} is damaged: {reason(error)}") from error


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


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
