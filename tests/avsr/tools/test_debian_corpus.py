"""``avsr prepare debian-speech`` as a command: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from avsr.cli import main
from avsr.data.manifest import read_manifest
from avsr.errors import UserError
from avsr.tools.corpora.debian import corpus, packages
from avsr.tools.corpora.debian.corpus import prepare_debian
from avsr.tools.corpora.debian.split import SPLITS, UNSEEN

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_debs.py"))))
Refuse = Callable[..., str]

# by id: manifest, text, speaker and pitch in Hz; where the hash of the text puts them
CLIPS = {
    "asterisk_activated": ("test_prompts", "activated", "asterisk_allison", 710),
    "asterisk_digits_1": ("test_prompts", "one", "asterisk_allison", 720),
    "drascula_d_000": ("train", "i am the count", "drascula_d", 640),
    "drascula_hero_001": ("train", "that's the second biggest door", "drascula_hero", 610),
    "drascula_hero_003": ("train", "hello bud", "drascula_hero", 630),
    "queen_020001p1": ("train", "well", "queen_bud", 510),
    "queen_020001p2": ("train", "it's a cafe", "queen_bud", 520),
    "queen_020010j1": ("train", "hello bud", "queen_joe", 530),
    "queen_030001j1": ("train", "hello bud", "queen_joe", 560),
    "queen_030001p1": ("test_roles", "nobody else says so", "queen_sec", 550),
    "queen_joe00421": ("test_texts", "it's a door", "queen_joe", 570),
}
COUNTS = {"train": 7, "validation": 0, "test_texts": 1, "test_roles": 1, "test_prompts": 2}


def pin(patch: pytest.MonkeyPatch, sums: dict[str, str]) -> None:
    for name, digest in sums.items():
        patch.setitem(packages.SHA256, name, digest)


@pytest.fixture
def debs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pin(monkeypatch, tiny.write_debs(tmp_path / "debs"))
    return tmp_path / "debs"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = corpus.decode
    monkeypatch.setattr(corpus, "decode", lambda spoken: seen.append(spoken.id) or real(spoken))
    return seen


def test_the_corpus_is_what_it_says(debs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prepare", "debian-speech", str(out), f"debs={debs}"])
    counts = "".join(f"{count:7d}  {name}.jsonl\n" for name, count in COUNTS.items())
    refused = "      2  refused: text\n      2  refused: no words\n      1  refused: misread\n"
    assert capsys.readouterr().out == f"{counts}{refused}the reasons are in {out / 'refused.jsonl'}\n"
    found = {}
    for name in (name for name, count in COUNTS.items() if count):
        for row in read_manifest(out / f"{name}.jsonl"):
            assert row.audio is not None
            wave, rate = soundfile.read(row.audio, dtype="float32")
            assert rate == 16_000 and wave.ndim == 1 and len(wave) / rate == pytest.approx(row.duration, abs=1e-4)
            assert hashlib.sha256(row.audio.read_bytes()).hexdigest() == row.sha256
            pitch = round(np.abs(np.fft.rfft(wave, 2**18)).argmax() * 16_000 / 2**18)
            found[row.id] = name, row.text, row.speaker, pitch
    assert found == CLIPS
    refusals = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    kinds = {row["id"]: row["kind"] for row in refusals}
    assert kinds == {
        "drascula_hero_002": "misread",
        "queen_020011j1": "text",
        "asterisk_vm-h323": "text",
        "asterisk_beep": "no words",
        "asterisk_silence_1": "no words",
    }
    for package in (tiny.SOUNDS, tiny.TEXTS, tiny.QUEEN, tiny.DRASCULA):
        assert (out / f"licences/{package}.txt").read_text() == f"the licence of {package}"
    assert len(content(out)) == len(CLIPS) + len(SPLITS) + 2 + 4


def test_apts_packages_are_kept_and_give_the_same(debs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "apt-get").write_text(f"#!/bin/sh\n/bin/cp {debs}/*.deb .")
    (tmp_path / "apt-get").chmod(0o755)
    given, fetched = (prepare_debian(tmp_path / "a", str(debs)), prepare_debian(tmp_path / "b"))
    assert given == fetched == (COUNTS, {"text": 2, "no words": 2, "misread": 1})
    both = content(tmp_path / "b")
    kept = {name.removeprefix("packages/"): both.pop(name) for name in list(both) if name.startswith("packages/")}
    assert both == content(tmp_path / "a") and kept == content(debs)


# Again


def test_a_second_run_only_looks(
    debs: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare_debian(out, str(debs))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for path in debs.iterdir():
        path.unlink()
    monkeypatch.setattr(corpus, "read_package", lambda *_: pytest.fail("read"))
    with caplog.at_level(logging.INFO):
        assert prepare_debian(out, str(debs)) == first == prepare_debian(out)
    assert f"{out} already holds this corpus (11 utterances), nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


HURT: list[tuple[str, Callable[[Path], Any]]] = [
    ("clips/queen_020001p1.wav", Path.unlink),
    ("clips/queen_020001p1.wav", _cut),
    ("clips/asterisk_digits_1.wav", _flip),
    ("train.jsonl", Path.unlink),
    ("train.jsonl", _cut),
    ("test_roles.jsonl", lambda path: path.write_text('{"id": "a", "audio": 3, "sha256": []}\n')),
    ("test_roles.jsonl", lambda path: path.write_text('{"id": "a", "audio": "\\u0000", "sha256": "x"}\n')),
    ("test_texts.jsonl", lambda path: path.write_bytes(b"")),
    ("refused.jsonl", Path.unlink),
    ("licences/drascula.txt", Path.unlink),
]


@pytest.mark.parametrize(("name", "hurt"), HURT, ids=range(len(HURT)))
def test_what_is_lost_or_damaged_is_made_again(
    debs: Path, out: Path, caplog: pytest.LogCaptureFixture, name: str, hurt: Callable[[Path], Any]
) -> None:
    first = prepare_debian(out, str(debs))
    whole = content(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "clips").iterdir() if not name.endswith(path.name)}
    hurt(out / name)
    assert prepare_debian(out, str(debs)) == first and content(out) == whole
    assert caplog.text.count("is damaged or lacks clips: makes what is missing") == 1
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # features are kept by time


class Killed(BaseException):
    pass


def stop_after(count: int, out: Path, debs: Path) -> None:
    """A run that ends after so many clips, as by a kill."""
    written = []
    real = corpus.write_whole

    def write(path: Path, data: bytes) -> None:
        if path.parent.name == "clips":
            if len(written) == count:
                path.with_name(path.name + ".part").write_bytes(data[:9])
                raise Killed
            written.append(path)
        real(path, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(corpus, "write_whole", write)
        prepare_debian(out, str(debs))


def test_a_stopped_run_goes_on(debs: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare_debian(tmp_path / "whole", str(debs))
    stop_after(5, out, debs)
    assert not list(out.glob("t*.jsonl")) and not (out / "validation.jsonl").exists()
    made = sorted((out / "clips").glob("*.wav"))
    _flip(made[0])
    made[1].write_bytes(b"")
    with (out / "progress.jsonl").open("a") as file:
        file.write('{"id": "../x", "sha256": "0", "duration": 1.0}\n{"id": 3}\n{"id": "queen_joe00421"')
    seen = count_decoded(monkeypatch)
    assert prepare_debian(out, str(debs)) == whole
    assert len(seen) == len(CLIPS) - 5 + 2 and {path.stem for path in made[:2]} <= set(seen)
    assert content(out) == content(tmp_path / "whole")


def test_clips_of_other_code_are_not_kept(debs: Path, out: Path, tmp_path: Path) -> None:
    """Files with the right names and no row in progress.jsonl."""
    prepare_debian(tmp_path / "whole", str(debs))
    stop_after(5, out, debs)
    (out / "progress.jsonl").unlink()
    for path in (out / "clips").iterdir():
        path.write_bytes(b"other")
    prepare_debian(out, str(debs))
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FORMAT", "avsr-debian-0", r"format is 'avsr-debian-\d+' there, not 'avsr-debian-0'"),
        ("MISREAD", frozenset({"queen_joe00421"}), "misread is '[0-9a-f]{16}' there, not '[0-9a-f]{16}'"),
    ],
)
def test_other_code_or_another_list_makes_another_corpus(
    debs: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str, finished: bool
) -> None:
    if finished:
        prepare_debian(out, str(debs))
    else:
        stop_after(3, out, debs)
    before = content(out)
    monkeypatch.setattr(corpus, name, value)
    with pytest.raises(UserError, match=f"{out} holds another corpus \\({message}\\): choose another folder or delete"):
        prepare_debian(out, str(debs))
    assert content(out) == before


def test_misread_clips_are_left_out(debs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MISREAD", frozenset({"queen_joe00421", "drascula_hero_002", "none"}))
    manifests, refused = prepare_debian(out, str(debs))
    assert refused["misread"] == 2 and manifests == {**COUNTS, "test_texts": 0}


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT", "--shard", "1/2"], "--shard is none of debian-speech: one process makes it in a minute"),
        (["OUT", "--merge"], "--merge is none of debian-speech"),
        (["OUT", "debs=nowhere"], "option debs: there is no folder"),
        (["ROOT", "OUT"], "expected avsr prepare debian-speech OUT [key=value ...], got ROOT OUT"),
        (["debs=x"], "expected avsr prepare debian-speech OUT [key=value ...], got debs=x"),
        (["OUT", "workers=2"], "option workers is not one of debian-speech: it belongs to lrs2, lrs3, vox2, muavic"),
        (["OUT", "language=es"], "option language is not one of debian-speech: it belongs to muavic"),
        (["OUT", "deb=x"], "unknown option 'deb': did you mean 'debs'? The options of prepare debian-speech are debs"),
    ],
)
def test_arguments_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = refuse("prepare", "debian-speech", *arguments)
    assert shown.startswith(f"avsr: {message}") and "\n" not in shown and not list(tmp_path.iterdir())


def test_other_corpora_have_no_debs(refuse: Refuse) -> None:
    assert "option debs is not one of videos: it belongs to debian-speech" in refuse(
        "prepare", "videos", "a", "b", "debs=c"
    )


def test_folders_that_hold_something_else(debs: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds something else"):
        prepare_debian(debs, str(debs))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not a folder"):
        prepare_debian(tmp_path / "file", str(debs))
    out.mkdir()
    for state in ('{"format": 3, "corpus": "videos", "root": "/x", "seg": 16.0}', "[]", "{", '{"manifests": {}}', "3"):
        (out / "prepare.json").write_text(state)
        with pytest.raises(UserError, match="another corpus|is not of a corpus made by prepare"):
            prepare_debian(out, str(debs))
        assert list(out.iterdir()) == [out / "prepare.json"]
    prepare_debian(tmp_path / "made", str(debs))
    with pytest.raises(SystemExit):
        main(["prepare", "videos", str(debs), str(tmp_path / "made"), f"landmarks={debs}"])


def test_a_disk_that_is_full_is_named_and_the_same_command_goes_on(debs: Path, out: Path, tmp_path: Path) -> None:
    prepare_debian(tmp_path / "whole", str(debs))
    real = corpus.write_whole

    def write(path: Path, data: bytes) -> None:
        if path.name.startswith("queen_03"):
            raise OSError(28, os.strerror(28), str(path))
        real(path, data)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match=r"cannot write .*queen_03.*No space left"),
    ):
        patch.setattr(corpus, "write_whole", write)
        prepare_debian(out, str(debs))
    prepare_debian(out, str(debs))
    assert content(out) == content(tmp_path / "whole")


def with_prompts(debs: Path, patch: pytest.MonkeyPatch, sounds: dict[str, bytes], listed: bytes) -> None:
    """Asterisk's packages with these sounds and this file as their list."""
    folder = "asterisk/sounds/en_US_f_Allison"
    files = {f"{folder}/{name}.g722": sound for name, sound in sounds.items()}
    texts = {f"doc/{tiny.TEXTS}/core-sounds-en.txt.gz": listed}
    for name, added in ((tiny.SOUNDS, files), (tiny.TEXTS, texts)):
        pin(patch, {name: tiny.deb(debs / tiny.FILES[name], {**added, **tiny.licence(name)})})


def test_names_of_prompts_become_no_paths(debs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["../../escape", "/etc/x", "a\\b", "a\x1b[2J", "n" * 101, "caf\u00e9", "good/one", "good_one", "GOOD/ONE"]
    sound = tiny.g722(800)
    listed = "".join(f"{name}: some words\n" for name in names)
    with_prompts(debs, monkeypatch, dict.fromkeys(names, sound), gzip.compress(listed.encode()))
    manifests, refused = prepare_debian(out, str(debs))
    assert refused["name"] == 7 and manifests["test_prompts"] == 2
    made = [row.audio for row in read_manifest(out / "test_prompts.jsonl")]
    assert made == [out / "clips/asterisk__etc_x.wav", out / "clips/asterisk_good_one.wav"]
    assert {path.parent.name for path in out.parent.rglob("*.wav")} == {"clips"}


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (gzip.compress(bytes(2**22)), "more than 1048576 bytes"),
        (gzip.compress(os.urandom(9000))[:5000], "core-sounds-en.txt.gz is damaged"),
        (b"no gzip", "core-sounds-en.txt.gz is damaged"),
        (b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 50, "core-sounds-en.txt.gz is damaged"),
        (gzip.compress(b"other: text"), "do not belong together"),
    ],
    ids=range(5),
)
def test_lists_that_cannot_be_used(
    debs: Path, out: Path, monkeypatch: pytest.MonkeyPatch, listed: bytes, message: str
) -> None:
    with_prompts(debs, monkeypatch, {"a": tiny.g722(800)}, listed)
    with pytest.raises(UserError, match=message):
        prepare_debian(out, str(debs))


def test_a_text_of_brackets_takes_no_time(debs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_prompts(debs, monkeypatch, {"a": tiny.g722(800)}, gzip.compress(b"a: " + b"(" * (2**20 - 10)))
    assert prepare_debian(out, str(debs))[1]["text"] == 2


@pytest.mark.slow
def test_the_real_packages(tmp_path: Path) -> None:
    """Needs AVSR_DEBS, a folder with them: the numbers that the README gives."""
    debs = os.environ.get("AVSR_DEBS")
    if not debs:
        pytest.skip("AVSR_DEBS names no folder with Debian's packages")
    manifests, _ = prepare_debian(tmp_path / "out", debs)
    rows = {name: read_manifest(tmp_path / f"out/{name}.jsonl") for name in SPLITS}
    assert {name: len(content) for name, content in rows.items()} == manifests
    texts = {name: {row.text for row in content} for name, content in rows.items()}
    assert not texts["train"] & set.union(*(texts[name] for name in SPLITS[1:]))
    assert {row.speaker for row in rows["test_roles"]} == set(UNSEEN)
    every = [row for content in rows.values() for row in content]
    assert sum(row.duration for row in every) / 3600 == pytest.approx(4.0, abs=0.5)
    assert all("drascula" not in row.speaker for name in SPLITS[1:] for row in rows[name])
    for row in every:
        info = soundfile.info(str(row.audio))
        assert info.samplerate == 16_000 and info.duration == pytest.approx(row.duration, abs=1e-4)
