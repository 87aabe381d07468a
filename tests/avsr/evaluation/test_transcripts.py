"""Pseudo-labels: what a manifest, a pattern or a shard of them gives, and that it can be trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from avsr.cli import main
from avsr.config import load_config
from avsr.data.manifest import read_manifest, write_manifest
from avsr.errors import UserError
from avsr.evaluation import decode
from avsr.evaluation.decode import Hypothesis
from avsr.evaluation.transcripts import TRANSCRIPTS, find_clips, transcribe_files
from avsr.runtime.folders import sha256
from avsr.runtime.rows import StoredRows, write_rows
from avsr.runtime.share import Share

Tone = Callable[[Path, float], Path]
CONFIG = load_config("demo").data


def content(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def corpus(tone: Tone, tmp_path: Path) -> list[dict[str, Any]]:
    """Lines of a manifest in ``tmp_path/own`` without texts; the last one's clip is no sound."""
    folder = tmp_path / "own" / "clips"
    folder.mkdir(parents=True)
    for number in range(4):
        tone(folder / f"{number}.wav", 0.4 + 0.2 * number)
    (folder / "bad.wav").write_text("no sound")
    rows: list[dict[str, Any]] = [
        {"id": f"clip {n}", "audio": f"clips/{n}.wav", "duration": 0.4 + 0.2 * n} for n in range(4)
    ]
    rows[0] |= {"text": "", "speaker": "anna", "sha256": sha256(folder / "0.wav")}
    rows[1] |= {"text": "what a human wrote"}
    rows[2] |= {"text": None}
    rows[3] |= {"offset": 0.25, "duration": 0.5}
    rows += [{"id": "bad", "audio": "clips/bad.wav", "duration": 1.0}]
    write_manifest(tmp_path / "own" / "untranscribed.jsonl", rows)
    return rows


@pytest.mark.integration
def test_a_manifest_gives_a_manifest(
    run_folder: Path, corpus: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its texts are those of the files one by one; that of a part is that of a file with this part alone."""
    own = tmp_path / "own"
    wave, rate = soundfile.read(str(own / "clips" / "3.wav"), dtype="float32")
    soundfile.write(str(tmp_path / "part.wav"), wave[rate // 4 : rate * 3 // 4], rate, subtype="FLOAT")
    soundfile.write(str(tmp_path / "whole.wav"), wave, rate, subtype="FLOAT")
    names = [*(str(own / "clips" / f"{n}.wav") for n in range(3)), str(tmp_path / "part.wav")]
    texts = [text for _, text in transcribe_files(run_folder, names, [])]
    with pytest.raises(SystemExit) as status:
        main(["transcribe", str(run_folder), str(own / "untranscribed.jsonl"), "--out", str(own)])
    assert status.value.code == 2  # for the bad clip
    kept = [{key: value for key, value in row.items() if key != "text"} for row in corpus[:4]]
    rows = content(own / TRANSCRIPTS)
    assert [{key: row[key] for key in part} for row, part in zip(rows, kept, strict=True)] == kept
    assert [row["text"] for row in rows] == texts and len(set(texts)) > 1
    assert all(row["score"] < 0 and row["cut"] in ("", "budget") and row["loop"] in (True, False) for row in rows)
    (bad,) = content(own / "rejected.jsonl")
    assert bad["manifest"] == str(own / "untranscribed.jsonl") and bad["id"] == "bad" and "bad.wav" in bad["reason"]
    assert {path.name for path in own.iterdir()} == {"clips", "untranscribed.jsonl", TRANSCRIPTS, "rejected.jsonl"}
    caplog.clear()
    found = read_manifest(own / TRANSCRIPTS)
    assert [(u.id, u.text, u.speaker, u.offset) for u in found][::3] == [
        ("clip 0", texts[0], "anna", None),
        ("clip 3", texts[3], "", 0.25),
    ]
    assert not caplog.text  # no field is taken for a misspelt one


@pytest.mark.integration
def test_files_elsewhere_are_named_absolutely(
    run_folder: Path, corpus: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manifest, out = tmp_path / "own" / "untranscribed.jsonl", tmp_path / "out"
    list(transcribe_files(run_folder, [str(manifest)], [], out))
    assert f"{out / TRANSCRIPTS} has absolute paths: data.allow_absolute=true reads it" in caplog.text
    with pytest.raises(UserError, match="leads outside"):
        read_manifest(out / TRANSCRIPTS)
    given = read_manifest(manifest, texts=False)[:4]
    assert [u.audio for u in read_manifest(out / TRANSCRIPTS, absolute=True)] == [u.audio for u in given]


@pytest.mark.integration
def test_a_stopped_manifest_goes_on_and_what_has_no_text_is_rejected(
    run_folder: Path, tone: Tone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after eight of ten clips. Then one is replaced by a longer one, one by another sound of this length, and
    of one the line declares another duration: these are transcribed again."""
    decoded: list[str] = []
    fail = True

    def transcribe_batch(model: Any, batch: Any, config: Any) -> list[list[Hypothesis]]:
        ids = [utterance.id for utterance in batch.utterances]
        if fail and len(decoded) == 8:
            raise ConnectionAbortedError
        decoded.extend(ids)
        return [[Hypothesis("" if name == "c9" else f"text of {name}", -0.5, "")] for name in ids]

    monkeypatch.setattr(decode, "transcribe_batch", transcribe_batch)
    rows = [{"id": f"c{n}", "audio": f"c{n}.wav", "duration": 0.4} for n in range(10)]
    for row in rows:
        tone(tmp_path / row["audio"], 0.4)
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, rows)
    command = run_folder, [str(manifest)], ["decode.batch=1"], tmp_path
    with pytest.raises(ConnectionAbortedError):
        list(transcribe_files(*command))
    rows[2]["duration"], rows[4]["duration"] = 0.6, 0.41
    write_manifest(manifest, rows)
    tone(tmp_path / "c2.wav", 0.6)
    tone(tmp_path / "c3.wav", 0.4)
    decoded.clear()
    fail = False
    found = list(transcribe_files(*command))
    assert decoded == ["c3", "c4", "c2", "c8", "c9"]
    assert found == [(f"c{n}", f"text of c{n}" if n < 9 else "") for n in range(10)]
    written = content(tmp_path / TRANSCRIPTS)
    assert [(row["id"], row["text"]) for row in written] == found[:9]
    assert [row["duration"] for row in written[2:5]] == [0.6, 0.4, 0.41]
    assert content(tmp_path / "rejected.jsonl") == [
        {"manifest": str(manifest), "id": "c9", "reason": "no text was found in it"}
    ]


@pytest.mark.integration
def test_shards_are_parts_of_the_whole(
    run_folder: Path, tone: Tone, refuse: Callable[..., str], tmp_path: Path
) -> None:
    for number in range(5):
        tone(tmp_path / f"{number}.wav", 0.4 + 0.1 * number)
    pattern = str(tmp_path / "*.wav")
    whole = list(transcribe_files(run_folder, [pattern], []))
    parts = [list(transcribe_files(run_folder, [pattern], [], tmp_path / f"{i}", Share(i, 3))) for i in (1, 2, 3)]
    assert [parts[n % 3][n // 3] for n in range(5)] == whole and sum(map(len, parts)) == 5
    assert [len(content(tmp_path / f"{i}" / TRANSCRIPTS)) for i in (1, 2, 3)] == [2, 2, 1]
    assert not list(transcribe_files(run_folder, [pattern], [], tmp_path / "none", Share(6, 6)))
    assert content(tmp_path / "none" / TRANSCRIPTS) == []
    for text in ("0/3", "4/3", "1", "1/3/3", "\u0661/3"):
        assert f"--shard: expected I/N with I from 1 to N, such as 3/16, got {text!r}" in refuse(
            "transcribe", run_folder, "a.wav", "--shard", text
        )


def test_patterns_give_sorted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.wav", "b/1.wav", "a/x.wav", "a/y.mp4", "top.wav", "[1].wav", "b.wav/3.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_clips(["b/*.wav", "a/?.mp4"], CONFIG) == ["b/1.wav", "b/2.wav", "a/y.mp4"]
    every = ["[1].wav", "a/x.wav", "b.wav/3.wav", "b/1.wav", "b/2.wav", "top.wav"]  # and no folder
    assert find_clips(["**/*.wav"], CONFIG) == every
    assert find_clips(["[1].wav", "gone.wav"], CONFIG) == ["[1].wav", "gone.wav"]  # a file's own name is no pattern
    for pattern in ("c/*.wav", "[2].wav", "nowhere\n*"):
        with pytest.raises(UserError, match="no file matches '"):
            find_clips(["top.wav", pattern], CONFIG)


def test_manifests_are_read_without_their_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = tmp_path / "labels" / "x.csv"
    labels.parent.mkdir()
    labels.write_text("lrs3,main/a.mp4,50,1 2\nlrs3,main/b.mp4,25,,\nlrs3,main/c.mp4,25,3,c text\n")
    found = find_clips([str(labels)], CONFIG)
    assert [(u.id, u.text, u.duration) for u in found if not isinstance(u, str)] == [
        ("lrs3/main/a.mp4", "", 2.0),
        ("lrs3/main/b.mp4", "", 1.0),
        ("lrs3/main/c.mp4", "", 1.0),
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "audio": "a.wav", "duration": 1}\n{"id": "b", "audio": "b.wav", "text": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the field 'duration' is missing"):
        find_clips([str(rows)], CONFIG)
    some = load_config("demo", ["data.on_bad=skip"]).data
    assert [u.id for u in find_clips([str(rows)], some) if not isinstance(u, str)] == ["a"]
    assert "the field 'duration' is missing" in caplog.text
    with pytest.raises(UserError, match=r"rows\.jsonl: a manifest is transcribed alone"):
        find_clips(["a.wav", str(rows)], CONFIG)
    with pytest.raises(UserError, match="cannot read the manifest"):
        find_clips([str(tmp_path / "none.csv")], CONFIG)


@pytest.mark.integration
def test_a_stop_after_the_result_is_written_needs_no_other_folder(
    run_folder: Path, tone: Tone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out = [str(tone(tmp_path / "a.wav", 0.4))], tmp_path / "out"

    def stop(rows: StoredRows, place: Path, content: Iterable[Any]) -> None:
        write_rows(place, content)
        raise RuntimeError

    def publish_and_stop(*overrides: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(StoredRows, "publish", stop)
            list(transcribe_files(run_folder, files, list(overrides), out))

    publish_and_stop()
    before = (out / TRANSCRIPTS).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(decode, "transcribe_batch", lambda *arguments: pytest.fail("decoded again"))
        list(transcribe_files(run_folder, files, [], out))
    assert (out / TRANSCRIPTS).read_bytes() == before and [path.name for path in out.iterdir()] == [TRANSCRIPTS]
    (out / TRANSCRIPTS).unlink()
    publish_and_stop()
    with pytest.raises(UserError, match="is there already and of other settings: name another folder with --out"):
        list(transcribe_files(run_folder, files, ["decode.beams=2"], out))


@pytest.mark.integration
def test_files_leave_the_list_of_a_training(run_folder: Path, tone: Tone, tmp_path: Path) -> None:
    (run_folder / "rejected.jsonl").write_text("of the training\n")
    list(transcribe_files(run_folder, [str(tone(tmp_path / "a.wav", 0.5))], [], run_folder))
    assert (run_folder / "rejected.jsonl").read_text() == "of the training\n"
