"""The mouth of one video for ``avsr transcribe``: what is taken as it is, cut out, kept and refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.data.mouth import faces, single
from avsr.data.mouth.single import mouth_video
from avsr.data.video import encode_video, read_video
from avsr.errors import UserError

Talking = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mouths"


@pytest.fixture
def searches() -> list[int]:
    """The number of frames of every video that was searched for faces."""
    return []


@pytest.fixture
def talking(
    tmp_path: Path, draw_face: Callable[..., Any], searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> Talking:
    """``talking(frames=40, lost=(3, 4))``: a video of a tilting face, which the detector does not find in some."""

    def make(frames: int = 40, lost: Sequence[int] = (), x: float = 90.0, name: str = "talk.mp4") -> Path:
        time = np.arange(frames) / 25
        drawn, points = draw_face(0.3 * np.sin(3 * time), 28, x + 10 * np.sin(time), 60, (180, 200))
        points[list(lost)] = np.nan

        def stand_in(shown: Iterator[np.ndarray]) -> np.ndarray:
            searches.append(sum(1 for _ in shown))
            return np.asarray(points, np.float32)

        monkeypatch.setattr(single, "track_landmarks", stand_in)
        monkeypatch.setattr(single, "require_detector", lambda: None)
        (tmp_path / name).write_bytes(encode_video(drawn))
        return tmp_path / name

    return make


@pytest.mark.parametrize("side", [88, 96, 128])
def test_a_mouth_crop_is_taken_as_it_is(tmp_path: Path, cache: Path, side: int) -> None:
    path = tmp_path / "mouth.mp4"
    path.write_bytes(encode_video(np.full((5, side, side), 90, np.uint8)))
    assert mouth_video(path) == path and not cache.exists()


def test_the_mouth_is_cut_out_upright_in_the_middle(talking: Talking, cache: Path, searches: list[int]) -> None:
    path = talking(40, lost=range(5, 20))  # half of the frames are enough
    found = mouth_video(path)
    assert found.parent == cache and searches == [40]
    mouths = read_video(found).numpy().astype(float)
    assert mouths.shape == (40, 96, 96)
    y, x = np.mgrid[:96, :96]
    for index in {*range(5), *range(25, 40)}:  # around the lost frames the tilt is a guess
        bright, dark = np.clip(mouths[index] - 160, 0, None), np.clip(30 - mouths[index], 0, None)
        dark[:30], dark[66:], dark[:, :48] = 0, 0, 0
        assert abs((y * bright).sum() / bright.sum() - 47.5) < 2 and abs((x * bright).sum() / bright.sum() - 46.5) < 2
        # the spot at the mouth's end is level with its middle
        assert abs((y * dark).sum() / dark.sum() - 47.5) < 3 and abs((x * dark).sum() / dark.sum() - 69.5) < 3


def test_it_is_kept_until_the_video_or_the_way_of_cropping_changes(
    talking: Talking, searches: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = talking(20)
    first = mouth_video(path)
    written = first.stat().st_mtime_ns
    assert mouth_video(path) == first and first.stat().st_mtime_ns == written and searches == [20]
    talking(24)
    second = mouth_video(path)
    assert second != first and len(read_video(second)) == 24
    monkeypatch.setattr(single, "FORMAT", "another")
    assert mouth_video(path) not in (first, second) and searches == [20, 24, 24]
    assert sorted(cache.iterdir()) == sorted(cache.glob("*.mp4"))


@pytest.mark.parametrize(
    ("lost", "x", "reason"),
    [
        (range(60), 90.0, "0 frames with a face, 12 are needed"),
        (range(49), 90.0, "11 frames with a face, 12 are needed"),
        (range(20, 55), 90.0, "a face in 42% of the frames"),  # 25 frames: more than 12, less than half
        ((), -15.0, "of the mouth crop lies outside the picture"),
    ],
)
def test_what_prepare_would_refuse_is_refused(
    talking: Talking, cache: Path, lost: Sequence[int], x: float, reason: str
) -> None:
    path = talking(60, lost, x)
    with pytest.raises(UserError) as caught:
        mouth_video(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)
    assert not cache.exists()


def test_without_the_detector_the_size_and_the_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.mp4"
    path.write_bytes(encode_video(np.full((5, 120, 160), 90, np.uint8)))
    real = importlib.import_module

    def without_dlib(name: str) -> Any:
        if name == "dlib":
            raise ModuleNotFoundError("No module named 'dlib'")
        return real(name)

    faces._detector.cache_clear()
    monkeypatch.setattr(importlib, "import_module", without_dlib)
    with pytest.raises(UserError, match=r"talk\.mp4 is 160x120, no mouth crop of 96x96.*dlib-bin"):
        mouth_video(path)
    faces._detector.cache_clear()


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "talk.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"talk\.mp4 is not a readable video"):
        mouth_video(tmp_path / "talk.mp4")


def test_a_cache_that_cannot_be_written(talking: Talking, cache: Path) -> None:
    cache.parent.write_text("")
    with pytest.raises(UserError, match=r"cannot write the mouth of .*talk\.mp4"):
        mouth_video(talking(20))


def test_a_damaged_mouth_is_cut_out_again(
    talking: Talking, searches: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    path = talking(20)
    found = mouth_video(path)
    whole = found.read_bytes()
    for count, content in enumerate((b"", whole[: len(whole) // 2], bytes(len(whole))), 2):
        found.write_bytes(content)
        caplog.clear()
        assert mouth_video(path) == found and found.read_bytes() == whole and len(searches) == count
        assert "the cached mouth is damaged and is cut out again" in caplog.text
