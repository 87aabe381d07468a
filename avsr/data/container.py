"""Opens sound and video files with PyAV, and decodes one of their streams from any second on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import av

from avsr.data.members import is_file, readable
from avsr.data.rates import FRAMES_PER_SECOND
from avsr.data.truncation import truncated
from avsr.errors import UserError, at

# FFmpeg's names of the accepted formats, which are self-contained. Playlists (HLS, DASH, concat, SDP), numbered
# pictures and others refer to further files or addresses, which FFmpeg would open wherever they are.
_FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegts", "asf", "flv", "ogg", "nut", "mxf", "gxf", "rm", "wtv", "dv", "ivf"),
    *("h261", "h263", "h264", "hevc", "vvc", "m4v", "mpegvideo", "mjpeg", "vc1", "dirac", "av1", "obu"),
    *("gif", "apng", "yuv4mpegpipe", "wav", "w64", "aiff", "au", "caf", "voc", "flac", "mp3", "aac", "loas", "latm"),
    *("ac3", "eac3", "dts", "dtshd", "truehd", "mlp", "amr", "amrnb", "amrwb", "gsm", "ape", "tta", "wv"),
)
_OPTIONS = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "file"}
# those whose header states a duration; FFmpeg estimates it for the others
_TIMED = frozenset(("mov", "matroska", "asf", "flv", "mxf", "gxf", "ivf", "flac", "tta", "aiff", "au", "caf"))
_LATE = 0.25  # seconds by which the last packet may end before that duration: one without a duration of its own
_NEAR = 5.0  # seconds from the beginning that are decoded rather than jumped over
_MARGINS = (1.0, 15.0)  # seconds before the wanted one to jump to: decoders settle, and key frames are that far apart


@contextmanager
def opened(path: Path, where: str) -> Iterator[Any]:
    """The container of a file.

    Raises:
        UserError: it is missing, of no accepted format or truncated; the message begins with ``where``.
    """
    if not is_file(path):
        raise UserError(f"{at(where)}there is no file {path}")
    try:
        container = _open(path)
    except (av.FFmpegError, ValueError, OverflowError) as error:
        kind = _unlisted(path)
        why = f"it is of the format {kind}, which is not read: convert it to mp4" if kind else reason(error)
        raise UserError(f"{at(where)}{path} is not a readable video file: {why}") from error
    with container:
        if missing := truncated(path):
            raise UserError(f"{at(where)}{path} is truncated or damaged: {missing}")
        yield container


def _open(path: Path) -> Any:
    """The only place that opens video files. ``file:`` makes FFmpeg take the rest as a path, whatever it looks like; a
    member of a container is read by Python, and FFmpeg may open nothing."""
    source = readable(path)
    if isinstance(source, str):
        return av.open(f"file:{source}", options=_OPTIONS)
    return av.open(source, options={**_OPTIONS, "protocol_whitelist": "none"})


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


def video_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture; None if there is none."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    return None


def start(stream: Any) -> float:
    """Seconds, on the clock of the container."""
    return float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0


def earliest_start(container: Any) -> float:
    """Second of the container's clock that is time 0: the start of the earlier of picture and sound."""
    streams = [video_stream(container), *container.streams.audio[:1]]
    return min(start(stream) for stream in streams if stream is not None)


def frame_seconds(stream: Any) -> float:
    """The time from one picture to the next."""
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 1 / FRAMES_PER_SECOND


def decoded_from(stream: Any, second: float, name: str) -> tuple[float, Iterator[Any]]:
    """The frames of a stream from ``second`` after its first one, or before, to its end.

    A file whose streams end before it should is known as truncated once the frames are exhausted.

    Returns:
        The time of the stream's very first frame in seconds of the container's clock, and the frames.

    Raises:
        UserError: the file, called ``name``, is damaged, or truncated, or its ``second`` cannot be found.
    """
    frames = _decoded(stream, name)
    first = next(frames, None)
    if first is None:
        return 0.0, iter(())
    begin = seconds_of(first)
    if second <= _NEAR or begin is None:
        return begin or 0.0, chain([first], frames)
    for margin in (*_MARGINS, second):
        found = _jump(stream, begin + second - margin, name)
        if found is not None and (margin == second or (seconds_of(found[0]) or 0.0) <= begin + second):
            return begin, chain([found[0]], found[1])
    raise UserError(
        f"{name} cannot be read from second {second:g} on: convert it to a format with an index, such as mp4"
    )


def seconds_of(frame: Any) -> float | None:
    """Of the container's clock; a raw stream has no time stamps."""
    return None if frame.pts is None else float(frame.pts * frame.time_base)


def _jump(stream: Any, target: float, name: str) -> tuple[Any, Iterator[Any]] | None:
    """The first key frame after a jump to about ``target``, and the frames after it. Those before it refer to others
    that were jumped over."""
    try:
        stream.container.seek(round(target / stream.time_base), stream=stream)
        frames = _decoded(stream, name)
        for frame in frames:
            if frame.key_frame and not frame.is_corrupt and frame.pts is not None:
                return frame, frames
    except (av.FFmpegError, ValueError, OverflowError, UserError):  # another margin may find it
        return None
    return None


def _decoded(stream: Any, name: str) -> Iterator[Any]:
    container, end = stream.container, 0.0
    due = container.duration / av.time_base if _timed(stream) and container.duration else 0.0
    try:
        for packet in container.demux():
            if packet.pts is not None and packet.size:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                yield from packet.decode()
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{name} is damaged: {reason(error)}") from error
    if end < due - _LATE:
        raise UserError(f"{name} is truncated or damaged: it ends at {end:.2f} of {due:.2f} s")


def _timed(stream: Any) -> bool:
    """Whether the header states a duration, and the index of an mp4 does not count the frames, which is safer."""
    names = stream.container.format.name.split(",")
    return not _TIMED.isdisjoint(names) and not ("mov" in names and stream.frames)


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
