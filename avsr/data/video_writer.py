"""Writes gray frames, with or without sound, as a small H.264 mp4 file. Does not import torch, so it starts fast."""

from __future__ import annotations

import importlib
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE
from avsr.errors import UserError

_SOUND_BITS = 64_000  # per second
# With B-frames or macroblock trees, x264 (core 165) reads uninitialized memory, and one clip in hundreds comes out
# different; without them, and without the look-ahead that feeds them, output is reproducible.
_X264 = {"preset": "veryfast", "x264-params": "bframes=0:no-mbtree=1:rc-lookahead=0:threads=1"}


def write_video(
    path: Path, frames: np.ndarray, fps: int = FRAMES_PER_SECOND, *, sound: np.ndarray | None = None
) -> None:
    """Writes ``encode_video`` of the arguments to ``path``.

    Raises:
        UserError: the file cannot be written.
    """
    data = encode_video(frames, fps, sound=sound)
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def encode_video(
    frames: np.ndarray, fps: int = FRAMES_PER_SECOND, *, sound: np.ndarray | None = None, crf: int = 23
) -> bytes:
    """An mp4 file; the same input gives the same bytes.

    Args:
        frames: (T, H, W) uint8 gray, T at least 1, H and W even (H.264's usual 4:2:0 has one color per 2x2 pixels).
        fps: frames per second.
        sound: (samples,) float mono at 16 kHz in -1..1, stored as an AAC track.
        crf: x264's quality, 0 is lossless.

    Raises:
        ValueError: frames have another shape or dtype.
    """
    if frames.ndim != 3 or frames.dtype != np.uint8 or 0 in frames.shape or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames: expected (T, H, W) uint8 with even H and W, got {frames.shape} {frames.dtype}")
    av: Any = importlib.import_module("av")  # needed only for writing
    _, height, width = frames.shape
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.thread_count = 1
        video.options = {**_X264, "crf": str(crf)}
        track = None
        if sound is not None:
            track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            track.codec_context.bit_rate = _SOUND_BITS
        picture = np.full((height * 3 // 2, width), 128, np.uint8)  # luma, then two color planes of neutral gray
        luma = np.rint(16 + np.arange(256) * (219 / 255)).astype(np.uint8)  # players expect 16 to 235
        for index, grey in enumerate(frames):
            picture[:height] = luma[grey]
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if track is not None and sound is not None:
            wave = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound, np.float32)[None], format="fltp", layout="mono"
            )
            wave.sample_rate, wave.pts, wave.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(track.encode(wave))
            container.mux(track.encode())
    return buffer.getvalue()
