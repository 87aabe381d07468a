"""Crops the mouth from a video of a face, given its landmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from avsr.data.mouth.crop import MIN_FRAMES, MouthCropper, valid_frames
from avsr.data.video import video_frames
from avsr.errors import UserError

FORMAT = "avsr-prepare-1"  # change it whenever the crops change
COVERAGE = 0.5  # smallest fraction of a clip's frames that must have landmarks
_LOST_FRAMES = 2  # by which landmarks and video may differ in length: FFmpeg's releases disagree about the end
_MOST_OUTSIDE = 0.25  # largest fraction of the crops outside the picture


class Refused(Exception):
    """A video has no usable mouth; ``kind`` is a short reason to count by."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def cut_mouths(video: Path, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T, 96, 96) uint8 mouths, (T,) bool where there were landmarks, (T,) fractions outside the picture.

    Args:
        video: a video of a face.
        landmarks: (T, 68, 2) pixels at 25 fps, NaN where there is no face.

    Raises:
        Refused: too few frames have a face, the landmarks belong to another video, or the video cannot be read.
    """
    valid = valid_frames(landmarks)
    if valid.sum() < MIN_FRAMES:
        raise Refused("no face", f"{video} has {valid.sum()} frames with a face, {MIN_FRAMES} are needed")
    cropper = MouthCropper(landmarks)
    crops, outside, count = [], [], 0
    try:
        for count, frame in enumerate(video_frames(video), 1):
            if count <= len(landmarks) + _LOST_FRAMES:
                mouth, share = cropper.crop(count - 1, frame)
                crops.append(mouth)
                outside.append(share)
    except UserError as error:
        raise Refused("video", str(error)) from error
    if abs(count - len(landmarks)) > _LOST_FRAMES:
        raise Refused(
            "landmarks",
            f"there are landmarks of {len(landmarks)} frames for {video}, which has {count} at 25 fps",
        )
    known = np.zeros(count, bool)
    known[: len(valid)] = valid[:count]
    return np.stack(crops), known, np.array(outside)


def check_landmarks(valid: np.ndarray, outside: np.ndarray, coverage: float) -> None:
    """Refuses a clip with a face in too few of its frames, or with the mouth outside the picture.

    Args:
        valid: (T,) bool, where there were landmarks.
        outside: (T,) fractions of the crops outside the picture.
        coverage: smallest fraction of the frames that must have landmarks.

    Raises:
        Refused: gives the number found.
    """
    if valid.sum() < MIN_FRAMES:
        raise Refused("no face", f"{valid.sum()} frames with a face, {MIN_FRAMES} are needed")
    if valid.mean() < coverage:
        raise Refused("no face", f"a face in {valid.mean():.0%} of the frames, less than coverage={coverage:g}")
    if outside.mean() > _MOST_OUTSIDE:
        raise Refused("outside", f"{outside.mean():.0%} of the mouth crop lies outside the picture")
