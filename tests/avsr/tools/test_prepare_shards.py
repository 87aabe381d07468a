"""``avsr prepare --shard`` and ``--merge``: many processes make the corpus that one would make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.data.video import encode_video
from avsr.errors import UserError
from avsr.runtime.folders import sha256
from avsr.runtime.locks import hold
from avsr.runtime.share import Share
from avsr.tools.corpora.prepare import clips, run
from avsr.tools.corpora.prepare import journal as journal_module
from avsr.tools.corpora.prepare.options import PrepareOptions
from avsr.tools.corpora.prepare.run import Prepared, prepare

pytestmark = pytest.mark.integration

COUNT = 3
NAMES = [f"video{number:02d}" for number in range(9)]
SHARES = [Share(index, COUNT) for index in range(1, COUNT + 1)]
Prepare = Callable[..., Prepared]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, draw_face: Callable[..., Any]) -> Path:
    """Nine videos, of which one has no landmarks, one is broken, one has no text and is cut into windows, and two that
    would make clips of the same name."""
    folder = tmp_path_factory.mktemp("sharded")
    frames, points = draw_face(np.zeros(25), 28, 75, 50)
    for name in ("in", "landmarks"):
        (folder / name).mkdir()
    for number, name in enumerate(NAMES):
        tone = 0.3 * np.sin(np.arange(25 * 640) / (9 + number))
        (folder / f"in/{name}.mp4").write_bytes(encode_video(frames, sound=tone))
        (folder / f"in/{name}.txt").write_text(f"text of {name}")
        np.save(folder / f"landmarks/{name}.npy", points)
    (folder / f"landmarks/{NAMES[2]}.npy").unlink()
    (folder / f"in/{NAMES[4]}.mp4").write_bytes(b"no video")
    (folder / f"in/{NAMES[5]}.txt").unlink()
    shutil.copy(folder / f"in/{NAMES[0]}.mp4", folder / f"in/{NAMES[0]}.mkv")
    assert {name for share in SHARES for name in NAMES if share.has(name)} == set(NAMES)
    assert all(sum(map(share.has, NAMES)) == 3 for share in SHARES)
    return folder


@pytest.fixture
def go(videos: Path, tmp_path: Path) -> Prepare:
    """``go(Share(1, 3))`` or ``go(merge=True)`` prepares in ``tmp_path/out``, in this process."""

    def start(share: Share | None = None, *, merge: bool = False, out: str = "out", **options: Any) -> Prepared:
        settings = {"landmarks": str(videos / "landmarks"), "workers": 1, "seg": 2.0, **options}
        return prepare("videos", videos / "in", tmp_path / out, PrepareOptions(**settings), share, merge=merge)

    return start


@pytest.fixture(scope="module")
def alone(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, dict[str, str]]:
    """What one process makes: its report, and the checksums of its files."""
    out = tmp_path_factory.mktemp("alone") / "out"
    options = PrepareOptions(landmarks=str(videos / "landmarks"), workers=1, seg=2.0)
    return prepare("videos", videos / "in", out, options), sums(out)


def sums(out: Path) -> dict[str, str]:
    """Of every file but the journals, whose lines have the order of the work."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "progress.jsonl")
    return {str(path.relative_to(out)): sha256(path) for path in files}


def journal(path: Path) -> dict[str, Any]:
    rows = map(json.loads, path.read_text().splitlines())
    return {row["source"]: row for row in rows if "source" in row}


def test_three_shards_make_what_one_process_makes(
    go: Prepare, alone: tuple[Prepared, dict[str, str]], tmp_path: Path
) -> None:
    """In any order, and once more after the merge. What is refused belongs to the shard, or to no shard ("twice")."""
    report, expected = alone
    assert report.manifests == {"all": 6, "untranscribed": 1} and sum(report.refused.values()) == 3
    parts = [go(share) for share in reversed(SHARES)]
    assert sum(part.made for part in parts) == report.made and all(part.manifests == {} for part in parts)
    assert not list((tmp_path / "out").glob("all*")) and not (tmp_path / "out/refused.jsonl").exists()
    merged = go(merge=True)
    assert merged == Prepared(report.manifests, report.refused, 0)
    assert sums(tmp_path / "out") == expected
    assert sorted(journal(tmp_path / "out/progress.jsonl")) == NAMES
    for again in (*SHARES, None):
        assert go(again).made == 0
    assert go(merge=True) == merged and sums(tmp_path / "out") == expected


def test_a_shard_that_was_stopped_goes_on(
    go: Prepare, alone: tuple[Prepared, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one of its videos, in the middle of a line; until then the merge names it and changes nothing."""
    calls: list[str] = []

    def stopped(job: clips.Job) -> clips.Outcome:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(job.source.id)
        return clips.make_clips(job)

    with monkeypatch.context() as patch:
        patch.setattr(run, "make_clips", stopped)
        with pytest.raises(KeyboardInterrupt):
            go(Share(2, COUNT))
    go(Share(1, COUNT))
    file = tmp_path / "out/shard-2-of-3.jsonl"
    with file.open("a") as part:
        part.write('{"source": "vid')
    before = sums(tmp_path / "out")
    with pytest.raises(UserError, match=r"2 of 3 shards are missing, unfinished .* --shard 2/3, 3/3$"):
        go(merge=True)
    assert sums(tmp_path / "out") == before
    go(Share(3, COUNT))
    with pytest.raises(UserError, match=r": 1 of 3 shards are missing, unfinished .* --shard 2/3$"):
        go(merge=True)
    done = journal(tmp_path / "out/shard-3-of-3.jsonl")
    assert set(done) == {name for name in NAMES if Share(3, COUNT).has(name)}
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/clips").iterdir()}
    go(Share(2, COUNT))
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    go(merge=True)
    assert sums(tmp_path / "out") == alone[1]


def test_what_a_run_of_the_whole_has_begun_shards_go_on_with_and_the_other_way_round(
    go: Prepare, alone: tuple[Prepared, dict[str, str]], tmp_path: Path
) -> None:
    report, expected = alone
    go(Share(1, 2))
    with pytest.raises(UserError, match=r"shard-1-of-2\.jsonl is of 2 shards, not of 3: .*--shard I/2"):
        go(Share(1, 3))
    assert go().manifests == report.manifests
    assert sums(tmp_path / "out") == expected
    lines = (tmp_path / "out/progress.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out/progress.jsonl").write_text("".join(lines[:5]))
    begun = set(journal(tmp_path / "out/progress.jsonl"))
    for share in SHARES:
        go(share)
        file = tmp_path / "out" / share.file
        own = {name for name in NAMES if share.has(name)} - begun
        assert set(journal(file) if file.exists() else ()) == own
    go(merge=True)
    assert sums(tmp_path / "out") == expected


def test_shards_of_other_options_are_refused(go: Prepare, tmp_path: Path) -> None:
    """The length of clips at once; what only refusals depend on, at the merge, which names the shards."""
    go(Share(1, COUNT))
    with pytest.raises(UserError, match=r"seg is 2\.0 there, not 3\.0"):
        go(Share(2, COUNT), seg=3.0)
    go(Share(2, COUNT))
    go(Share(3, COUNT), coverage=0.9)
    refusing = {index for index in (1, 2, 3) if journal_has_refusals(tmp_path / f"out/shard-{index}-of-3.jsonl")}
    assert 3 in refusing
    with pytest.raises(UserError, match=r"1 of 3 shards .*of other options.* --shard 3/3$"):
        go(merge=True)
    state = tmp_path / "out/prepare.json"
    held = json.loads(state.read_text())
    state.write_text(json.dumps(held | {"format": "a version from long ago"}))
    with pytest.raises(UserError, match="format is 'a version from long ago' there"):
        go(merge=True)
    state.write_text(json.dumps(held))
    file = tmp_path / "out/shard-3-of-3.jsonl"  # as if two hosts with different versions had begun at once
    file.write_text(file.read_text().replace(str(held["format"]), "from long ago", 1))
    with pytest.raises(UserError, match=r"shard-3-of-3\.jsonl was made with other options .*--shard 3/3"):
        go(merge=True)


def journal_has_refusals(path: Path) -> bool:
    return any(row["refused"] for row in journal(path).values())


def test_doubles_and_gaps_of_files_are_refused(go: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("there is no detector")

    monkeypatch.setattr(run, "require_detector", missing)
    with pytest.raises(UserError, match="no detector"):
        go(Share(1, COUNT), landmarks="detect")
    with pytest.raises(UserError, match="no shards that could be merged"):  # a merge needs none
        go(merge=True, landmarks="detect")
    assert not (tmp_path / "out").exists()
    for share in SHARES:
        go(share)
    out = tmp_path / "out"
    kept = (out / SHARES[1].file).read_bytes()
    shutil.copy(out / SHARES[0].file, out / SHARES[1].file)
    with pytest.raises(UserError, match=r"'video\d\d' is both in .*shard-1-of-3\.jsonl and in shard-2-of-3\.jsonl"):
        go(merge=True)
    (out / SHARES[1].file).write_bytes(kept)
    shutil.copy(out / SHARES[0].file, out / "shard-1-of-4.jsonl")
    with pytest.raises(UserError, match=r"has shard-1-of-3\.jsonl and shard-1-of-4\.jsonl"):
        go(merge=True)
    (out / "shard-1-of-4.jsonl").unlink()
    (out / SHARES[1].file).unlink()
    with pytest.raises(UserError, match=r"--shard 2/3$"):
        go(merge=True)
    (out / SHARES[1].file).write_bytes(kept)
    clip = next(iter(sorted((out / "clips").glob("*.mp4"))))
    clip.unlink()
    with pytest.raises(UserError, match=rf"--shard {next(s for s in SHARES if s.has(clip.stem))}$"):
        go(merge=True)


def test_a_video_that_crashes_its_process_does_not_stop_the_merge(go: Prepare, tmp_path: Path) -> None:
    """As it does not keep one process from its manifests; the next run of the whole tries it again."""
    for share in SHARES:
        go(share)
    file = tmp_path / "out" / next(share for share in SHARES if share.has(NAMES[4])).file
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row.get("source") == NAMES[4]:
            row["tried"], row["refused"][0]["kind"] = "", "crash"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert go(merge=True).refused == {"no landmarks": 1, "crash": 1, "twice": 1}
    assert go().refused == {"no landmarks": 1, "video": 1, "twice": 1}


def test_what_must_not_run_at_once_is_refused_in_one_line(go: Prepare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(Share(1, COUNT))
    for held, refused, named in (
        ("shard-1-of-3.jsonl", {"share": Share(1, COUNT)}, "out/shard-1-of-3.jsonl"),
        ("shard-1-of-3.jsonl", {"merge": True}, "out/shard-1-of-3.jsonl"),
        ("shard-2-of-3.jsonl", {}, "out/shard-2-of-3.jsonl"),
        ("shard-1-of-4.jsonl", {"share": Share(1, COUNT)}, "out/shard-1-of-4.jsonl"),
        ("", {"share": Share(2, COUNT)}, "out"),
    ):
        with hold(out, held), pytest.raises(UserError, match=rf"{tmp_path}/{named} is in use by process [^\n]*$"):
            go(**refused)
    with hold(out, "shard-1-of-3.jsonl"):
        go(Share(2, COUNT))  # as they should
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_shards_may_begin_at_the_same_moment(
    go: Prepare, alone: tuple[Prepared, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one begins, and finishes, just after this one has found no corpus."""
    real, others = journal_module.read_state, [SHARES[0]]

    def late(*arguments: Any) -> Any:
        found = real(*arguments)
        if others:
            go(others.pop())
        return found

    monkeypatch.setattr(journal_module, "read_state", late)
    go(SHARES[1])
    go(SHARES[2])
    go(merge=True)
    assert not others and sums(tmp_path / "out") == alone[1]
