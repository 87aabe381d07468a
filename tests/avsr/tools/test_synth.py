"""Tests of ``avsr synth``: sentences, options, determinism, the files and the failures a user meets."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.data.manifest import read_manifest
from avsr.data.video import read_video
from avsr.errors import UserError
from avsr.runtime.locks import LOCK, hold
from avsr.runtime.pool import Lost, run_jobs
from avsr.tools.corpora.synth import corpus, shards
from avsr.tools.corpora.synth.corpus import SynthOptions, parse_options, synthesise
from avsr.tools.corpora.synth.voices import VOICES

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(120),
    pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra demo"),
]
SMALL = ["grid=7", "open=6", "validation=2", "test=4", "voices=2", "unseen_voices=1", "seed=3"]
FIELDS = ["id", "audio", "video", "duration", "text", "speaker", "sha256", "voice", "rate", "pitch", "times"]

# Run in fresh interpreters; in a file of its own so that they can import it whatever pytest's import mode.
HELPERS = """
import zlib
from avsr.tools.corpora.synth.espeak import Espeak
from avsr.tools.corpora.synth.sentences import GRID_SAID_AS

def phonemes(voice):
    speech = Espeak(voice, 165, 50, 1).speak("place red at a two now", GRID_SAID_AS)
    plain = Espeak(voice, 165, 50, 1).speak("place red at a two now")
    spans = (speech.words, speech.phonemes, plain.phonemes)
    return [[(s.text, s.start, s.end) for s in part] for part in spans]

def all_voices(voices):
    heard = []
    for voice, rate, pitch in voices:
        speech = Espeak(voice, rate, pitch, 1).speak("the farmer carried a basket of apples")
        wave = speech.waveform
        crc, peak = zlib.crc32(wave.tobytes()), float(abs(wave).max())
        heard.append((crc, len(wave) / 16000, peak, len(speech.phonemes)))
    return heard

def merged(voice):
    return [s.text for s in Espeak(voice, 165, 50, 1).speak("the end of the road in the garden").words]
"""


@pytest.fixture
def helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "synth_test_helpers.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import synth_test_helpers  # type: ignore[import-not-found]

    return synth_test_helpers


def run(work: Any, job: Any) -> Any:
    """In a process of its own, since eSpeak NG is started once in one."""
    [(_, result)] = run_jobs(work, [job], 1, fresh=True)
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus made by two workers."""
    out = tmp_path_factory.mktemp("synth") / "two" / "deep"
    counts = synthesise(out, parse_options([*SMALL, "workers=2"]))
    assert counts == {
        f"{name}/{split}.jsonl": count
        for name, train in (("grid", 7), ("open", 6))
        for split, count in (("train", train), ("validation", 2), ("test_sentences", 4), ("test_voices", 4))
    }
    return out


def manifest_rows(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        f"{path.parent.name}/{path.stem}": [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.glob("*/*.jsonl"))
    }


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_all_voices_speak_differently_and_do_not_clip(helpers: Any) -> None:
    heard = run(helpers.all_voices, [(voice.voice, voice.rate, voice.pitch) for voice in VOICES])
    assert len(heard) == len(VOICES)
    assert len({crc for crc, *_ in heard}) == len(VOICES)
    for voice, (_, seconds, peak, phonemes) in zip(VOICES, heard, strict=True):
        assert 1.5 < seconds < 4.0, voice
        assert 0.1 < peak < 0.95, voice
        assert phonemes >= 20, voice


@pytest.mark.parametrize("voice", ["gmw/en-US+f2", "gmw/en+m7"])
def test_the_letter_a_is_spoken_as_a_letter(helpers: Any, voice: str) -> None:
    spoken_words, spoken, plain = run(helpers.phonemes, voice)
    assert [text for text, *_ in spoken_words] == ["place", "red", "at", "a", "two", "now"]
    _, start, end = spoken_words[3]
    inside = [text for text, first, last in spoken if start <= first and last <= end]
    assert inside == ["'eI"]
    # "place" has one eI; the letter is a second, which the plain article would not be
    assert sum("eI" in text for text, *_ in spoken) == 2
    assert sum("eI" in text for text, *_ in plain) == 1


def test_words_run_together_share_a_span_and_none_is_lost(helpers: Any) -> None:
    texts = run(helpers.merged, "gmw/en-US+f2")
    assert " ".join(texts) == "the end of the road in the garden"
    assert "of the" in texts


def test_same_bytes_for_any_number_of_workers(small: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "one", parse_options([*SMALL, "workers=1"]))
    one, two = tree(tmp_path / "one"), tree(small)
    assert sorted(one) == sorted(two)
    assert len(one) == 1 + 8 + 3 * (17 + 16)
    assert [name for name in one if one[name] != two[name]] == []


def test_splits_share_no_sentence_and_unseen_voices_are_unseen(small: Path) -> None:
    rows = manifest_rows(small)
    for name in ("grid", "open"):
        splits = {split: rows[f"{name}/{split}"] for split in shards.SPLITS}
        texts = [row["text"] for split in splits.values() for row in split]
        assert len(set(texts)) == len(texts) == sum(map(len, splits.values()))
        speakers = {split: {row["speaker"] for row in content} for split, content in splits.items()}
        assert speakers["train"] == speakers["validation"] == speakers["test_sentences"]
        assert len(speakers["train"]) == 2
        assert len(speakers["test_voices"]) == 1
        assert not speakers["test_voices"] & speakers["train"]


def test_rows_match_the_files(small: Path) -> None:
    import soundfile

    for manifest, rows in manifest_rows(small).items():
        folder = small / manifest.split("/")[0]
        utterances = read_manifest(small / f"{manifest}.jsonl")
        for row, utterance in zip(rows, utterances, strict=True):
            assert list(row) == FIELDS
            assert row["video"] == f"video/{row['speaker']}/{row['id']}.mp4"
            assert row["audio"] == f"audio/{row['speaker']}/{row['id']}.wav"
            assert row["times"] == f"times/{row['speaker']}/{row['id']}.json"
            assert hashlib.sha256(utterance.audio.read_bytes()).hexdigest() == row["sha256"]
            info = soundfile.info(utterance.audio)
            assert (info.samplerate, info.channels, info.format, info.subtype) == (16000, 1, "WAV", "PCM_16")
            assert row["duration"] == pytest.approx(info.frames / 16000, abs=1e-6)
            wave, _ = soundfile.read(utterance.audio)
            assert 0.499 <= np.abs(wave).max() <= 0.901
            assert (folder / row["times"]).is_file()
            assert utterance.video == folder / row["video"]
            # the video covers the sound to the nearest frame
            assert read_video(utterance.video).shape == (max(1, round(info.frames / 640)), 96, 96)
            assert utterance.video.stat().st_size < 25_000


def test_the_lips_open_with_the_sound_to_one_frame(small: Path) -> None:
    """The gap between drawn lips is dark; its size is compared with the loudness, frame by frame."""
    import soundfile

    at_lag: dict[int, list[float]] = {lag: [] for lag in range(-4, 5)}
    for manifest, rows in manifest_rows(small).items():
        for row, utterance in zip(rows, read_manifest(small / f"{manifest}.jsonl"), strict=True):
            wave, _ = soundfile.read(utterance.audio)
            assert utterance.video is not None, row
            mouth = read_video(utterance.video).numpy()[:, 30:70, 15:81].astype(float)
            gap = (mouth < 0.3 * np.median(mouth, axis=(1, 2), keepdims=True)).sum(axis=(1, 2))
            count = len(gap)
            padded = np.pad(wave, (0, 640 * count))[: 640 * count].reshape(count, 640)
            loud = np.sqrt((padded**2).mean(axis=1))
            for lag, found in at_lag.items():
                found.append(float(np.corrcoef(gap[4:-4], loud[4 + lag : count - 4 + lag])[0, 1]))
    means = {lag: float(np.nanmean(found)) for lag, found in at_lag.items()}
    best = max(means, key=lambda lag: means[lag])
    assert abs(best) <= 1 and means[best] > 0.3, means


def test_video_can_be_left_out_and_changes_nothing_else(small: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "sound", parse_options([*SMALL, "open=0", "video=0"]))
    sound, both = tree(tmp_path / "sound"), tree(small)
    assert not any(name.endswith(".mp4") for name in sound)
    same = [name for name in sound if name.endswith((".wav", ".json")) and name != "corpus.json"]
    assert len(same) == 2 * 17 and all(sound[name] == both[name] for name in same)
    for manifest, rows in manifest_rows(tmp_path / "sound").items():
        with_video = manifest_rows(small)[manifest]
        assert [{**row, "video": None} for row in with_video] == rows


def test_times_are_ordered_and_inside_the_audio(small: Path) -> None:
    checked = 0
    for manifest, rows in manifest_rows(small).items():
        name = manifest.split("/")[0]
        for row in rows:
            times = json.loads((small / name / row["times"]).read_text())
            assert sorted(times) == ["phonemes", "words"]
            assert " ".join(text for text, *_ in times["words"]) == row["text"]
            if name == "grid":
                assert [text for text, *_ in times["words"]] == row["text"].split(" ")
            for spans in times.values():
                edges = [edge for _, start, end in spans for edge in (start, end)]
                assert edges == sorted(edges)
                assert edges[0] >= 0
                assert edges[-1] <= row["duration"]
            assert all(end - start > 0.02 for _, start, end in times["words"])
            # the phonemes cover the audio: they are not in ms or samples
            assert times["phonemes"][-1][2] > row["duration"] - 0.01
            checked += 1
    assert checked == 33


def test_test_sets_do_not_depend_on_the_size_of_the_training_set(tmp_path: Path) -> None:
    few = shards.plan_shards(tmp_path, SynthOptions(grid=5, open=5, test=6, validation=3, voices=2))
    many = shards.plan_shards(tmp_path, SynthOptions(grid=50, open=50, test=6, validation=3, voices=2))
    assert len(few) == len(many) == 2 * (2 + 4)
    for short, long in zip(few, many, strict=True):
        start = [line for line in short.lines if line.split != "train"]
        assert start
        assert list(long.lines[: len(start)]) == list(short.lines[: len(start)]) == start


def test_a_set_can_be_left_out(tmp_path: Path) -> None:
    plan = shards.plan_shards(tmp_path, SynthOptions(grid=0, open=5))
    assert {shard.set_name for shard in plan} == {"open"}


def test_a_finished_corpus_is_not_made_again(
    small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="avsr")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it started to speak")

    monkeypatch.setattr(corpus, "run_jobs", refuse)
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    counts = synthesise(small, parse_options([*SMALL, "workers=1"]))
    assert sum(counts.values()) == 33
    assert "already" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in small.rglob("*")}


def test_other_options_are_refused_by_name(small: Path) -> None:
    before = tree(small)
    with pytest.raises(UserError, match=r"seed is 3 there, not 4.*choose another folder or delete"):
        synthesise(small, parse_options([*SMALL, "seed=4"]))
    assert tree(small) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("thesis.tex", "precious", "holds something else .thesis.tex"),
        ("corpus.json", "{not json", "not of a corpus made by synth"),
        ("corpus.json", "[]", "not of a corpus made by synth"),
        ("corpus.json", '{"format": "other", "options": {}, "utterances": {}}', "format is 'other' there"),
    ],
)
def test_a_foreign_folder_is_left_alone(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        synthesise(tmp_path, SynthOptions())
    assert tree(tmp_path) == {name: content.encode()}


def test_a_damaged_corpus_is_not_taken_for_finished(tmp_path: Path) -> None:
    options = parse_options(SMALL)
    kept = {name: getattr(options, name) for name in vars(options) if name != "workers"}
    state = {"format": corpus.FORMAT, "options": kept, "utterances": {"grid/train.jsonl": 7}}
    (tmp_path / "corpus.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"damaged, grid/train.jsonl is missing"):
        synthesise(tmp_path, options)


def test_an_unfinished_run_is_made_again_without_its_left_overs(tmp_path: Path) -> None:
    (tmp_path / "corpus.json.part").write_text("{")
    stale = tmp_path / "grid" / "audio" / "us_f2" / "grid_train_999999.wav"
    stale.parent.mkdir(parents=True)
    stale.write_text("half a file")
    counts = synthesise(
        tmp_path, parse_options(["grid=1", "open=0", "validation=1", "test=1", "voices=1", "unseen_voices=1"])
    )
    assert set(counts) == {f"grid/{split}.jsonl" for split in shards.SPLITS}
    assert not stale.exists()
    assert not (tmp_path / "corpus.json.part").exists()
    assert json.loads((tmp_path / "corpus.json").read_text())["utterances"] == counts
    assert not (tmp_path / "open").exists()


def test_a_path_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*[Nn]ot a directory"):
        synthesise(tmp_path / "file" / "out", SynthOptions())
    with pytest.raises(UserError, match="is not a folder"):
        synthesise(tmp_path / "file", SynthOptions())


def test_a_write_error_in_a_worker_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(out: Path, described: dict[str, Any], **_: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / "grid").write_text("in the way")

    monkeypatch.setattr(corpus, "_start", start)
    with pytest.raises(UserError, match=r"cannot write .*out.grid"):
        synthesise(tmp_path / "out", parse_options([*SMALL, "open=0", "workers=1"]))
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_a_speech_process_that_dies_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "require_espeak", lambda: None)
    monkeypatch.setattr(corpus, "run_jobs", lambda work, jobs, *_, **__: [(jobs[0], Lost("died (exit status 3)"))])
    with pytest.raises(UserError, match=r"speech process died \(exit status 3\): .* workers=1"):
        synthesise(tmp_path, SynthOptions())
    assert (tmp_path / "corpus.json.part").exists() and not (tmp_path / "corpus.json").exists()


def test_a_stopped_run_goes_on_from_what_is_whole(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped after two of six shards and in the middle of a third, of which one file was changed since: the corpus has
    the same bytes as one that was made at once, and of the whole shards nothing is written again."""
    options, real = parse_options([*SMALL, "workers=1"]), corpus.run_jobs

    def stopped(work: Any, jobs: Any, *rest: Any, **named: Any) -> Any:
        for count, found in enumerate(real(work, jobs, *rest, **named)):
            if count == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(corpus, "run_jobs", stopped)
    with pytest.raises(KeyboardInterrupt):
        synthesise(tmp_path, options)
    assert not (tmp_path / LOCK).exists()
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"set": "grid", "voi')
    damaged, *kept = sorted(path for path in tmp_path.rglob("*.wav") if "us_f3" not in str(path))
    damaged.write_bytes(b"half a file")
    next(iter(sorted(tmp_path.rglob("*.json")))).write_bytes(b"")
    begun: list[str] = []

    def counted(work: Any, jobs: Any, *rest: Any, **named: Any) -> Any:
        begun.extend(f"{shard.set_name} {shard.voice.name}" for shard in jobs)
        return real(work, jobs, *rest, **named)

    monkeypatch.setattr(corpus, "run_jobs", counted)
    speaker = damaged.parent.name
    before = {path: path.stat().st_mtime_ns for path in kept if path.parent.name != speaker}
    synthesise(tmp_path, options)
    plan = [f"{shard.set_name} {shard.voice.name}" for shard in shards.plan_shards(tmp_path, options)]
    assert len(begun) == len(plan) - 1 and f"grid {speaker}" in begun
    assert "cut short" in caplog.text
    one, other = tree(tmp_path), tree(small)
    assert {name for name in one | other if one.get(name) != other.get(name)} == set()
    second = [path for path in before if f"grid {path.parent.name}" not in begun and path.parts[-4] == "grid"]
    assert second and all(path.stat().st_mtime_ns == before[path] for path in second)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(UserError, match=rf"{tmp_path} is in use by process"):
        synthesise(tmp_path, parse_options(SMALL))
    assert not list(tmp_path.iterdir())
