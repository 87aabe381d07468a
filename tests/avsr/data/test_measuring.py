"""Lengths that an index keeps: the datasets are those of reading every clip, and no clip is read twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
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


def test_another_share_may_join_what_was_left_and_clear_it(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of this one's work."""
    real = measuring._measure

    def cleared(job: Any) -> None:
        shutil.rmtree(Path(job.part).parent, ignore_errors=True)
        real(job)

    monkeypatch.setattr(measuring, "RANGE", 4)
    monkeypatch.setattr(measuring, "_measure", cleared)
    measure(corpus, "audio", workers=1)
    monkeypatch.setattr(measuring, "_measure", real)
    measure(corpus, "audio", workers=1)
    found = measured(make_index(corpus), ["audio"])
    assert found is not None and len(found["audio"]) == 11


def _dies_of_the_third(job: Any) -> None:
    """In a process of its own."""
    if job.first <= 2 < job.end:
        os.kill(os.getpid(), SIGKILL)
    measuring._measure(job)


@pytest.mark.slow
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


def test_what_changes_after_a_kill_is_measured_again(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "RANGE", 2)
    measure(corpus, "audio", workers=1, share=Share(1, 2))  # stands for a whole that was stopped
    path = open_manifest(corpus).utterances[1].audio
    assert path is not None
    soundfile.write(str(path), np.sin(np.arange(5000)).astype(np.float32), 16_000)
    read: list[str] = []
    real = measuring.load_clip
    monkeypatch.setattr(measuring, "load_clip", lambda u, *args: (read.append(u.id), real(u, *args))[1])
    measure(corpus, "audio", workers=1)
    assert read == ["u001", "u002", "u003", "u006", "u007", "u010"]
    found = measured(open_manifest(corpus).index, ["audio"])
    assert found is not None and found["audio"].column("length")[1].as_py() == 5000


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


def test_a_corrected_checksum_counts(corpus: Path) -> None:
    measure(corpus, "audio", workers=1)
    path = open_manifest(corpus).utterances[5].audio
    assert path is not None
    for digest, usable in ((hashlib.sha256(path.read_bytes()).hexdigest(), True), ("cd" * 32, False)):
        change(corpus, 5, sha256=digest)
        measure(corpus, "audio", workers=1)
        found = measured(open_manifest(corpus).index, ["audio"])
        assert found is not None and (found["audio"].column("length")[5].as_py() > 0) == usable


@pytest.fixture
def load(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., SpeechDataset]:
    def load(manifest: Path, *overrides: str) -> SpeechDataset:
        config = load_config(str(tiny_recipe(tmp_path)), ["data.on_bad=skip", "data.cache=null", *overrides])
        store = build_store(config, torch.device("cpu"))
        return load_dataset(str(manifest), config.data, store, list, title="x", reading=Reading("audio"))

    return load


def test_a_repaired_file_is_found_by_the_next_start(corpus: Path, load: Callable[..., SpeechDataset]) -> None:
    rows = open_manifest(corpus).utterances
    broken, gone, good = rows[1].audio, rows[8].audio, rows[7].audio
    assert broken is not None and gone is not None and good is not None
    gone.unlink()
    make_index(corpus)
    assert {"u001", "u008"} <= load(corpus).bad.keys()
    for file, seconds in ((broken, 0.8), (gone, 0.7)):
        sound, rate = soundfile.read(str(good))
        soundfile.write(str(file), sound[: round(seconds * rate)], rate)
    found = load(corpus)
    assert not {"u001", "u008"} & found.bad.keys()
    (corpus.parent / "manifest.jsonl.index").rename(corpus.parent / "away")
    assert load(corpus).sizes.tolist() == found.sizes.tolist()


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_no_process_collects_lengths(
    make_corpus: Callable[..., Path], load: Callable[..., SpeechDataset], tmp_path: Path, index: bool, cache: bool
) -> None:
    manifest = make_corpus(tmp_path / "good")
    if index:
        measure(manifest, "audio", workers=1)
    found = load(manifest, *([f"data.cache={tmp_path / 'features'}"] if cache else []))
    assert not found._store.measured and len([found[place] for place in range(len(found))]) == 8
    assert not found._store.measured


def test_a_limit_measures_no_other_clips(
    corpus: Path, load: Callable[..., SpeechDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_index(corpus)
    monkeypatch.setattr(measuring, "load_clip", None)
    assert [u.id for u in load(corpus, "data.limit=1").utterances] == ["u000"]


def test_an_index_that_only_others_may_write(
    corpus: Path, load: Callable[..., SpeechDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(corpus)
    make_index(corpus)
    monkeypatch.setattr(os, "access", lambda *args: False)  # tests may run as root
    monkeypatch.setattr(measuring, "load_clip", None)
    assert load(corpus).bad == plain.bad


def test_a_manifest_that_changes_meanwhile_is_one_line(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring._measure
    monkeypatch.setattr(measuring, "_measure", lambda job: (change(corpus, 0, text="other"), real(job)))
    with pytest.raises(UserError, match="has changed while its clips were measured"):
        measure(corpus, "audio", workers=1)


RANK = """
import datetime, sys, types
import torch.distributed as dist
from avsr.data.index import open_manifest
from avsr.data.lengths import measure_missing
rank, manifest, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
limit = datetime.timedelta(seconds=20)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=limit)
needs = types.SimpleNamespace(reads_before=True, keeps=False, needs=frozenset({"audio"}))
index = open_manifest(manifest).index
measure_missing(index, manifest, needs, 1)
found = [None, None]
dist.all_gather_object(found, index is not None)
print(found)
"""


@pytest.mark.parametrize("both", [True, False])
def test_an_index_that_one_host_has_does_not_stop_the_ranks(corpus: Path, tmp_path: Path, both: bool) -> None:
    (corpus.parent / "manifest.jsonl.index").write_text("a file")  # stands for a read-only folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVSR_CACHE", str(tmp_path / "0"))
        make_index(corpus)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(corpus), str(tmp_path / "store")],
            env={**os.environ, "AVSR_CACHE": str(tmp_path / ("0" if both else str(rank)))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, error = rank.communicate(timeout=60)
        assert out.splitlines()[-1:] == [f"[True, {both}]"], error
