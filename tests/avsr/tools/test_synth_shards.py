"""``avsr synth --shard`` and ``--merge``: many processes make the corpus that one would make."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from avsr.errors import UserError
from avsr.runtime.locks import hold
from avsr.runtime.share import Share
from avsr.tools.corpora.synth import corpus, shards
from avsr.tools.corpora.synth.corpus import SynthOptions, parse_options, synthesise

pytestmark = pytest.mark.integration

SMALL = ["grid=3", "open=2", "validation=1", "test=2", "voices=2", "unseen_voices=1", "video=0", "workers=1"]


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def quick(work: Any, jobs: Any, *_: Any, **__: Any) -> Iterator[tuple[Any, Any]]:
    """Takes the place of ``run_jobs``: files of the right names with the text instead of the sound."""
    for shard in jobs:
        rows = []
        for line in shard.lines:
            row = {"id": line.id, "audio": f"audio/{line.id}", "video": None, "times": f"times/{line.id}"}
            for kind in ("audio", "times"):
                path = Path(shard.folder, row[kind])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(line.text)
            rows.append((line.split, row | {"sha256": hashlib.sha256(line.text.encode()).hexdigest()}))
        yield shard, rows


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "require_espeak", lambda: None)
    monkeypatch.setattr(corpus, "run_jobs", quick)


@pytest.mark.timeout(120)
@pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra demo")
def test_two_shards_speak_what_one_process_speaks(tmp_path: Path) -> None:
    options = parse_options([*SMALL, "open=0", "voices=1"])
    expected = synthesise(tmp_path / "alone", options)
    for share in (Share(2, 2), Share(1, 2)):
        assert synthesise(tmp_path / "out", options, share) == {}
        assert not list((tmp_path / "out").rglob("train.jsonl"))
    assert synthesise(tmp_path / "out", options, merge=True) == expected
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")


@pytest.mark.usefixtures("quickly")
def test_shards_are_resumed_merged_once_and_then_there_is_nothing_to_do(tmp_path: Path) -> None:
    """The oracle is a run of the whole. Whatever has begun the corpus, the others go on with it."""
    options, out = parse_options(SMALL), tmp_path / "out"
    expected = synthesise(tmp_path / "alone", options)
    everything = [Share(index, 3) for index in (1, 2, 3)]
    synthesise(out, options, everything[0])
    with pytest.raises(UserError, match=r"2 of 3 shards are missing, unfinished .* --shard 2/3, 3/3$"):
        synthesise(out, options, merge=True)
    for share in everything[1:]:
        synthesise(out, options, share)
    file = out / everything[1].file
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:30])
    with pytest.raises(UserError, match=r": 1 of 3 shards .* --shard 2/3$"):
        synthesise(out, options, merge=True)
    synthesise(out, options, everything[1])
    heard = next(iter(sorted(out.rglob("audio/*"))))
    text = heard.read_bytes()
    heard.write_bytes(b"changed since")
    with pytest.raises(UserError, match=r": 1 of 3 shards "):
        synthesise(out, options, merge=True)
    heard.write_bytes(text)
    assert synthesise(out, options, merge=True) == expected and tree(out) == tree(tmp_path / "alone")
    for again in ({"share": everything[2]}, {"merge": True}, {}):
        assert synthesise(out, options, **again) == expected and tree(out) == tree(tmp_path / "alone")


@pytest.mark.usefixtures("quickly")
def test_the_whole_takes_over_what_a_shard_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, out = parse_options(SMALL), tmp_path / "out"
    expected = synthesise(tmp_path / "alone", options)
    synthesise(out, options, Share(1, 2))
    begun: list[Any] = []

    def counted(work: Any, jobs: Any, *rest: Any, **named: Any) -> Any:
        begun.extend(jobs)
        return quick(work, jobs, *rest, **named)

    monkeypatch.setattr(corpus, "run_jobs", counted)
    assert synthesise(out, options) == expected and tree(out) == tree(tmp_path / "alone")
    assert len(begun) == len(shards.plan_shards(out, options)) // 2


@pytest.mark.usefixtures("quickly")
def test_what_does_not_fit_together_is_refused_and_stays(tmp_path: Path) -> None:
    """A run of the whole begins again with other options; shards do not, since others may be writing."""
    options, other, out = parse_options(SMALL), parse_options([*SMALL, "seed=5"]), tmp_path / "out"
    with pytest.raises(UserError, match="no shards that could be merged"):
        synthesise(out, options, merge=True)
    assert not out.exists()
    synthesise(out, options, Share(1, 2))
    before = tree(out)
    for given in ({"share": Share(2, 2)}, {"merge": True}):
        with pytest.raises(UserError, match="unfinished corpus of other options: choose another folder or delete"):
            synthesise(out, other, **given)
    with pytest.raises(UserError, match=r"shard-1-of-2\.jsonl is of 2 shards, not of 4"):
        synthesise(out, options, Share(2, 4))
    assert tree(out) == before
    for held, given, named in (
        ("shard-1-of-2.jsonl", {"share": Share(1, 2)}, "out/shard-1-of-2.jsonl"),
        ("shard-2-of-2.jsonl", {"merge": True}, "out/shard-2-of-2.jsonl"),
        ("shard-2-of-2.jsonl", {}, "out/shard-2-of-2.jsonl"),
        ("", {"share": Share(2, 2)}, "out"),
    ):
        with hold(out, held), pytest.raises(UserError, match=rf"{tmp_path}/{named} is in use by process [^\n]*$"):
            synthesise(out, options, **given)
    assert tree(out) == before
    for share in (Share(1, 2), Share(2, 2)):
        synthesise(out, options, share)
    file = out / "shard-2-of-2.jsonl"  # as if two hosts with different options had begun at once
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 5', 1))
    with pytest.raises(UserError, match=r"shard-2-of-2\.jsonl was made with other options"):
        synthesise(out, options, merge=True)
    assert synthesise(out, other) and not list(out.glob("shard-*"))
    assert json.loads((out / "corpus.json").read_text())["options"]["seed"] == 5


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("place", ["read_state", "suppress"])
def test_shards_may_begin_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Another one begins, and finishes, just after this one has found no corpus, or no mark of one."""
    options, out, others = parse_options(SMALL), tmp_path / "out", [Share(1, 2)]
    expected = synthesise(tmp_path / "alone", options)
    real = getattr(corpus, place)

    def meanwhile(found: Any) -> Any:
        if others:
            synthesise(out, options, others.pop())
        return found

    @contextmanager
    def suppressed(*kinds: Any) -> Iterator[None]:
        with real(*kinds):
            yield
        meanwhile(None)

    monkeypatch.setattr(corpus, place, suppressed if place == "suppress" else lambda *given: meanwhile(real(*given)))
    synthesise(out, options, Share(2, 2))
    assert not others
    assert synthesise(out, options, merge=True) == expected and tree(out) == tree(tmp_path / "alone")


def test_every_shard_has_about_as_much_to_say(tmp_path: Path) -> None:
    """Each process speaks one voice in one set, of training voices much and of unseen ones little."""
    plan = shards.plan_shards(tmp_path, SynthOptions(grid=4000, open=4000))
    for count in (1, 2, 3, 5, 8, 16):
        parts = [Share(index, count).of(corpus._longest_first(plan)) for index in range(1, count + 1)]
        assert Counter(shard for part in parts for shard in part) == Counter(plan)
        sizes = [sum(len(shard.lines) for shard in part) for part in parts]
        assert max(sizes) - min(sizes) <= max(len(shard.lines) for shard in plan)
