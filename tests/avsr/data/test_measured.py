"""What a line of a manifest declares, against what its files are: length, part, checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from avsr.config import AugmentConfig, DataConfig, EncoderConfig
from avsr.data import measured
from avsr.data.dataset import Reading, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance, write_manifest
from avsr.data.measured import Measured, lasting, refuse_other_length
from avsr.data.transforms import Transforms
from avsr.errors import ClipError, UserError
from avsr.models.encoders import build_encoder


def declared(duration: float, offset: float | None = None, audio: Path = Path("/c/a.wav"), **more: Any) -> Utterance:
    return Utterance("u", audio, "x", duration, where="m.jsonl:3", offset=offset, **more)


def write(path: Path, seconds: float, seed: int = 0) -> Path:
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * 16_000))
    soundfile.write(str(path), wave, 16_000, subtype="FLOAT")
    return path


@pytest.fixture
def store(tiny_whisper: Path, tmp_path: Path) -> Callable[..., FeatureStore]:
    def make(cached: bool = False, **options: Any) -> FeatureStore:
        data = DataConfig(train="t", validation="v", cache=str(tmp_path / "cache") if cached else None, **options)
        encoder = build_encoder(EncoderConfig(name=str(tiny_whisper)), "audio")
        return FeatureStore({"audio": encoder}, data, Transforms(AugmentConfig(), None, 0))

    return make


@pytest.mark.parametrize(
    ("duration", "seconds", "max_mismatch"),
    [(1, 1, 0.2), (1, 1.19, 0.2), (1, 0.81, 0.2), (16, 16.7, 0.2), (0, 5, 0.2), (1, 1.9, 1), (9, 9.4, 0)],
)
def test_small_differences_are_no_error(duration: float, seconds: float, max_mismatch: float) -> None:
    refuse_other_length(declared(duration), seconds, max_mismatch)


@pytest.mark.parametrize(
    ("duration", "seconds", "offset", "part"),
    [
        (3210.0, 3.2, None, "milliseconds?"),
        (81.0, 3.2, None, "video frames?"),
        (51_200.0, 3.2, None, "samples?"),
        (141_120.0, 3.2, None, "samples?"),
        (0.01, 3.2, None, "'offset'"),
        (4.0, 3600.0, None, "'offset'"),
        (0.6, 14.0, None, "14.00 s, but its 'duration' is 0.6 s"),
        (3.0, 1.0, 9.0, "from 9 s on, but its 'duration' is 3 s (the file ends earlier)"),
        (3.0, 2.7, None, "data.max_mismatch = 0.2 s or 5%"),
    ],
)
def test_other_lengths_are_named(duration: float, seconds: float, offset: float | None, part: str) -> None:
    with pytest.raises(UserError) as caught:
        refuse_other_length(declared(duration, offset), seconds, 0.2)
    message = str(caught.value)
    assert message.startswith("m.jsonl:3: /c/a.wav lasts ") and part in message and "\n" not in message


def test_a_length_is_of_the_longer_stream() -> None:
    assert Measured(16_000, 20).seconds == 1.0 and Measured(16_000, 30).seconds == 1.2 and lasting(0.6) == (9_600, 15)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("unit", [1000, 0.0167])
def test_a_duration_in_another_unit_is_refused_at_start(
    store: Callable[..., FeatureStore], make_corpus: Callable[..., Path], tmp_path: Path, cached: bool, unit: float
) -> None:
    """From the cache too, where no file is read."""
    manifest = make_corpus(tmp_path / "corpus", count=3)
    options: dict[str, Any] = {"title": "x", "reading": Reading("audio")}
    config = DataConfig(train="t", validation="v")
    assert load_dataset(str(manifest), config, store(cached), lambda text: [1], **options).sizes.tolist() == [30] * 3
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[1]["duration"] *= unit
    write_manifest(manifest, rows)
    with pytest.raises(
        UserError, match=r"1 of 3 utterances[^\n]*\n  .*:2: .*u001.wav lasts 0.60 s, but its 'duration'"
    ):
        load_dataset(str(manifest), config, store(cached), lambda text: [1], **options)


@pytest.mark.parametrize("options", [{}, {"verify": False}, {"cached": True}])
def test_a_clip_that_grew_is_lost_while_loading(
    store: Callable[..., FeatureStore], tmp_path: Path, options: dict[str, bool]
) -> None:
    made, row = store(**options), declared(0.6, audio=write(tmp_path / "a.wav", 0.6))
    assert made.prepare([row], title="x", shown=False) == {} and len(made.load(row)["audio"])
    assert made.measured["u"] == Measured(9_600, 0) or not options.get("verify", True)
    write(tmp_path / "a.wav", 14)
    with pytest.raises(ClipError, match=r"m.jsonl:3: .*a.wav lasts 14.00 s, but its 'duration' is 0.6 s"):
        made.load(row)


def test_the_parts_of_a_long_file_are_their_own_clips(store: Callable[..., FeatureStore], tmp_path: Path) -> None:
    path = write(tmp_path / "long.wav", 40)  # longer than any clip may be
    rows = [replace(declared(1.5, offset, path), id=f"u{offset:g}") for offset in (0.0, 1.5, 20.0, 38.5)]
    plain, cached = store(), store(cached=True)
    for made in (plain, cached):
        assert made.prepare(rows, title="x", shown=False) == {}
        assert [made.measured[row.id] for row in rows] == [(24_000, 0)] * 4
        assert [made.frames(row)["audio"] for row in rows] == [75] * 4
    assert [store(cached=True).seconds(row) for row in rows] == [1.5] * 4  # by their features alone
    found = [cached.load(row)["audio"] for row in rows]
    assert not any(torch.equal(found[0], other) for other in found[1:])
    wave = soundfile.read(str(path), dtype="float32")[0]
    soundfile.write(str(tmp_path / "part.wav"), wave[320_000:344_000], 16_000, subtype="FLOAT")
    same = plain.load(declared(1.5, audio=tmp_path / "part.wav"))["audio"]
    assert torch.equal(plain.load(rows[2])["audio"], same)
    bad = [replace(declared(3.0, 38.5, path), id="late"), replace(declared(1.5, 40.0, path), id="gone")]
    reasons = plain.prepare(bad, title="x", shown=False)
    assert "lasts 1.50 s from 38.5 s on, but its 'duration' is 3 s" in reasons["late"]
    assert "lasts 40.00 s, and the 'offset' is 40 s" in reasons["gone"]


def test_cache_files_of_whole_clips_keep_their_names(store: Callable[..., FeatureStore], tmp_path: Path) -> None:
    """Features that were computed before parts could be named are still found."""
    path = write(tmp_path / "a.wav", 0.6)
    store(cached=True).load(declared(0.6, audio=path))
    stat = path.stat()
    key = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns} ['audio']".encode()).hexdigest()
    (found,) = (tmp_path / "cache").rglob("*.npy")
    assert (found.parent.name, found.stem) == (key[:2], key[2:34])


def test_a_file_that_is_not_the_one_of_the_manifest(store: Callable[..., FeatureStore], tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 0.6)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    made = store()
    for given in ("", right, right.upper()):
        assert made.prepare([declared(0.6, audio=path, sha256=given)], title="x", shown=False) == {}
    os.utime(path, ns=(0, 0))
    write(path, 0.6, seed=1)  # as long, and as large
    row = declared(0.6, audio=path, sha256=right)
    reason = made.prepare([row], title="x", shown=False)["u"]
    assert reason.startswith(f"m.jsonl:3: {path} is not the file") and right[:12] in reason
    with pytest.raises(ClipError, match="sha256"):
        made.load(row)


def test_a_long_file_is_summed_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", 3)
    right, calls = hashlib.sha256(path.read_bytes()).hexdigest(), []
    monkeypatch.setattr(measured, "sha256_of", lambda path: calls.append(path) or right)
    for offset in range(3):
        measured.refuse_other_content(declared(1.0, offset, path, sha256=right), {"audio"})
    assert calls == [path]
