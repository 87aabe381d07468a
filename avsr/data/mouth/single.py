"""The mouth of one video file, for transcribing videos that were not prepared."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from avsr.data.clip import MOUTH_SIZES
from avsr.data.mouth.cut import COVERAGE, FORMAT, Refused, check_landmarks, cut_mouths
from avsr.data.mouth.faces import require_detector, track_landmarks
from avsr.data.video import encode_video, video_frames
from avsr.errors import UserError
from avsr.runtime.folders import cache_folder, write_flushed

logger = logging.getLogger("avsr")


def mouth_video(path: Path) -> Path:
    """``path`` if its pictures are mouth crops already; else a video of the mouth, made once and kept in the cache.

    Raises:
        UserError: the video is unreadable, too few of its frames have a face (as in ``avsr prepare``), the mouth is
            outside the picture, or the landmark detector is missing.
    """
    height, width = next(iter(video_frames(path))).shape
    if height == width and MOUTH_SIZES[0] <= height <= MOUTH_SIZES[1]:
        return path
    stat = path.stat()
    key = hashlib.sha256(f"{FORMAT} {path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:24]
    target = cache_folder() / "mouths" / f"{key}.mp4"
    if target.is_file():
        try:
            for _ in video_frames(target):
                pass
            return target
        except UserError as error:
            logger.warning("the cached mouth is damaged and is cut out again: %s", error)
    try:
        require_detector()
    except UserError as error:
        raise UserError(f"{path} is {width}x{height}, no mouth crop of 96x96 pixels: {error}") from error
    try:
        frames, valid, outside = cut_mouths(path, track_landmarks(video_frames(path)))
        check_landmarks(valid, outside, COVERAGE)
    except Refused as refused:
        raise UserError(f"no mouth could be cut out of {path} ({width}x{height}): {refused}") from refused
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(target, encode_video(frames))
    except OSError as error:
        raise UserError(f"cannot write the mouth of {path} to {target}: {error}") from error
    return target
