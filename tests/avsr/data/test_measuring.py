"""Lengths that an index keeps: the datasets are those of reading every clip, and no clip is read twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from avsr.config import load_config
from avsr.data import measuring
from avsr.data.dataset import Reading, SpeechDataset, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.index import make_index, open_manifest
from avsr.data.manifest import write_manifest
from avsr.data.measuring import SIGNALS, measure, measured, stamps
from avsr.data.members import stamp
from avsr.errors import UserError
from avsr.models.build import build_store
from avsr.runtime.share import Share


def change(manifest: Path, number: int, **fields: Any) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[number] |= fields
    write_manifest(manifest, rows)


@pytest.fixture
def corpus(make_corpus: Callable[..., Path], tmp_path: Path) -> Path:
    """Eleven clips, of which some cannot be used in one way each."""
    seconds = [0.4, 0.8, 1.2, 0.6, 2.0, 1.0, 0.44, 0.9, 0.7, 0.5, 0.52]
    manifest = make_corpus(tmp_path / "corpus" / "train", seconds=seconds, video="beside")
    files = [row.audio for row in open_manifest(manifest).utterances]
    files[1].write_bytes(b"no sound")  # type: ignore[union-attr]
    open_manifest(manifest).utterances[2].video.write_bytes(b"no video")  # type: ignore[union-attr]
    change(manifest, 3, duration=600.0)
    change(manifest, 4, audio="audio/u000.wav", duration=0.4)  # not as long as the video
    change(manifest, 5, sha256="ab" * 32)
    soundfile.write(str(files[6]), np.zeros(7040, dtype=np.float32), 16_000)  # silent
    return manifest


@pytest.mark.parametrize("task", ["audio", "video", "audiovisual"])
def test_as_reading_every_clip(av_recipe: Callable[..., Path], corpus: Path, tmp_path: Path, task: str) -> None:
    config = load_config(str(av_recipe(tmp_path, task)), ["data.on_bad=skip", "data.max_bad=1", "data.cache=null"])
    config.data.min_seconds = 0.5

    def load() -> SpeechDataset:
        store = build_store(config, torch.device("cpu"))
        return load_dataset(str(corpus), config.data, store, list, title="x", reading=Reading(task))

    plain = load()
    make_index(corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "RANGE", 3)
        kept = load()
    assert [u.id for u in kept.utterances] == [u.id for u in plain.utterances] and len(kept) < 11
    assert kept.sizes.tolist() == plain.sizes.tolist() and kept.bad == plain.bad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "load_clip", None)  # nothing is read again
        assert load().bad == plain.bad


def test_a_complete_cache_is_not_looked_through(
    av_recipe: Callable[..., Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "features"
    config = load_config(
        str(av_recipe(tmp_path, "audio")), ["data.on_bad=skip", "data.max_bad=1", f"data.cache={cache}"]
    )
    looked: list[str] = []
    real = FeatureStore._key
    monkeypatch.setattr(FeatureStore, "_key", lambda self, name, u, v: (looked.append(u.id), real(self, name, u, v))[1])

    def load() -> list[Any]:
        looked.clear()
        store = build_store(config, torch.device("cpu"))
        data = load_dataset(str(corpus), config.data, store, list, title="x", reading=Reading("audio"))
        return [[u.id for u in data.utterances], data.sizes.tolist(), data.bad]

    plain = load()
    for signal in SIGNALS:
        measure(corpus, signal, workers=1)
    assert load() == plain and looked  # there is no note of it yet
    assert load() == plain and not looked
    config.data.limit = 4
    assert load()[0] == plain[0][: len(load()[0])] and not looked
    config.data.limit = 0
    (shard,) = cache.rglob("shards/*.safetensors")
    (shard.parent / f"{shard.name}.{'0' * 32}.damaged").touch()
    assert load() == plain and looked  # a reader has found damage
    assert load() == plain and not looked
    shard.unlink()
    assert load() == plain and looked
    assert load() == plain and not looked
    path = open_manifest(corpus).utterances[7].audio
    assert path is not None
    os.utime(path, (7, 7))
    assert load() == plain and not looked  # found by avsr index
    measure(corpus, "audio", workers=1)
    assert load() == plain and looked


def test_only_what_has_changed_is_measured_again(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = measuring.load_clip
    monkeypatch.setattr(measuring, "load_clip", lambda u, *args: (read.append(u.id), real(u, *args))[1])
    for signal in SIGNALS:
        measure(corpus, signal, workers=1)
    assert len(read) == 22
    rows = open_manifest(corpus).utterances
    path = rows[7].audio
    assert path is not None
    soundfile.write(str(path), np.random.default_rng(0).normal(size=20_000).astype(np.float32) / 9, 16_000)
    os.utime(path, (5, 5))
    read.clear()
    for signal in SIGNALS:
        measure(corpus, signal, workers=1)
    assert read == [rows[7].id]
    found = measured(open_manifest(corpus).index, SIGNALS)
    assert found is not None and found["audio"].column("length")[7].as_py() == 20_000
    columns = stamps(open_manifest(corpus).index)
    assert columns["audio"][7].as_py() == stamp(path) and columns.keys() == set(SIGNALS)


def test_a_manifest_that_grows_measures_what_is_new(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for signal in SIGNALS:
        measure(corpus, signal, workers=1)
    before = measured(open_manifest(corpus).index, SIGNALS)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    write_manifest(corpus, [{**rows[8], "id": "part", "offset": 0.1, "duration": 0.5}, *reversed(rows)])
    make_index(corpus)
    read: list[str] = []
    real = measuring.load_clip
    monkeypatch.setattr(measuring, "load_clip", lambda u, *args: (read.append(u.id), real(u, *args))[1])
    for signal in SIGNALS:
        measure(corpus, signal, workers=1)
    after = measured(open_manifest(corpus).index, SIGNALS)
    assert read == ["part", "part"] and before is not None and after is not None
    for signal in SIGNALS:
        assert after[signal].to_pylist()[:0:-1] == before[signal].to_pylist()


def test_shares_and_a_kill(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "RANGE", 2)
    measure(corpus, "audio", workers=1)
    index = make_index(corpus)
    whole = measured(index, ["audio"])
    assert whole is not None
    index.file("measured-{}-audio.arrow").unlink()
    measure(corpus, "audio", workers=1, share=Share(2, 3))
    assert measured(index, ["audio"]) is None
    measure(corpus, "audio", workers=1, share=Share(1, 3))

    def dies(job: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measuring, "_measure", dies)
        measure(corpus, "audio", workers=1, share=Share(3, 3))
    measure(corpus, "audio", workers=1, share=Share(3, 3))
    found = measured(index, ["audio"])
    assert found is not None and found["audio"].equals(whole["audio"])


def _dies_of_the_third(job: Any) -> None:
    """In a process of its own."""
    if job.first <= 2 < job.end:
        os.kill(os.getpid(), SIGKILL)
    measuring._measure(job)


def test_a_clip_that_crashes_its_decoder_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(corpus, "audio", workers=1)
    index = make_index(corpus)
    whole = measured(index, ["audio"])
    index.file("measured-{}-audio.arrow").unlink()
    monkeypatch.setattr(measuring, "RANGE", 4)
    monkeypatch.setattr(measuring, "_measure", _dies_of_the_third)
    measure(corpus, "audio", workers=2)
    found = measured(index, ["audio"])
    assert found is not None and whole is not None
    rows, expected = found["audio"].to_pylist(), whole["audio"].to_pylist()
    assert rows[2] == {"length": 0, "reason": "the process that read it died (exit status -9)", "stamp": ""}
    assert rows[:2] + rows[3:] == expected[:2] + expected[3:]


def test_a_truncated_table_is_measured_again(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    measure(corpus, "audio", workers=1)
    index = make_index(corpus)
    path = index.file("measured-{}-audio.arrow")
    path.write_bytes(path.read_bytes()[:300])
    assert measured(index, ["audio"]) is None and "damaged" in caplog.text
    measure(corpus, "audio", workers=1)
    assert measured(index, ["audio"]) is not None


def test_a_full_disk_is_one_line(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_index(corpus)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "x.arrow")

    monkeypatch.setattr(measuring, "write_arrow", full)
    with pytest.raises(UserError, match="cannot write to the index.*No space left"):
        measure(corpus, "audio", workers=1)
