"""Manifests: good rows, and every kind of bad line with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avsr.data.manifest import read_manifest, write_manifest
from avsr.errors import UserError

SUM = "0123456789abcdefABCDEF" + "0" * 42
GOOD: dict[str, Any] = {"id": "a", "audio": "wav/a.wav", "text": "hello", "duration": 1.5}


def row(**changes: Any) -> str:
    return json.dumps({k: v for k, v in {**GOOD, **changes}.items() if v is not Ellipsis})


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(*lines: str, name: str = "m.jsonl") -> Path:
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return make


def test_good_rows(write: Callable[..., Path]) -> None:
    path = write(
        row(),
        "",
        row(id="b", audio="./x/../b.flac", duration=2, speaker="s1", video="v/b.mp4", sha256=SUM, other=[1]),
        row(id="c", text="Grüße, “world”", speaker=None, video=None, offset=0),
    )
    first, second, third = read_manifest(path)
    root = path.resolve().parent
    assert (first.id, first.audio, first.text, first.duration) == ("a", root / "wav/a.wav", "hello", 1.5)
    assert (first.speaker, first.video, first.sha256, first.where) == ("", None, "", f"{path}:1")
    assert (second.audio, second.video) == (root / "b.flac", root / "v/b.mp4")
    assert (second.speaker, second.sha256, second.where) == ("s1", SUM, f"{path}:3")
    assert isinstance(second.duration, float)
    assert first.offset is None is first.cut and third.cut == (0.0, 1.5) and isinstance(third.offset, float)
    assert (third.text, third.speaker, third.video) == ("Grüße, “world”", "", None)


def test_a_relative_manifest_gives_absolute_paths(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(row())
    monkeypatch.chdir(path.parent)
    (found,) = read_manifest("m.jsonl")
    assert found.audio == path.resolve().parent / "wav/a.wav" and found.where == "m.jsonl:1"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{not json", ["JSON"]),
        ("id,audio,text", ["JSON"]),
        ('["a"]', ["JSON object", "list"]),
        ('"a"', ["JSON object", "str"]),
        ("null", ["JSON object", "NoneType"]),
        (row(id=...), ["'id'", "missing", "audio, text, duration"]),
        (row(audio=...), ["'audio'", "missing"]),
        (row(text=...), ["'text'", "missing"]),
        (row(duration=...), ["'duration'", "missing"]),
        ("{}", ["missing", "none"]),
        (row(text=""), ["'text'", "empty"]),
        (row(text=" \t "), ["'text'", "empty"]),
        (row(text=3), ["'text'", "3"]),
        (row(text=None), ["'text'", "None"]),
        (row(id=7), ["'id'", "7"]),
        (row(id=""), ["'id'", "empty"]),
        (row(audio=None), ["neither 'audio' nor 'video'"]),
        (row(duration=0), ["'duration'", "0"]),
        (row(duration=-1.0), ["'duration'", "-1.0"]),
        (row(duration="2"), ["'duration'", "'2'"]),
        (row(duration=True), ["'duration'", "True"]),
        (row(duration=None), ["'duration'", "None"]),
        (row(duration=float("nan")), ["'duration'", "nan"]),
        (row(duration=float("inf")), ["'duration'", "inf"]),
        *((row(offset=x), ["'offset'", repr(x)]) for x in (-0.1, float("nan"), float("inf"), 1e6, "1", True, [1])),
        *((row(sha256=x), ["'sha256'", "64 hexadecimal digits"]) for x in ("ff", SUM[:-1] + "g", SUM + "0", 5)),
        (row(video=3), ["'video'", "3"]),
        (row(audio="../a.wav"), ["../a.wav", "outside"]),
        (row(audio="wav/../../a.wav"), ["outside"]),
        (row(audio="/etc/passwd"), ["/etc/passwd", "outside"]),
        (row(audio="../home2/a.wav"), ["outside"]),  # a folder whose name only begins like the root's
        (row(audio="wav/../../home/../x.wav"), ["outside"]),
        (row(video="../v.mp4"), ["../v.mp4", "outside"]),
        (row(times="../t.json"), ["../t.json", "outside"]),
        (row(times=" "), ["'times'", "not empty"]),
    ],
)
def test_a_bad_line_is_refused_with_its_place(write: Callable[..., Path], line: str, parts: list[str]) -> None:
    path = write(row(id="first"), "", line)
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_a_misspelt_field_is_named_once(write: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = write(row(voice="en", wavs=1), row(id="b", speeker="s1"), row(id="c", speeker="s2", sha265=SUM))
    assert [found.speaker for found in read_manifest(path)] == ["", "", ""]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{path}:2: the field 'speeker' is not read; did you mean 'speaker'?",
        f"{path}:3: the field 'sha265' is not read; did you mean 'sha256'?",
    ]


def test_a_path_that_leaves_and_comes_back_is_fine(write: Callable[..., Path]) -> None:
    (found,) = read_manifest(write(row(audio="../home/wav/a.wav")))
    assert found.audio.parts[-3:] == ("home", "wav", "a.wav")


def test_absolute_paths_where_they_are_permitted(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(row(audio="/data/./a.wav"))
    message = refusal(path)
    assert "leads outside" in message and "data.allow_absolute=true" in message
    assert read_manifest(path, absolute=True)[0].audio == Path("/data/a.wav")
    relative = write(row(audio="../a.wav"))
    assert "allow_absolute" not in refusal(relative)
    with pytest.raises(UserError, match="leads outside"):
        read_manifest(relative, absolute=True)


def test_a_duplicate_id_names_both_places(write: Callable[..., Path]) -> None:
    path = write(row(), row(id="b"), row(audio="c.wav"))
    message = refusal(path)
    assert message.startswith(f"{path}:3: ") and "'a'" in message and f"{path}:1" in message


def test_on_bad_collects_and_goes_on(write: Callable[..., Path]) -> None:
    path = write(row(), "{", row(id="b", text=""), row(), row(id="c", audio="../x.wav"), row(id="d"))
    messages: list[str] = []
    found = read_manifest(path, on_bad=messages.append)
    assert [u.id for u in found] == ["a", "d"]
    assert [message.split(": ")[0] for message in messages] == [f"{path}:{n}" for n in (2, 3, 4, 5)]


def test_an_id_of_a_bad_line_may_come_again(write: Callable[..., Path]) -> None:
    messages: list[str] = []
    found = read_manifest(write(row(text=""), row()), on_bad=messages.append)
    assert [u.id for u in found] == ["a"] and len(messages) == 1


def test_a_missing_manifest(tmp_path: Path) -> None:
    assert str(tmp_path / "no.jsonl") in refusal(tmp_path / "no.jsonl")
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_manifest(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    message = refusal(path)
    assert str(path) in message and "no usable line" in message


def test_only_bad_lines(write: Callable[..., Path]) -> None:
    messages: list[str] = []
    with pytest.raises(UserError, match="no usable line"):
        read_manifest(write("{", "["), on_bad=messages.append)
    assert len(messages) == 2


def test_a_manifest_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(row().encode() + b"\n" + row(id="b").replace("hello", "h\xe9llo").encode("latin-1") + b"\xff\n")
    message = refusal(path)
    assert str(path) in message and "utf-8" in message


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "text": "ä “quoted” \\ and 日本"},
        {**GOOD, "id": "b\u2028c", "text": "one\u2028two\u0085three\x1cfour\nfive"},
        {**GOOD, "id": "last"},
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    found = read_manifest(tmp_path / "m.jsonl")
    assert [(u.id, u.text) for u in found] == [(r["id"], r["text"]) for r in rows]
    assert found[2].where.endswith(":3")
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]  # nothing half-written stays


# The Llama-AVSR label CSV


@pytest.fixture
def labels(tmp_path: Path) -> Callable[..., Path]:
    def make(*lines: str) -> Path:
        path = tmp_path / "ROOT" / "labels" / "x.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return make


def test_label_rows(labels: Callable[..., Path], tmp_path: Path) -> None:
    path = labels(
        "lrs3,lrs3_video_seg16s/test/0Fi83/00001.mp4,75,12 44 5,so here is the plan",
        "lrs2,main/6330/00002.mp4,130,7,i don't know",
    )
    first, second = read_manifest(path)
    root = tmp_path.resolve() / "ROOT"
    assert first.video == root / "lrs3/lrs3_video_seg16s/test/0Fi83/00001.mp4"
    assert first.audio == root / "lrs3/lrs3_video_seg16s/test/0Fi83/00001.wav"
    assert (first.text, first.duration, first.where) == ("so here is the plan", 3.0, f"{path}:1")
    assert second.duration == 5.2 and second.speaker == "6330" and second.text == "i don't know"
    assert first.id != second.id


def test_a_text_may_have_commas_and_quotes(labels: Callable[..., Path]) -> None:
    path = labels(
        "lrs3,a/1.mp4,75,12 44 5,well, yes, really",
        'lrs3,a/2.mp4,75,7,"well, ""yes"" he said"',
        "lrs3,a/3.mp4,75,,no ids, but text",
        'lrs3,a/4.mp4,75,7,"',
    )
    texts = [found.text for found in read_manifest(path)]
    assert texts == ["well, yes, really", 'well, "yes" he said', "no ids, but text", '"']


def test_a_line_without_text_takes_it_from_the_text_tree(labels: Callable[..., Path], tmp_path: Path) -> None:
    path = labels("lrs3,lrs3_video_seg16s/test/0Fi83/00001.mp4,75,12 44 5", "lrs3,x/2.mp4,25,1,other")
    script = tmp_path / "ROOT/lrs3/lrs3_text_seg16s/test/0Fi83/00001.txt"
    script.parent.mkdir(parents=True)
    script.write_text("SO HERE  IS\nTHE PLAN\n")
    first, second = read_manifest(path)
    assert (first.text, first.speaker, second.text) == ("so here is the plan", "0Fi83", "other")
    script.write_bytes(b"\xff\xfe")
    assert str(script) in refusal(path)
    script.write_text(" \n")
    assert "empty" in refusal(path)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("lrs3,a/b.mp4,75", ["5 fields", "got 3"]),
        ("lrs3,a/b.mp4,75,1 2", ["no text", "lrs3_video_seg16s"]),
        ("lrs3,lrs3_video_seg16s/b.mp4,75,1 2", ["no text", "lrs3_text_seg16s/b.txt"]),
        ("lrs3,lrs3_video_seg16s/../../../x/b.mp4,75,1 2", ["outside"]),
        ("lrs3,a/b.mp4,75,so, this is it", ["token ids", "'so'"]),
        ("lrs3,a/b.mp4,0,1 2,yes", ["frames", "'0'"]),
        ("lrs3,a/b.mp4,-5,1 2,yes", ["frames", "'-5'"]),
        ("lrs3,a/b.mp4,7.5,1 2,yes", ["frames", "'7.5'"]),
        ("lrs3,a/b.mp4,many,1 2,yes", ["frames", "'many'"]),
        ("lrs3,a/b.mp4,²,1 2,yes", ["frames", "'²'"]),
        ("lrs3,a/b.mp4,75,1 2,", ["transcript", "empty"]),
        ("lrs3,a/b.mp4,75,1 2,   ", ["transcript", "empty"]),
        ("lrs3,../../b.mp4,75,1 2,yes", ["outside"]),
        ("/etc,b.mp4,75,1 2,yes", ["outside"]),
        ("lrs3,ok.mp4,75,1 2,yes", ["already used", ":1"]),
    ],
)
def test_bad_label_rows(labels: Callable[..., Path], line: str, parts: list[str]) -> None:
    path = labels("lrs3,ok.mp4,25,1,fine", line)
    message = refusal(path)
    assert message.startswith(f"{path}:2: ")
    for part in parts:
        assert part in message
