"""``avsr prepare`` from raw videos of drawn faces to clips and manifests, restarts, and everything that goes wrong."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from avsr.data.manifest import read_manifest
from avsr.data.video import encode_video, read_video
from avsr.errors import UserError
from avsr.runtime import pool
from avsr.tools.corpora.prepare import clips, run
from avsr.tools.corpora.prepare.options import PrepareOptions
from avsr.tools.corpora.prepare.run import prepare
from avsr.tools.corpora.source import Piece, Source

pytestmark = pytest.mark.integration

Face = Callable[..., tuple[np.ndarray, np.ndarray]]


def sound(seconds: float) -> np.ndarray:
    """A tone that rises, so that its pitch tells the time."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    return 0.4 * np.sin(2 * np.pi * (200 + 40 * time) * time)


@pytest.fixture
def corpus(tmp_path: Path, draw_face: Face) -> Callable[..., Path]:
    """``corpus("a/b", 2.0, text="HI", root="lrs3")``: writes a video of a talking face, its transcript and landmarks.

    ``wave`` replaces the sound (None: there is none), ``lost`` frames have no landmarks, and ``keep`` is how many
    frames the landmark file has (0: there is none).
    """
    drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def make(
        name: str, seconds: float = 1.0, text: str | None = None, *, root: str = "in", wave: Any = "tone",
        lost: Any = (), keep: int | None = None, shift: float = 0.0,
    ) -> Path:  # fmt: skip
        count = round(seconds * 25)
        if count not in drawn:
            time = np.arange(count) / 25
            drawn[count] = draw_face(0.2 * np.sin(2 * time), 28, 70 + 10 * np.sin(time), 50)
        frames, points = drawn[count]
        video = tmp_path / root / f"{name}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        heard = sound(seconds) if isinstance(wave, str) else wave
        video.write_bytes(encode_video(frames, sound=heard))
        if text is not None:
            video.with_suffix(".txt").write_text(text)
        if keep != 0:
            points = points[:keep] + shift
            points[list(lost)] = np.nan
            path = tmp_path / "landmarks" / f"{name}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, landmarks=points)
        return video

    return make


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., run.Prepared]:
    """``go("videos", seg=2.0)`` prepares ``tmp_path/in`` in this process with the written landmarks."""

    def start(name: str, root: str = "in", **options: Any) -> run.Prepared:
        settings = {"landmarks": str(tmp_path / "landmarks"), "workers": 1, **options}
        return prepare(name, tmp_path / root, tmp_path / "out", PrepareOptions(**settings))

    return start


def refusals(tmp_path: Path) -> dict[str, dict[str, str]]:
    lines = (tmp_path / "out/refused.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def rows(tmp_path: Path, name: str) -> list[Any]:
    return read_manifest(tmp_path / "out" / f"{name}.jsonl")


def check_clip(row: Any, seconds: float, start: float = 0.0) -> None:
    """The clip is of that length, shows the mouth in its middle, and has the sound of that time."""
    frames = read_video(row.video)
    assert frames.shape == (round(seconds * 25), 96, 96) and row.duration == pytest.approx(seconds)
    bright = np.clip(frames.numpy().astype(float) - 160, 0, None)
    y, x = np.mgrid[:96, :96]
    for weight in bright:
        assert abs((y * weight).sum() / weight.sum() - 47.5) < 2 and abs((x * weight).sum() / weight.sum() - 46.5) < 2
    wave, rate = soundfile.read(row.audio)
    assert rate == 16_000 and wave.shape == (len(frames) * 640,)
    expected = sound(start + seconds)[round(start * 16_000) :]
    assert np.corrcoef(wave[2000:-2000], expected[2000:-2000])[0, 1] > 0.98  # AAC is no copy, but in step


SCRIPT = "Text:  ONE TWO THREE\nConf: 5\n\nWORD START END ASDSCORE\nONE 0.2 0.8 3\nTWO 0.9 1.6 3\nTHREE 2.0 2.88 3\n"


def test_lrs3(corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path) -> None:
    corpus("trainval/A/00001", 1.0, "Text:  HELLO {LG} WORLD\n")
    corpus("trainval/B/00001", 1.0, "Text:  HELLO AGAIN\n")
    corpus("pretrain/C/00009", 3.0, SCRIPT)
    corpus("test/D/00001", 1.0, "Text:  THE TEST\n", lost=(0, 5, 6, 7, 24))
    report = go("lrs3", seg=2.0, validation=1)
    assert report.made == 5 and report.refused == {}
    assert report.manifests == {"train": 3, "trainval": 1, "pretrain": 2, "validation": 1, "test": 1}
    (trained,), (held,), (tested,) = (rows(tmp_path, name) for name in ("trainval", "validation", "test"))
    assert {(trained.speaker, trained.text), (held.speaker, held.text)} == {("A", "hello world"), ("B", "hello again")}
    assert tested.text == "the test" and len(tested.sha256) == 64
    for row in (trained, held, tested):
        check_clip(row, 1.0)
    one, two = rows(tmp_path, "pretrain")
    assert [(r.id, r.text) for r in (one, two)] == [
        ("pretrain/C/00009_00", "one two"),
        ("pretrain/C/00009_01", "three"),
    ]
    check_clip(one, 1.4, 0.2)
    check_clip(two, 0.88, 2.0)
    assert not list((tmp_path / "out").rglob("*.part"))


def test_lrs2(corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path) -> None:
    for name in ("main/55/00001", "main/66/00001", "main/77/00001"):
        corpus(name, 1.0, "Text:  HI YOU\n", root="lrs2/mvlrs_v1")
    corpus("pretrain/88/00001", 3.0, SCRIPT, root="lrs2/mvlrs_v1")
    for name, line in (("train", "55/00001"), ("val", "66/00001"), ("test", "77/00001 MV"), ("pretrain", "88/00001")):
        (tmp_path / f"lrs2/{name}.txt").write_text(f"{line}\n")
    report = go("lrs2", "lrs2", seg=16.0)
    assert report.manifests == {"train": 2, "main": 1, "validation": 1, "test": 1, "pretrain": 1}
    (whole,) = rows(tmp_path, "pretrain")
    assert whole.text == "one two three"
    check_clip(whole, 3.0)  # all words end within seg: the whole video


def test_vox2(corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path) -> None:
    corpus("dev/mp4/id1/v/00001", 2.4)
    corpus("dev/mp4/id1/v/00002", 1.0, wave=None)
    corpus("dev/mp4/id2/w/00001", 1.0)
    corpus("dev/mp4/id3/w/00001", 1.0)
    soundfile_of = tmp_path / "in/dev/wav/id1/v/00002.wav"
    soundfile_of.parent.mkdir(parents=True)
    soundfile.write(soundfile_of, sound(1.0), 16_000)
    (tmp_path / "in/vox-en.id").write_text("id1/v/00001\nid1/v/00002\nid2/w/00001\n")
    report = go("vox2", seg=1.0)
    # the last window is 0.4 s, fewer than 12 frames
    assert report.manifests == {"untranscribed": 4} and report.refused == {"short": 1}
    assert list(refusals(tmp_path)) == ["dev/mp4/id1/v/00001_02"]
    labels = tmp_path / "labels.tsv"
    labels.write_text("id1/v/00001_00\tFirst window\nid1/v/00001_01\tsecond\nid1/v/00002\twhole video\n")
    again = go("vox2", seg=1.0, labels=str(labels))
    assert again.made == 0 and again.manifests == {"train": 3, "untranscribed": 1}
    first, second, third = rows(tmp_path, "train")
    assert [r.text for r in (first, second, third)] == ["first window", "second", "whole video"]
    assert first.speaker == "id1"
    check_clip(first, 1.0)
    check_clip(second, 1.0, 1.0)
    check_clip(third, 1.0)
    with pytest.raises(UserError, match="no list of English"):
        (tmp_path / "in/vox-en.id").unlink()
        go("vox2", seg=1.0)


def test_muavic_is_taken_as_it_is(go: Callable[..., run.Prepared], tmp_path: Path, draw_face: Face) -> None:
    folder = tmp_path / "in/en"
    for kind in ("video", "audio"):
        (folder / kind).mkdir(parents=True)
    mouths = np.random.default_rng(0).integers(0, 255, (25, 96, 96)).astype(np.uint8)
    (folder / "video/a.mp4").write_bytes(encode_video(mouths))
    (folder / "video/b.mp4").write_bytes(encode_video(np.zeros((25, 88, 88), np.uint8)))
    for name in ("a", "b", "c"):
        soundfile.write(folder / f"audio/{name}.wav", sound(1.01), 16_000)
    lines = [f"S/{name}\tvideo/{name}.mp4\taudio/{name}.wav\t25\t16160" for name in ("a", "b", "c")]
    (folder / "test.tsv").write_text("\n".join([str(folder), *lines]) + "\n")
    (folder / "test.en").write_text("ONE\nTWO\nTHREE\n")
    report = go("muavic", landmarks="detect")  # asks for no detector
    assert report.manifests == {"test": 1}
    assert {name: row["kind"] for name, row in refusals(tmp_path).items()} == {"test/S/b": "size", "test/S/c": "video"}
    assert "88x88" in refusals(tmp_path)["test/S/b"]["reason"]
    (row,) = rows(tmp_path, "test")
    assert row.video.is_symlink() and row.video.read_bytes() == (folder / "video/a.mp4").read_bytes()
    assert soundfile.info(row.audio).frames == 16_000 and row.text == "one"


def test_everything_bad_is_named_and_counted(
    corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path
) -> None:
    corpus("good", 1.0, "good")
    corrupt = corpus("corrupt", 1.0, "x")
    data = bytearray(corrupt.read_bytes())
    data[len(data) // 3 :] = b"\0" * (len(data) - len(data) // 3)
    corrupt.write_bytes(data)
    corpus("empty", 1.0, "x").write_bytes(b"")
    corpus("noise", 1.0, "x").write_bytes(os.urandom(3000))
    corpus("faceless", 1.0, "x", lost=range(25))
    corpus("nearly", 1.0, "x", lost=range(14))
    corpus("seldom", 2.0, "x", lost=range(30))
    corpus("tiny", 0.44, "x", wave=sound(0.44))
    for name, wave in (("mute", None), ("silent", np.zeros(16_000)), ("skewed", sound(1.5))):
        corpus(name, 1.0, "x", wave=wave)
    corpus("black", 1.0, "x").write_bytes(encode_video(np.zeros((25, 240, 320), np.uint8), sound=sound(1.0)))
    stereo = np.stack([sound(1.0), -sound(1.0)], 1)
    soundfile.write(corpus("inverted", 1.0, "x", wave=None).with_suffix(".wav"), stereo, 16_000)
    for name, keep in (("unmarked", 0), ("short-marks", 20)):
        corpus(name, 1.0, "x", keep=keep)
    corpus("aside", 1.0, "x", shift=120.0)
    corpus("wordless", 1.0, " {NS} ")
    corpus("long", 3.0, "x")
    corpus("late", 1.0, SCRIPT)
    bad = corpus("foreign", 1.0, "x", keep=0)
    (tmp_path / "landmarks/foreign.pkl").write_bytes(b"cos\nsystem\n(S'touch OWNED'\ntR.")
    twin = corpus("twin", 1.0, "x")
    shutil.copy(twin, twin.with_suffix(".mkv"))
    report = go("videos", seg=2.0)
    found = refusals(tmp_path)
    assert {name: row["kind"] for name, row in found.items()} == {
        "corrupt": "video", "empty": "video", "noise": "video", "faceless": "no face", "nearly": "no face",
        "seldom": "no face", "tiny": "no face", "mute": "no audio", "silent": "silent", "skewed": "streams",
        "unmarked": "no landmarks", "short-marks": "landmarks", "aside": "outside", "wordless": "text", "long": "long",
        "late_00": "text", "late_01": "text", "twin": "twice", "foreign": "landmarks", "black": "still",
        "inverted": "audio",
    }  # fmt: skip
    assert sum(report.refused.values()) == len(found) == 21 and report.manifests == {"all": 2} and report.made == 2
    assert "os.system" in found["foreign"]["reason"] and found["foreign"]["file"] == str(bad)
    assert "1.50 s of sound but 1.00 s" in found["skewed"]["reason"]
    assert [row.id for row in rows(tmp_path, "all")] == ["good", "twin"]
    for row in found.values():
        assert row["reason"] and "\n" not in row["reason"]


def test_two_videos_never_write_the_same_clip(
    corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path
) -> None:
    """One of them cut into windows or at words, the other one whole and named like a clip of the first."""
    windows = corpus("talk", 2.0)
    corpus("talk_00", 1.0, "whole")
    corpus("talk_00_00", 1.0, "another whole one")  # nobody's window
    corpus("talk_x1", 1.0, "no number")
    corpus("speech", 3.0, SCRIPT)
    corpus("speech_01", 1.0, "whole")
    corpus("speech_02", 1.0, "the speech has but two clips")
    report = go("videos", seg=2.0)
    found = refusals(tmp_path)
    assert {name: row["kind"] for name, row in found.items()} == {"talk_00": "twice", "speech_01": "twice"}
    assert str(windows) in found["talk_00"]["reason"] and report.refused == {"twice": 2}
    ids = [row.id for row in rows(tmp_path, "all")]
    assert sorted(ids) == ["speech_00", "speech_01", "speech_02", "talk_00_00", "talk_x1"]
    check_clip(rows(tmp_path, "all")[ids.index("speech_01")], 0.88, 2.0)
    assert "talk_00" in (tmp_path / "out/untranscribed.jsonl").read_text()


def test_the_names_of_clips_are_compared_both_ways(tmp_path: Path) -> None:
    def source(name: str, *clips: str) -> Source:
        pieces = tuple(Piece(clip, "text") for clip in clips)
        return Source(name, tmp_path / f"{name}.mp4", "", ("all",), pieces, window=None if clips else 2.0)

    windows, whole = source("a"), source("a_00", "a_00")
    for pair, twice in (
        ((windows, whole), True),
        ((whole, windows), True),
        ((source("b", "a_123"), windows), True),
        ((source("a_00"), windows), False),  # windows of windows: a_00_00
        ((source("b", "a_0"), windows), False),
        ((source("b", "a_00", "a_01"), source("c", "a_02")), False),
        ((source("b", "a_00", "a_01"), source("c", "a_01")), True),
    ):
        kept, refused = run._sources(pair)
        assert len(kept) == 2 - twice and kept[0] == pair[0]
        assert [(r.id, r.kind) for r in refused] == [(pair[1].id, "twice")] * twice


def test_a_restart_makes_only_what_is_missing(
    corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c", "d"):
        corpus(name, 1.0, f"text {name}", keep=0 if name == "d" else None)
    calls: list[str] = []
    make, most = clips.make_clips, 2

    def counted(job: clips.Job) -> clips.Outcome:
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(job.source.id)
        return make(job)

    monkeypatch.setattr(run, "make_clips", counted)
    with pytest.raises(KeyboardInterrupt):
        go("videos")
    assert calls == ["a", "b"] and not (tmp_path / "out/all.jsonl").exists()
    with (tmp_path / "out/progress.jsonl").open("a") as file:
        file.write('{"source": "c", "ma')  # the machine went down while this was written
    before = {name: os.stat(tmp_path / f"out/clips/{name}.mp4").st_mtime_ns for name in ("a", "b")}
    most = 10
    calls.clear()
    report = go("videos")
    assert calls == ["c", "d"] and report.made == 1 and report.manifests == {"all": 3}
    assert report.refused == {"no landmarks": 1}
    assert before == {name: os.stat(tmp_path / f"out/clips/{name}.mp4").st_mtime_ns for name in before}

    calls.clear()
    assert go("videos").refused == {"no landmarks": 1} and calls == []  # nothing has changed, nothing is tried
    assert go("videos", coverage=0.4).made == 0 and calls == ["d"]  # only what was refused is
    calls.clear()

    corpus("d", 1.0, "text d")  # its landmarks have come
    (tmp_path / "out/clips/b.wav").write_bytes(b"")  # as a power failure leaves it
    (tmp_path / "in/a.txt").write_text("another text")
    assert go("videos").manifests == {"all": 4} and calls == ["b", "d"]
    assert [row.text for row in rows(tmp_path, "all")] == ["another text", "text b", "text c", "text d"]

    calls.clear()
    corpus("c", 2.0)  # another video of the same name
    assert go("videos").made == 1 and calls == ["c"]
    assert rows(tmp_path, "all")[2].duration == 2.0


def test_only_the_missing_piece_of_a_video_is_written_again(
    corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path
) -> None:
    corpus("a", 3.0, SCRIPT, lost=range(50, 75))
    assert go("videos", seg=2.0).refused == {"no face": 1}
    kept = os.stat(tmp_path / "out/clips/a_00.mp4").st_mtime_ns
    corpus("a2", 3.0, None)
    (tmp_path / "landmarks/a.npz").write_bytes((tmp_path / "landmarks/a2.npz").read_bytes())
    report = go("videos", seg=2.0)
    assert report.refused == {} and report.manifests == {"all": 2, "untranscribed": 2}
    assert os.stat(tmp_path / "out/clips/a_00.mp4").st_mtime_ns == kept
    check_clip(rows(tmp_path, "all")[1], 0.88, 2.0)


def test_the_out_folder(corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path) -> None:
    corpus("a", 1.0, "text")
    go("videos")
    with pytest.raises(UserError, match="seg is 16.0 there, not 3.0"):
        go("videos", seg=3.0)
    (tmp_path / "out/prepare.json").write_text("{")
    with pytest.raises(UserError, match="not of a corpus made by prepare"):
        go("videos")
    (tmp_path / "out/prepare.json").unlink()
    with pytest.raises(UserError, match="holds something else"):
        go("videos")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        go("videos")


def test_nothing_to_prepare(corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path) -> None:
    corpus("a", 1.0, "text", keep=0)
    with pytest.raises(UserError, match="no folder"):
        go("videos")
    (tmp_path / "landmarks").mkdir()
    with pytest.raises(UserError, match=r"no clip could be made.*refused\.jsonl.*no landmark file"):
        go("videos")
    with pytest.raises(UserError, match="no folder"):
        go("videos", "elsewhere")
    with pytest.raises(UserError, match="unknown corpus 'lrs4'"):
        go("lrs4")


CRASHING = """
import multiprocessing, os, resource
from avsr.tools.corpora.prepare import clips

def make_clips(job):
    if job.source.id != "b":
        return clips.make_clips(job)
    assert multiprocessing.parent_process() is not None, "it would end the whole run"
    with open(job.out + "/../tries", "a") as file:
        file.write(job.source.id)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()
"""


def test_a_video_that_crashes_its_process_is_named_and_tried_again(
    corpus: Callable[..., Path], go: Callable[..., run.Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        corpus(name, 1.0, f"text {name}")
    (tmp_path / "crashing_decoder.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(run, "make_clips", importlib.import_module("crashing_decoder").make_clips)
        patch.setattr(pool, "cpus", lambda: 1)  # which does not make it this process
        report = go("videos", workers=0)
    assert report.manifests == {"all": 1} and report.refused == {"crash": 1} and report.made == 1
    assert "b.mp4 died" in refusals(tmp_path)["b"]["reason"]
    assert (tmp_path / "tries").read_text() == "bb"  # once more, alone
    report = go("videos")
    assert report.manifests == {"all": 2} and report.refused == {} and report.made == 1
