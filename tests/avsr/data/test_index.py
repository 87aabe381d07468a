"""The index of a manifest against reading it line by line: the same rows and messages, whatever is cut where."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from avsr.data import index
from avsr.data.index import SUFFIX, make_index, open_manifest
from avsr.data.manifest import read_manifest
from avsr.errors import UserError


def good(name: str, **more: object) -> str:
    return json.dumps({"id": name, "audio": f"a/{name}.wav", "text": f"text {name}", "duration": 1.5, **more})


ODD = [
    good("a", speaker="s", offset=2, sha256="ab" * 32),
    "",
    "not JSON",
    good('ü \\ " \t', text="Grüße\u2028und 中"),
    good("v", audio=None, video="v/v.mp4", times="t/v.json", speaker=7),
    good("a"),
    good("long", text="x" * 3000),
    good("out", audio="../../x.wav"),
    good("absolute", audio="/elsewhere/x.wav"),
    good("inside", audio="ROOT/b/x.wav"),
    good("v", video="w.mp4"),
    json.dumps({"id": "short"}),
    good("spelt", speeker="x"),
    "  ",
]


def by_lines(path: Path, absolute: bool) -> tuple[list[object], list[str]]:
    bad: list[str] = []
    return list(read_manifest(path, on_bad=bad.append, absolute=absolute)), bad


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "m.jsonl"
    path.parent.mkdir()
    text = "\ufeff" + "\r\n".join(ODD).replace("ROOT", str(path.parent)) + random.Random(1).choice(["", "\n"])
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("size", [40, 97, 700, 2**24])
def test_the_same_rows_and_messages_as_line_by_line(
    odd: Path, size: int, absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "RANGE", size)
    make_index(odd, workers=1)
    found = open_manifest(odd, absolute=absolute)
    rows, bad = by_lines(odd, absolute)
    assert found.index is not None and list(found.utterances) == rows
    assert sorted(found.bad) == sorted(bad)
    assert found.utterances[-1] == rows[-1] and list(found.utterances[1:3]) == rows[1:3]


def test_a_label_file(tmp_path: Path) -> None:
    path = tmp_path / "labels" / "x.csv"
    path.parent.mkdir()
    path.write_text("lrs3,s/a.mp4,50,1 2,hello\nlrs3,s/b.mp4,x,1,no\nlrs3,s/c.mp4,25,,you, there\n")
    make_index(path)
    found = open_manifest(path)
    assert (list(found.utterances), found.bad) == by_lines(path, False)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(good(f"u{n}") + "\n" for n in range(20)))
    return path


def test_an_index_is_used_until_the_manifest_changes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[object] = []
    monkeypatch.setattr(index, "_parse", lambda *args, real=index._parse: (parsed.append(args), real(*args)))
    make_index(small)
    os.utime(small, (1, 1))  # a copy has another time
    read: list[Path] = []
    monkeypatch.setattr(index, "sha256", lambda path, real=index.sha256: (read.append(path), real(path))[1])
    make_index(small)
    assert open_manifest(small).index is not None and len(read) == 1
    assert len(parsed) == 1 and len(open_manifest(small).utterances) == 20
    small.write_text(small.read_text() + good("new") + "\n")
    assert len(open_manifest(small).utterances) == 21  # small, so it needs none
    assert open_manifest(small).index is None
    make_index(small)
    assert len(parsed) == 2 and open_manifest(small).index is not None
    assert open_manifest(small).utterances[:].twice == (0, "", "")  # it is not counted again
    names = sorted(path.name.split("-")[0] for path in (small.parent / f"m.jsonl{SUFFIX}").iterdir())
    assert names == ["index.json", "rows"]  # nothing of the older content is left


def test_a_large_manifest_gets_an_index_by_itself(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LARGE", 100)
    assert open_manifest(small).index is not None
    with pytest.raises(UserError, match="cannot read the manifest"):
        open_manifest(small.parent / "none.jsonl")


@pytest.mark.parametrize("name", ["rows", "index"])
@pytest.mark.parametrize("change", ["cut", "flip", "gone"])
def test_a_damaged_index_is_made_again(small: Path, name: str, change: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = list(open_manifest(small).utterances)
    make_index(small)
    (path,) = (small.parent / f"m.jsonl{SUFFIX}").glob(f"{name}*")
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if change == "cut" else data[:-40] + b"\xff" * 40)
    assert list(open_manifest(small).utterances) == whole
    with caplog.at_level(logging.WARNING):
        make_index(small)
    assert ("damaged" in caplog.text) == (change != "gone")
    found = open_manifest(small)
    assert found.index is not None and list(found.utterances) == whole


def test_what_was_parsed_before_a_kill_is_not_parsed_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "RANGE", 300)
    jobs: list[object] = []

    def dies(job: index._Job, real: Callable[..., None] = index._parse_range) -> None:
        jobs.append(job)
        if len(jobs) == 3:
            raise KeyboardInterrupt
        real(job)

    monkeypatch.setattr(index, "_parse_range", dies)
    with pytest.raises(KeyboardInterrupt):
        make_index(small, workers=1)
    make_index(small, workers=1)
    total = -(-small.stat().st_size // 300)
    assert len(jobs) == total + 1  # the one that was stopped, twice
    assert list(open_manifest(small).utterances) == read_manifest(small)


def test_two_builders_at_once(small: Path) -> None:
    code = "import sys; from avsr.data.index import make_index; print(len(make_index(sys.argv[1]).table))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(small)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "20\n"), error


def test_a_folder_that_cannot_be_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    (small.parent / f"m.jsonl{SUFFIX}").write_text("a file")  # stands for a read-only folder: tests may run as root
    made = make_index(small)
    assert made.folder.is_relative_to(tmp_path / "cache") and open_manifest(small).index is not None


def test_bad_manifests(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for content, message in ((b"", "no usable line"), (b"{}\n", "no usable line"), (b"\xff\xfe\n", "cannot read")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            make_index(path)
            open_manifest(path)


def test_a_path_that_is_the_folder_itself(small: Path) -> None:
    small.write_text(good("a") + "\n" + good("folder", audio=".") + "\n")
    make_index(small)
    found = open_manifest(small)
    assert (list(found.utterances), found.bad) == by_lines(small, False)


@pytest.mark.parametrize("name", ["none.jsonl", "none/none.jsonl", "", "."])
def test_what_is_no_file_leaves_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (make_index, open_manifest):
        with pytest.raises(UserError, match="cannot read the manifest"):
            call(Path(name))
    assert not list(tmp_path.iterdir())


FULL = """
import resource, sys
from avsr.data import index
from avsr.errors import UserError
if __name__ == "__main__":
    index.RANGE = 300
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as a full disk does, in the processes too
    try:
        index.make_index(sys.argv[1], workers=2)
    except UserError as error:
        print(error)
"""


def test_a_full_disk_in_other_processes_is_one_line(small: Path, tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(FULL)
    command = [sys.executable, str(tmp_path / "full.py"), str(small)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.stdout.startswith("cannot write to the index") and found.stdout.count("\n") == 1, found.stderr


def test_a_negative_number_of_processes_is_refused(small: Path, refuse: Callable[..., str]) -> None:
    assert "--workers: expected a number from 0 on, got -1" in refuse("index", small, "--workers=-1")
