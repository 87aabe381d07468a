"""Mouth crops: against drawn faces whose geometry is known, and each step against an independent computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from avsr.data.mouth.crop import CROP, REFERENCE, STABLE, MouthCropper, fill, similarity, smooth, valid_frames

Draw = Callable[..., tuple[np.ndarray, np.ndarray]]


def mouth_of(crop: np.ndarray) -> tuple[float, float, float, float]:
    """Centre x and y of the white mouth in a crop, the direction of its longer axis in degrees, its half width."""
    weight = np.clip(crop.astype(float) - 160, 0, None)
    rows, columns = np.mgrid[:CROP, :CROP]
    x, y = (float((axis * weight).sum() / weight.sum()) for axis in (columns, rows))
    spread = np.cov(np.stack([columns.ravel() - x, rows.ravel() - y]), aweights=weight.ravel())
    values, vectors = np.linalg.eigh(spread)
    angle = np.degrees(np.arctan2(vectors[1, -1], vectors[0, -1]))
    return x, y, float((angle + 90) % 180 - 90), float(2 * np.sqrt(values[-1]))


def crops_of(frames: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    cropper = MouthCropper(landmarks)
    return np.stack([cropper.crop(index, frame)[0] for index, frame in enumerate(frames)])


@pytest.mark.parametrize("half", [18.0, 37.0, 80.0])
@pytest.mark.parametrize("turn", [-0.5, 0.0, 0.3])
def test_the_mouth_is_centred_upright_and_of_one_size(draw_face: Draw, half: float, turn: float) -> None:
    size = (int(7 * half), int(6 * half))
    frames, landmarks = draw_face([turn] * 13, half, size[1] * 0.5, size[0] * 0.35, size)
    crop = crops_of(frames, landmarks)[6]
    assert crop.shape == (96, 96) and crop.dtype == np.uint8
    x, y, angle, width = mouth_of(crop)
    # the spot blackens the right end, so the center of the white part is slightly to the left
    assert abs(y - 47.5) < 1 and -3 < x - 47.5 < 0.5
    assert abs(angle) < 2
    assert crop[44:52, 64:74].min() < 60 < crop[44:52, 22:32].min()  # the spot is on the right
    # 0.6 of half the eyes' distance, which the reference makes 37 pixels, within what the proportions differ
    assert 17 < width < 26


def test_a_moving_head_gives_the_same_crop(draw_face: Draw) -> None:
    time = np.arange(60) / 25
    frames, landmarks = draw_face(
        0.25 * np.sin(2 * time), 32 * (1 + 0.1 * np.sin(time)), 80 + 20 * np.sin(5 * time), 62 + 8 * np.cos(4 * time)
    )
    crops = crops_of(frames, landmarks)
    found = np.array([mouth_of(crop) for crop in crops])
    assert np.ptp(found[:, 0]) < 2 and np.ptp(found[:, 1]) < 2  # pixels, while the head moves by 40
    assert np.abs(found[:, 2]).max() < 2
    assert np.abs(crops.astype(float) - crops[30]).mean() < 5


def test_frames_without_landmarks_are_interpolated(draw_face: Draw) -> None:
    time = np.arange(40)
    frames, landmarks = draw_face(0.005 * time, 30, 60 + time * 0.7, 60)
    whole = crops_of(frames, landmarks)
    landmarks[[0, 1, 12, 13, 14, 39]] = np.nan
    landmarks[20, 5] = np.inf
    landmarks[25] = 7.0  # all points at one place are no face
    assert valid_frames(landmarks).sum() == 32
    gaps = crops_of(frames, landmarks)
    assert np.abs(gaps[5:35].astype(float) - whole[5:35]).mean() < 1
    for crop in gaps[[12, 13, 14, 20, 25]]:
        x, y, *_ = mouth_of(crop)
        assert abs(y - 47.5) < 1 and -3 < x - 47.5 < 0.5


def test_filling_in(draw_face: Draw) -> None:
    _, landmarks = draw_face(np.zeros(6), 30, np.arange(6.0), 0)
    valid = np.array([False, True, False, False, True, False])
    broken = np.where(valid[:, None, None], landmarks, np.nan)
    filled = fill(broken, valid)
    expected = landmarks.copy()
    expected[0], expected[5] = landmarks[1], landmarks[4]
    np.testing.assert_allclose(filled, expected, atol=1e-9)


def test_smoothing_is_the_mean_over_the_window() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 12, 30):
        landmarks = rng.normal(size=(count, 68, 2)) * 20 + 100
        smoothed = smooth(landmarks)
        for t in range(count):
            half = min(6, t, count - 1 - t)
            mean = landmarks[t - half : t + half + 1].mean(axis=0)
            mean += landmarks[t].mean(axis=0) - mean.mean(axis=0)
            np.testing.assert_allclose(smoothed[t], mean, atol=1e-9)


def least_squares(points: np.ndarray, reference: np.ndarray) -> complex:
    """The similarity as four real unknowns: x' = p x - q y + c, y' = q x + p y + d."""
    rows, right = [], []
    for (x, y), (u, v) in zip(points, reference, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        right += [u, v]
    p, q, _, _ = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
    return complex(p, q)


def test_without_outliers_the_similarity_is_least_squares() -> None:
    rng = np.random.default_rng(1)
    points = REFERENCE * 1.7 + rng.normal(size=(20, 8, 2)) * 2 + 30
    found = similarity(points, REFERENCE)
    for one, expected in zip(found, points, strict=True):
        assert abs(one - least_squares(expected, REFERENCE)) < 1e-9


def test_outliers_do_not_move_it() -> None:
    rng = np.random.default_rng(2)
    turn = 0.6 * np.exp(0.4j)
    z = (REFERENCE @ np.array([1, 1j])) / turn + (40 + 10j)
    points = np.stack([z.real, z.imag], axis=1)[None] + rng.normal(size=(30, 8, 2)) * 0.2
    for row in points:
        for index in rng.choice(8, size=2, replace=False):
            row[index] += rng.choice([-1, 1], size=2) * 60
    found = similarity(points, REFERENCE)
    assert np.abs(found - turn).max() < 0.02
    plain = np.array([least_squares(row, REFERENCE) for row in points])
    assert np.median(np.abs(plain - turn)) > 0.1  # what it would be without the robust step


def test_points_at_one_place_do_not_spoil_the_others() -> None:
    points = REFERENCE[None] * 2.0
    points[0, 1] = points[0, 0]
    assert abs(similarity(points, REFERENCE)[0] - 0.5) < 1e-6


@pytest.mark.parametrize("half", [30.0, 36.9])
def test_the_pixels_are_those_of_scipy(draw_face: Draw, half: float) -> None:
    rng = np.random.default_rng(3)
    _, landmarks = draw_face([0.2], half, 90.3, 50.8)
    frame = ndimage.gaussian_filter(rng.uniform(0, 255, (150, 170)), 1.5)
    frame = ((frame - frame.min()) / np.ptp(frame) * 255).astype(np.uint8)
    crop, outside = MouthCropper(landmarks).crop(0, frame)
    turn = similarity(landmarks[:, list(STABLE)], REFERENCE)[0]
    k = max(1, int(np.ceil(1 / abs(turn))))
    offset = (np.arange(CROP * k) + 0.5) / k - 48
    mouth = landmarks[0, 48:68].mean(axis=0)
    points = complex(*mouth) + (offset[None, :] + 1j * offset[:, None]) / turn
    padded = np.pad(frame.astype(float), 200)
    sampled = ndimage.map_coordinates(padded, [points.imag + 200, points.real + 200], order=1)
    expected = sampled.reshape(CROP, k, CROP, k).mean(axis=(1, 3))
    assert np.abs(crop - expected).max() <= 0.51
    inside = (points.real >= -0.5) & (points.imag >= -0.5) & (points.real <= 169.5) & (points.imag <= 149.5)
    assert outside == pytest.approx(1 - inside.mean())


def test_a_large_face_is_averaged_not_picked(draw_face: Draw) -> None:
    size = (900, 900)
    _, landmarks = draw_face([0.0], 150.0, 450, 300, size)
    stripes = np.zeros(size, np.uint8)
    stripes[:, ::2] = 255  # finer than a pixel of the crop: their mean is grey
    crop, _ = MouthCropper(landmarks).crop(0, stripes)
    assert np.abs(crop.astype(float) - 127.5).max() < 40 and crop.std() < 20


def test_what_lies_outside_is_black_and_counted(draw_face: Draw) -> None:
    white: Any = np.full((160, 160), 255, np.uint8)
    _, landmarks = draw_face([0.0], 37, 80, 160 - 1.66 * 37)  # the mouth on the lower edge
    crop, outside = MouthCropper(landmarks).crop(0, white)
    assert outside == pytest.approx(0.5, abs=0.03)
    assert crop[:40].min() == 255 and crop[56:].max() == 0
    _, landmarks = draw_face([0.0], 37, 500, 500)
    crop, outside = MouthCropper(landmarks).crop(0, white)
    assert outside == 1.0 and crop.max() == 0
