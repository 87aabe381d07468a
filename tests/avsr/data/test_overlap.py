"""Clips and texts that training and tests share, and clips under two ids: counted, and named once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avsr.config import DataConfig
from avsr.data.manifest import Line, Utterance, write_manifest
from avsr.data.overlap import judges, overlaps
from avsr.data.utterances import Utterances


def table(rows: list[Utterance]) -> Utterances:
    lines = [
        Line(
            *(
                u.id,
                str(u.audio) if u.audio else None,
                u.text,
                u.duration,
                u.speaker,
                str(u.video) if u.video else None,
            ),
            *(u.sha256, None, u.offset),
        )
        for u in rows
    ]
    return Utterances.of(enumerate(lines, 1), "m")


def found(train: list[Utterance], others: dict[str, list[Utterance]]) -> list[str]:
    return overlaps(table(train), {name: table(rows) for name, rows in others.items()})


def row(id: str, text: str = "", **more: Any) -> Utterance:
    return Utterance(id, Path(f"/c/{id}.wav"), text or f"text of {id}", 1.0, **more)


def test_nothing_in_common() -> None:
    assert found([row("a"), row("b")], {"v": [row("c")], "data.test.t": [row("d"), row("e")]}) == []
    assert found([], {"v": []}) == []


def test_clips_and_texts_are_counted_by_file_and_by_sum() -> None:
    train = [row("a", "one  Two", sha256="AB"), row("b"), row("c", video=Path("/v/c.mp4"))]
    same_file = Utterance("x", Path("/c/b.wav"), "x", 1.0)
    same_sum = Utterance("y", Path("/c/y.wav"), "y", 1.0, sha256="ab")
    same_video = Utterance("z", None, "ONE two", 1.0, video=Path("/v/c.mp4"))
    assert found(train, {"data.test.t": [row("d"), same_file, same_sum, same_video], "v": [row("e", "one two")]}) == [
        "data.test.t: 3 of 4 clips are also in data.train, first at m:2",
        "data.test.t: 1 of 4 texts are also in data.train, first at m:4",
        "v: 1 of 1 texts are also in data.train, first at m:1",
    ]


def test_a_clip_under_two_ids() -> None:
    again = [Utterance(name, Path("/c/a.wav"), name, 1.0) for name in ("b\n", "c")]
    lines = found([row("a"), *again, row("d")], {"t": [row("x", sha256="1"), row("y", sha256="1")]})
    assert lines == [
        r"data.train: 2 of 4 clips are there under two ids, as a and b\n",
        "t: 1 of 2 clips are there under two ids, as x and y",
    ]


def test_parts_of_one_file_are_different_clips() -> None:
    parts = [Utterance(f"p{n}", Path("/c/a.wav"), f"part {n}", 1.0, sha256="ab", offset=n) for n in (0.0, 1.0, 2.0)]
    assert found(parts[:2], {"t": parts[2:]}) == []
    assert found(parts[:2], {"t": [Utterance("q", Path("/c/a.wav"), "q", 1.0, offset=1.0)]}) == [
        "t: 1 of 1 clips are also in data.train, first at m:1"
    ]


def test_the_manifests_that_judge(tmp_path: Path) -> None:
    rows = [{"id": name, "audio": f"{name}.wav", "text": "x", "duration": 1} for name in "ab"]
    write_manifest(tmp_path / "m.jsonl", [*rows, {"id": "c"}])
    data = DataConfig(test={"one": str(tmp_path / "m.jsonl"), "later": str(tmp_path / "none.jsonl")})
    assert {name: [u.id for u in rows] for name, rows in judges(data).items()} == {"data.test.one": ["a", "b"]}
