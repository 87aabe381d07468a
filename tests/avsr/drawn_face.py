"""A face whose landmarks are known."""

from __future__ import annotations

from typing import Any

import numpy as np


def _points_of_a_face() -> np.ndarray:
    """(68, 2): a face in units of half the distance between the outer corners of its eyes, which are at y = 0."""
    jaw = np.linspace(np.pi, 0, 17)
    points = [(1.35 * np.cos(t), 0.2 + 2.1 * np.sin(t)) for t in jaw]
    points += [(x, -0.45) for x in np.linspace(-1.1, -0.3, 5)] + [(x, -0.45) for x in np.linspace(0.3, 1.1, 5)]
    points += [(0.0, y) for y in np.linspace(0.0, 0.95, 4)] + [(x, 1.15) for x in np.linspace(-0.3, 0.3, 5)]
    for middle in (-0.72, 0.72):
        points += [
            (middle + 0.28 * x, 0.1 * y) for x, y in ((-1, 0), (-0.4, -1), (0.4, -1), (1, 0), (0.4, 1), (-0.4, 1))
        ]
    points += [(0.6 * np.cos(t), 1.66 + 0.22 * np.sin(t)) for t in np.linspace(np.pi, 3 * np.pi, 13)[:-1]]
    points += [(0.45 * np.cos(t), 1.66 + 0.1 * np.sin(t)) for t in np.linspace(np.pi, 3 * np.pi, 9)[:-1]]
    return np.array(points)


def draw_face(
    turn: Any, half: Any, x: Any, y: Any, size: tuple[int, int] = (160, 160)
) -> tuple[np.ndarray, np.ndarray]:
    """(T, H, W) uint8 frames and their (T, 68, 2) landmarks.

    ``turn`` is the head's tilt in radians, ``half`` half the distance between the eyes in pixels, ``x`` and ``y`` the
    place of the middle between the eyes; one of each for a frame. The mouth is a white ellipse with a black spot at
    its right end, on a grey face.
    """
    turn, half, x, y = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (turn, half, x, y)))
    face = _points_of_a_face() @ np.array([1, 1j])
    rows, columns = np.mgrid[: size[0], : size[1]]
    frames, landmarks = [], []
    for t, h, a, b in zip(turn, half, x, y, strict=True):
        where = ((columns - a) + 1j * (rows - b)) * np.exp(-1j * t) / h  # pixels in the units of the face
        u, v = where.real, where.imag
        level = np.full(size, 40.0)

        def paint(distance: np.ndarray, value: float, level: np.ndarray = level, h: float = h) -> None:
            inside = np.clip(0.5 - (distance - 1) * h * 0.5, 0, 1)
            level += inside * (value - level)

        paint(np.hypot(u / 1.5, (v - 0.6) / 2.2), 120)
        for middle in (-0.72, 0.72):
            paint(np.hypot((u - middle) / 0.28, v / 0.12), 20)
        paint(np.hypot(u / 0.6, (v - 1.66) / 0.22), 250)
        paint(np.hypot((u - 0.6) / 0.12, (v - 1.66) / 0.12), 0)
        moved = face * h * np.exp(1j * t) + a + 1j * b
        frames.append(np.rint(level).astype(np.uint8))
        landmarks.append(np.stack([moved.real, moved.imag], axis=1))
    return np.stack(frames), np.stack(landmarks)
