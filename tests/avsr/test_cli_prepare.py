"""``avsr prepare`` on the command line: what it prints, its exit status, and what it says of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.cli import main
from avsr.data.manifest import read_manifest
from avsr.data.video import encode_video

Refuse = Callable[..., str]


@pytest.fixture
def videos(tmp_path: Path, draw_face: Callable[..., Any]) -> Path:
    """A folder with two transcribed videos of one second; the landmarks are next to it."""
    frames, points = draw_face(np.zeros(25), 28, 75, 50)
    tone = 0.3 * np.sin(np.arange(25 * 640) / 9)
    for folder in ("in", "landmarks"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.mp4").write_bytes(encode_video(frames, sound=tone))
        (tmp_path / f"in/{name}.txt").write_text(f"text of {name}")
        np.save(tmp_path / f"landmarks/{name}.npy", points)
    return tmp_path / "in"


def start(videos: Path, *options: str, out: str = "out") -> list[str]:
    beside = videos.parent
    return ["prepare", "videos", str(videos), str(beside / out), f"landmarks={beside / 'landmarks'}", "workers=1",
            *options]  # fmt: skip


def test_success_prints_the_counts(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(start(videos))
    assert capsys.readouterr().out == "      2  all.jsonl\n"
    rows = read_manifest(videos.parent / "out/all.jsonl")
    assert [row.text for row in rows] == ["text of a", "text of b"]


def test_refusals_are_counted_and_their_file_is_named(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (videos / "b.mp4").write_bytes(b"no video")
    (videos / "c.mp4").write_bytes(b"")
    main(start(videos))  # status 0: there is a corpus
    found = videos.parent / "out/refused.jsonl"
    counts = "      1  all.jsonl\n      2  refused: video\n"
    assert capsys.readouterr().out == f"{counts}the reasons are in {found}\n"
    assert [json.loads(line)["id"] for line in found.read_text().splitlines()] == ["b", "c"]


def test_nothing_usable_is_a_failure(videos: Path, refuse: Refuse) -> None:
    for name in ("a", "b"):
        (videos / f"{name}.mp4").write_bytes(b"no video")
    message = refuse(*start(videos))
    assert "no clip could be made" in message and str(videos.parent / "out/refused.jsonl") in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({1: "lrs4"}, ["unknown corpus 'lrs4'", "lrs2, lrs3, vox2, muavic, videos"]),
        ({2: "nowhere"}, ["there is no folder", "nowhere"]),
        ({4: "landmark=x"}, ["unknown option 'landmark'", "did you mean 'landmarks'"]),
        ({4: "landmarks=nowhere"}, ["option landmarks", "nowhere"]),
        ({5: "workers=many"}, ["option workers", "'many'"]),
        ({5: "validation=3"}, ["option validation", "lrs3"]),
    ],
)
def test_bad_input_is_one_line(videos: Path, refuse: Refuse, change: dict[int, str], parts: list[str]) -> None:
    arguments = start(videos)
    for index, value in change.items():
        arguments[index] = value
    message = refuse(*arguments)
    assert message.startswith("avsr: ") and "\n" not in message
    for part in parts:
        assert part in message
    assert not (videos.parent / "out").exists()


def test_a_folder_is_missing_on_the_command_line(refuse: Refuse) -> None:
    assert "required: root, out" in refuse("prepare", "videos")
