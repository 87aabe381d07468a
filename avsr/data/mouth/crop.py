"""The mouth crop: upright, at a fixed scale, centered on the mouth.

As in the preparation of LRS2 and LRS3 that AV-HuBERT and auto_avsr use: the landmarks' shape is averaged over a
window of 12 frames; a similarity (rotation, one scale, shift) takes eight stable points of it to a reference face in
a picture of 256x256; the crop is 96x96 around the mean of the mouth's points there. Only the scale and the upright
direction of the reference matter, because the crop is centered on the mouth itself.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.nn import functional as F

CROP = 96  # pixels
MIN_FRAMES = 12  # frames with landmarks that a video needs; the size of the smoothing window
STABLE = (28, 33, 36, 39, 42, 45, 48, 54)  # nose bridge and base, corners of the eyes, corners of the mouth
MOUTH = slice(48, 68)

_HALF_WINDOW = 6
_INLIER = 5.0  # pixels of the reference by which a point may always be off; landmarks and faces differ by that much
_SMALLEST = 2.0  # pixels from eye to mouth below which the points are not a face
_MOST_SAMPLES = 8  # per side of a crop pixel

# Proportions of an adult face seen from the front, in distances between the outer corners of the eyes (about 90 mm):
# an eye is a third of it wide, the nose ends 0.57 and the mouth is 0.83 below the line of the eyes, the mouth is 0.6
# wide, and point 28 is a third down the bridge of the nose. The scale of 74 pixels is that of the crops AV-HuBERT was
# trained on, measured on their reference face, whose mouth is 45 pixels wide.
_EYES = 74.0
REFERENCE = _EYES * np.array(
    [(0.0, 0.16), (0.0, 0.57), (-0.5, 0.0), (-0.22, 0.01), (0.22, 0.01), (0.5, 0.0), (-0.3, 0.83), (0.3, 0.83)]
)


def valid_frames(landmarks: np.ndarray) -> np.ndarray:
    """(T,) bool: frames of (T, 68, 2) landmarks that are finite and large enough to be a face."""
    with np.errstate(invalid="ignore"):
        stable = landmarks[:, list(STABLE)]
        spread = np.ptp(stable, axis=1).max(axis=-1)
        return np.isfinite(landmarks).all(axis=(1, 2)) & (spread >= _SMALLEST)


def fill(landmarks: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(T, 68, 2) float64 with invalid frames interpolated linearly; the first and last valid frames extend to the ends.
    At least one frame must be valid."""
    known = np.flatnonzero(valid)
    flat = landmarks.reshape(len(landmarks), -1).astype(np.float64)
    times = np.arange(len(landmarks))
    return np.stack([np.interp(times, known, column[known]) for column in flat.T], axis=1).reshape(landmarks.shape)


def smooth(landmarks: np.ndarray) -> np.ndarray:
    """Averages the shape over up to 6 frames on either side (fewer near the ends, the same number on both sides). The
    center of each frame's points is kept, so that a fast head is not lost. (T, 68, 2) float64."""
    count = len(landmarks)
    center = landmarks.mean(axis=1, keepdims=True)
    shape = landmarks - center
    sums = np.concatenate([np.zeros_like(shape[:1]), np.cumsum(shape, axis=0)])
    index = np.arange(count)
    half = np.minimum(_HALF_WINDOW, np.minimum(index, count - 1 - index))
    mean = (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)[:, None, None]
    return mean + center


def similarity(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(T,) complex: the rotation and scale ``a`` of the similarity z -> a z + b that takes points to the reference.

    Least median of squares (Rousseeuw 1984): two points determine a similarity, so all pairs are tried and nothing is
    random; then least squares over the points within 2.5 robust standard deviations of the best one, or within 5
    pixels, so that an ordinary face uses all points and does not jitter.

    Args:
        points: (T, N, 2), N at least 3, not all equal.
        reference: (N, 2).
    """
    z = points[..., 0] + 1j * points[..., 1]
    r = reference[:, 0] + 1j * reference[:, 1]
    count = len(r)
    first, second = (np.array(side) for side in zip(*itertools.combinations(range(count), 2), strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        a = (r[second] - r[first]) / (z[:, second] - z[:, first])  # (T, pairs)
        b = r[first] - a * z[:, first]
        squares = np.abs(a[..., None] * z[:, None, :] + b[..., None] - r) ** 2  # (T, pairs, N)
    squares = np.where(np.isfinite(squares), squares, np.inf)
    medians = np.median(squares, axis=-1)
    best = medians.argmin(axis=1)
    frames = np.arange(len(z))
    sigma = 1.4826 * (1 + 5 / max(count - 2, 1)) * np.sqrt(medians[frames, best])
    inside = squares[frames, best] <= np.maximum(2.5 * sigma, _INLIER)[:, None] ** 2
    weight = inside / inside.sum(axis=1, keepdims=True)
    zc = z - (weight * z).sum(axis=1, keepdims=True)
    rc = r - (weight * r).sum(axis=1, keepdims=True)
    return (weight * np.conj(zc) * rc).sum(axis=1) / (weight * np.abs(zc) ** 2).sum(axis=1)


class MouthCropper:
    """Crops the mouth from the frames of one video.

    Args:
        landmarks: (T, 68, 2) in pixels of the frames, NaN where a frame has none; at least one frame must be valid.
    """

    def __init__(self, landmarks: np.ndarray) -> None:
        smoothed = smooth(fill(landmarks, valid_frames(landmarks)))
        self._turn = similarity(smoothed[:, list(STABLE)], REFERENCE)
        mouth = smoothed[:, MOUTH].mean(axis=1)
        self._center = mouth[:, 0] + 1j * mouth[:, 1]

    def __len__(self) -> int:
        return len(self._turn)

    def crop(self, index: int, frame: np.ndarray) -> tuple[np.ndarray, float]:
        """The mouth in frame ``index``.

        Pixels are interpolated; where the face is larger than in the reference, several are averaged. Outside the frame
        the crop is 0.

        Args:
            index: of the frame; past the last landmarks, the last ones apply.
            frame: (H, W) uint8 gray.

        Returns:
            (96, 96) uint8, and the fraction of it outside the frame.
        """
        index = min(index, len(self) - 1)
        turn = self._turn[index]
        samples = int(np.clip(np.ceil(1 / np.abs(turn)), 1, _MOST_SAMPLES))
        offset = (np.arange(CROP * samples) + 0.5) / samples - CROP / 2
        points = self._center[index] + (offset[None, :] + 1j * offset[:, None]) / turn
        x, y = points.real, points.imag
        height, width = frame.shape
        outside = float(((x < -0.5) | (y < -0.5) | (x > width - 0.5) | (y > height - 0.5)).mean())
        # only the part of the frame that is needed is converted to float
        left, top = max(int(np.floor(x.min())), 0), max(int(np.floor(y.min())), 0)
        right, bottom = min(int(np.ceil(x.max())) + 1, width), min(int(np.ceil(y.max())) + 1, height)
        if right <= left or bottom <= top:
            return np.zeros((CROP, CROP), np.uint8), 1.0
        part = torch.from_numpy(np.ascontiguousarray(frame[top:bottom, left:right])).float()[None, None]
        grid = np.stack([_unit(x - left, right - left), _unit(y - top, bottom - top)], axis=-1)
        sampled = F.grid_sample(part, torch.from_numpy(grid).float()[None], mode="bilinear", align_corners=False)
        crop = F.avg_pool2d(sampled, samples) if samples > 1 else sampled
        return crop[0, 0].round().clamp(0, 255).to(torch.uint8).numpy(), outside


def _unit(position: np.ndarray, size: int) -> np.ndarray:
    """Pixel positions (centers at whole numbers) to the -1..1 of ``grid_sample`` without ``align_corners``."""
    return (2 * position + 1) / size - 1
