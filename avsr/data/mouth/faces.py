"""Finds 68 landmarks with dlib (PyPI ``dlib-bin``) and its model (PyPI ``face-recognition-models``).

The first is part of the extra ``prepare``, the second of weights.txt; nothing is downloaded at run time. The model was
trained on iBUG 300-W, which excludes commercial use.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from avsr.errors import UserError
from avsr.runtime.packages import install, verify

DETECT_EVERY = 5  # frames; the box is interpolated in between

_MODEL = ("models", "shape_predictor_68_face_landmarks.dat")
_SIDE = 640  # pixels; the detector gets pictures of at most this size
_SAME_FACE = 0.3  # smallest overlap (intersection over union) of one face's boxes between detections

Box = np.ndarray  # (4,) float: left, top, right, bottom


def require_detector() -> None:
    """Raises a ``UserError`` that names the missing package."""
    _detector()


@cache
def _detector() -> tuple[Any, Any, Any]:
    need, otherwise = "finding faces needs", "or give landmarks=FOLDER with landmark files"
    try:
        dlib = importlib.import_module("dlib")
    except ImportError as error:
        raise UserError(f"{need} dlib-bin ({error}): pip install 'flashsink[prepare]', {otherwise}") from error
    # located without importing it: its code needs pkg_resources, which newer setuptools lack
    spec = importlib.util.find_spec("face_recognition_models")
    folders = list(spec.submodule_search_locations or []) if spec else []
    model = next((path for f in folders if (path := Path(f, *_MODEL)).is_file()), None)
    if model is None:
        raise UserError(f"{need} a model: {install('face_recognition_models')}, {otherwise}")
    verify(model)
    return dlib, dlib.get_frontal_face_detector(), dlib.shape_predictor(str(model))


def track_landmarks(frames: Iterable[np.ndarray]) -> np.ndarray:
    """The landmarks of one face throughout a video: the largest face at first, then the one nearest to it.

    Faces are detected in every fifth frame, and in every frame where the face appears, disappears or jumps.

    Args:
        frames: (H, W) uint8 gray.

    Returns:
        (T, 68, 2) float32 in pixels, NaN where there is no face.

    Raises:
        UserError: dlib or its model is missing.
    """
    _detector()
    out: list[np.ndarray] = []
    waiting: list[np.ndarray] = []  # frames since the last detection, which have no box yet
    last: Box | None = None
    for index, frame in enumerate(frames):
        if index % DETECT_EVERY:
            waiting.append(frame)
            continue
        box = _find(frame, last)
        out += _between(waiting, last, box)
        out.append(_points(frame, box))
        waiting, last = [], box if box is not None else last
    out += _between(waiting, last, None)
    return np.stack(out) if out else np.zeros((0, 68, 2), np.float32)


def _between(frames: list[np.ndarray], before: Box | None, after: Box | None) -> list[np.ndarray]:
    found = []
    if before is not None and after is not None and _overlap(before, after) >= _SAME_FACE:
        for index, frame in enumerate(frames, 1):
            share = index / (len(frames) + 1)
            found.append(_points(frame, (1 - share) * before + share * after))
        return found
    if before is None and after is None:
        return [_points(frame, None) for frame in frames]
    for frame in frames:
        box = _find(frame, before)
        found.append(_points(frame, box))
        before = box if box is not None else before
    return found


def _find(frame: np.ndarray, last: Box | None) -> Box | None:
    """The box of a face, or None. A second pass at twice the size finds smaller faces."""
    _, detector, _ = _detector()
    scale = min(1.0, _SIDE / max(frame.shape))
    small = frame
    if scale < 1:
        size = (max(1, round(frame.shape[0] * scale)), max(1, round(frame.shape[1] * scale)))
        picture = torch.from_numpy(np.ascontiguousarray(frame)).float()[None, None]
        small = F.interpolate(picture, size=size, mode="area")[0, 0].round().to(torch.uint8).numpy()
    for larger in (0, 1):
        boxes = [
            np.array([r.left(), r.top(), r.right(), r.bottom()], dtype=np.float64) / scale
            for r in detector(np.ascontiguousarray(small), larger)
        ]
        if boxes:
            if last is not None and max(_overlap(box, last) for box in boxes) > 0:
                return max(boxes, key=lambda box: _overlap(box, last))
            return max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    return None


def _points(frame: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return np.full((68, 2), np.nan, np.float32)
    dlib, _, predictor = _detector()
    shape = predictor(np.ascontiguousarray(frame), dlib.rectangle(*(round(float(side)) for side in box)))
    return np.array([(point.x, point.y) for point in shape.parts()], dtype=np.float32)


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return float(common / (areas - common))
