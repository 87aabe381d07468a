"""Finding faces: the tracking with a stand-in detector, and dlib itself on drawn faces where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from avsr.data.manifest import read_manifest
from avsr.data.mouth import faces
from avsr.data.mouth.faces import track_landmarks
from avsr.data.video import encode_video, read_video
from avsr.errors import UserError
from avsr.tools.corpora.prepare.options import PrepareOptions
from avsr.tools.corpora.prepare.run import prepare

Boxes = list[tuple[int, int, int, int]]


class Rectangle(SimpleNamespace):
    def __init__(self, *sides: int) -> None:
        super().__init__(sides=sides)
        for name, side in zip(("left", "top", "right", "bottom"), sides, strict=True):
            setattr(self, name, lambda side=side: side)


class FakeDetector:
    """Frame k is flat grey of level k and holds the boxes ``plan[k]``; the 68 points are all the box's corner."""

    def __init__(self) -> None:
        self.plan: dict[int, Boxes] = {}
        self.asked: list[int] = []
        self.only_larger: set[int] = set()

    def __call__(self, frame: np.ndarray, larger: int) -> list[Rectangle]:
        level = int(frame[0, 0])
        self.asked.append(level)
        if level in self.only_larger and not larger:
            return []
        scale = frame.shape[1] / 1280 if frame.shape[1] == faces._SIDE else 1.0
        return [Rectangle(*(round(side * scale) for side in box)) for box in self.plan.get(level, [])]

    def points(self, frame: np.ndarray, box: Rectangle) -> Any:
        part = SimpleNamespace(x=box.sides[0], y=box.sides[1])
        return SimpleNamespace(parts=lambda: [part] * 68)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDetector]:
    detector = FakeDetector()
    monkeypatch.setattr(faces, "_detector", lambda: (SimpleNamespace(rectangle=Rectangle), detector, detector.points))
    yield detector


def frames(count: int, width: int = 400) -> Iterator[np.ndarray]:
    return (np.full((300, width), level, np.uint8) for level in range(count))


def test_the_box_moves_evenly_between_detections(fake: FakeDetector) -> None:
    fake.plan = {0: [(0, 50, 100, 150)], 5: [(20, 40, 120, 140)], 10: [(20, 40, 120, 140)]}
    found = track_landmarks(frames(11))
    assert fake.asked == [0, 5, 10]
    assert found.shape == (11, 68, 2) and found.dtype == np.float32
    np.testing.assert_array_equal(found[:, 3, 0], [0, 4, 8, 12, 16, 20, 20, 20, 20, 20, 20])
    np.testing.assert_array_equal(found[:6, 3, 1], [50, 48, 46, 44, 42, 40])


def test_one_face_is_followed(fake: FakeDetector) -> None:
    small, large = (0, 0, 50, 50), (200, 0, 300, 100)
    fake.plan = {0: [small, large], 5: [(200, 0, 280, 80), (0, 0, 150, 150)], 10: [(0, 0, 150, 150)]}
    found = track_landmarks(frames(11))
    assert found[0, 0, 0] == 200  # the larger one at first
    assert found[5, 0, 0] == 200  # then the one that overlaps it, though another is larger now
    assert found[10, 0, 0] == 0  # the face has disappeared


def test_a_face_that_comes_and_goes(fake: FakeDetector) -> None:
    box = (10, 10, 90, 90)
    fake.plan = {level: [box] for level in (7, 8, 9, 10, 11, 12)}
    found = track_landmarks(frames(23))
    known = np.isfinite(found).all(axis=(1, 2))
    assert np.flatnonzero(known).tolist() == [7, 8, 9, 10, 11, 12]
    assert {1, 2, 3, 4}.isdisjoint(fake.asked)  # no face before, none after: nothing in between


def test_a_jump_is_no_movement(fake: FakeDetector) -> None:
    fake.plan = {level: [(0, 0, 80, 80) if level < 3 else (200, 100, 280, 180)] for level in range(6)}
    found = track_landmarks(frames(6))
    assert found[:, 0, 0].tolist() == [0, 0, 0, 200, 200, 200]


def test_large_pictures_are_looked_at_smaller(fake: FakeDetector) -> None:
    fake.plan = {0: [(400, 100, 600, 300)]}
    assert track_landmarks(frames(1, 1280))[0, 0].tolist() == [400, 100]


def test_small_faces_are_found_at_twice_the_size(fake: FakeDetector) -> None:
    fake.plan, fake.only_larger = {0: [(4, 5, 60, 60)]}, {0}
    assert track_landmarks(frames(1))[0, 0].tolist() == [4, 5] and fake.asked == [0, 0]


def test_no_frames(fake: FakeDetector) -> None:
    assert track_landmarks(frames(0)).shape == (0, 68, 2)


@pytest.fixture
def fresh_detector() -> Iterator[None]:
    faces._detector.cache_clear()
    yield
    faces._detector.cache_clear()


def test_a_missing_package_is_named(fresh_detector: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.import_module

    def without_dlib(name: str) -> Any:
        if name == "dlib":
            raise ModuleNotFoundError("No module named 'dlib'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without_dlib)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match=r"dlib-bin.*flashsink\[prepare\].*landmarks=FOLDER"):
        prepare("videos", tmp_path, tmp_path / "out", PrepareOptions(workers=1))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="face-recognition-models"):
        prepare("videos", tmp_path, tmp_path / "out", PrepareOptions(workers=1))


def test_dlib(draw_face: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("dlib")
    if importlib.util.find_spec("face_recognition_models") is None:  # importing it would need pkg_resources
        pytest.skip("face-recognition-models is not installed")
    time = np.arange(30) / 25
    drawn, points = draw_face(0.1 * np.sin(3 * time), 45, 130 + 20 * np.sin(2 * time), 95, (240, 260))
    found = track_landmarks(drawn)
    assert np.isfinite(found).all()
    # a drawing is not what the model was trained on: its eyes are found to a fifth of their distance
    eyes = [(lm[:, 36:48].mean(axis=1)) for lm in (found, points)]
    assert np.linalg.norm(eyes[0] - eyes[1], axis=1).max() < 18
    (tmp_path / "in").mkdir()
    tone = 0.3 * np.sin(np.arange(30 * 640) / 9)
    (tmp_path / "in/me.mp4").write_bytes(encode_video(drawn, sound=tone))
    (tmp_path / "in/empty.mp4").write_bytes(encode_video(np.full_like(drawn, 90), sound=tone))
    report = prepare("videos", tmp_path / "in", tmp_path / "out", PrepareOptions(workers=1))
    assert report.manifests == {"untranscribed": 1} and report.refused == {"no face": 1}
    crops = read_video(tmp_path / "out/clips/me_00.mp4").numpy().astype(float)
    weight = np.clip(crops - 160, 0, None)
    y = (np.mgrid[:96, :96][0] * weight).sum(axis=(1, 2)) / weight.sum(axis=(1, 2))
    assert np.abs(y - 47.5).max() < 25 and np.ptp(y) < 12  # the white mouth is in the crop, and stays there
    with pytest.raises(UserError):
        read_manifest(tmp_path / "out/untranscribed.jsonl")  # until somebody fills in the text
