"""The feature cache: the same numbers with and without it, and clips that cannot be used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file

from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance
from avsr.errors import ClipError, UserError
from avsr.runtime import folders


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_cached_and_uncached_features_are_the_same_numbers(
    store: Callable[..., FeatureStore], corpus: list[Utterance], tmp_path: Path
) -> None:
    cached, plain = store(batch=4), store(None, batch=4)
    assert cached.prepare(corpus, title="x", shown=False) == {} == plain.prepare(corpus, title="x", shown=False)
    (shard,) = files(tmp_path / "cache")
    assert len(load_file(str(shard))) == len(corpus)
    for utterance in corpus:
        one, two = cached.sound(utterance), plain.sound(utterance)
        assert one.dtype == two.dtype == torch.float32 and one.shape[1] == cached.widths["audio"] == 32
        assert torch.equal(one, two)
        assert torch.equal(one, one.half().float())
        assert one.std() > 0.01
    assert not torch.equal(cached.sound(corpus[0]), cached.sound(corpus[4]))  # same length, another tone


def test_features_do_not_depend_on_the_others_of_a_batch(
    store: Callable[..., FeatureStore], corpus: list[Utterance], tmp_path: Path
) -> None:
    alone, together = store(tmp_path / "one", batch=1), store(tmp_path / "many", batch=6)
    for part in (alone, together):
        part.prepare(corpus, title="x", shown=False)
    for utterance in corpus:
        assert (alone.sound(utterance) - together.sound(utterance)).abs().max() < 4e-3  # float16 steps


def test_frames_are_one_for_every_20_ms_begun(store: Callable[..., FeatureStore], corpus: list[Utterance]) -> None:
    cached = store()
    cached.prepare(corpus, title="x", shown=False)
    for utterance in corpus:
        samples = soundfile.info(str(utterance.audio)).frames
        assert cached.count(utterance) == -(-samples // 320) == cached.sound(utterance).shape[0]


def test_frames_without_a_cache_are_those_of_the_features(
    store: Callable[..., FeatureStore], corpus: list[Utterance]
) -> None:
    plain = store(None)
    plain.prepare(corpus, title="x", shown=False)
    assert [plain.count(u) for u in corpus] == [plain.sound(u).shape[0] for u in corpus]


def test_a_wrong_duration_in_the_manifest_does_not_break_the_frame_budget(
    store: Callable[..., FeatureStore], corpus: list[Utterance]
) -> None:
    """Without a cache too: an utterance is refused, or its frames are those of the file."""
    wrong = Utterance(id="w", audio=corpus[2].audio, text="x", duration=0.3, where="m:1")
    plain = store(None)
    if not plain.prepare([wrong], title="x", shown=False):
        assert plain.count(wrong) == plain.sound(wrong).shape[0]


def test_a_cache_hit_does_not_encode(
    store: Callable[..., FeatureStore], corpus: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store()
    first.prepare(corpus, title="x", shown=False)
    kept = [first.sound(u) for u in corpus]
    second = store()
    second.forbid_encoding(monkeypatch)
    assert second.prepare(corpus, title="x", shown=False) == {}
    assert all(torch.equal(a, second.sound(u)) for a, u in zip(kept, corpus, strict=True))


@pytest.mark.parametrize("seconds", [0.6, 0.8])
def test_a_changed_file_is_encoded_anew(
    store: Callable[..., FeatureStore], corpus: list[Utterance], seconds: float
) -> None:
    made = store()
    before = made.sound(corpus[0])
    old = corpus[0].audio.stat()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * 16_000)).astype(np.float32)
    soundfile.write(str(corpus[0].audio), noise, 16_000, subtype="PCM_16")
    os.utime(corpus[0].audio, ns=(old.st_atime_ns, old.st_mtime_ns + (1000 if seconds == 0.6 else 0)))
    after = store().sound(replace(corpus[0], duration=seconds))
    assert after.shape[0] == round(seconds * 50)
    assert after.shape != before.shape or not torch.equal(after, before)


def test_options_of_the_encoder_have_their_own_cache(
    store: Callable[..., FeatureStore], corpus: list[Utterance], tmp_path: Path
) -> None:
    short, padded = store(), store(pad_to_30s=True)
    one, two = short.sound(corpus[0]), padded.sound(corpus[0])
    assert one.shape == two.shape and not torch.equal(one, two)
    assert len({path.relative_to(tmp_path / "cache").parts[0] for path in files(tmp_path / "cache")}) == 2


def make_wave(path: Path, samples: np.ndarray, **options: Any) -> Utterance:
    soundfile.write(str(path), samples.astype(np.float32), 16_000, **options)
    seconds = len(samples) / 16_000
    return Utterance(id=path.stem, audio=path, text="x", duration=seconds, where=f"m.jsonl:{path.stem}")


@pytest.mark.parametrize("cache", ["", None])
def test_unusable_clips_come_back_with_their_reasons(
    store: Callable[..., FeatureStore], corpus: list[Utterance], tmp_path: Path, cache: str | None
) -> None:
    tone = np.sin(np.arange(16_000) / 10)
    broken = tone.copy()
    broken[7] = np.nan
    (tmp_path / "text.wav").write_text("no sound")
    bad = {
        "0.05 s": make_wave(tmp_path / "short.wav", tone[:800]),
        "200.00 s": make_wave(tmp_path / "long.wav", np.tile(tone, 200)),
        "30.02 s": make_wave(tmp_path / "over.wav", np.tile(tone, 31)[: 30 * 16_000 + 320]),
        "NaN": make_wave(tmp_path / "nan.wav", broken, subtype="FLOAT"),
        "silent": make_wave(tmp_path / "silent.wav", 0 * tone),
        "not a readable": Utterance(id="text", audio=tmp_path / "text.wav", text="x", duration=1, where="m.jsonl:t"),
        "no file": Utterance(id="gone", audio=tmp_path / "gone.wav", text="x", duration=1.0, where="m.jsonl:g"),
    }
    made = store(cache)
    mixed = [corpus[0], *bad.values(), corpus[1]]
    reasons = made.prepare(mixed, title="x", shown=False)
    assert list(reasons) == [u.id for u in bad.values()]
    for part, utterance in bad.items():
        reason = reasons[utterance.id]
        assert part in reason and reason.startswith(f"{utterance.where}: ") and str(utterance.audio) in reason
        with pytest.raises(UserError) as caught:
            made.sound(utterance)
        assert str(caught.value) == reason
    for name in ("short", "long", "over"):
        assert "data.min_seconds" in reasons[name] and "0.1 to 30 s" in reasons[name]
    assert made.sound(corpus[1]).shape[0] == 13


def test_the_limits_come_from_the_config(store: Callable[..., FeatureStore], tmp_path: Path) -> None:
    tone = np.sin(np.arange(16_000) / 10)
    short = make_wave(tmp_path / "short.wav", tone[:800])
    assert store(min_seconds=0.01).prepare([short], title="x", shown=False) == {}
    reasons = store(None, max_seconds=0.02, min_seconds=0.0).prepare([short], title="x", shown=False)
    assert "0 to 0.02 s" in reasons["short"]
    longer = make_wave(tmp_path / "longer.wav", np.tile(tone, 40))  # the encoder has positions for 30 s
    assert "30 s" in store(max_seconds=60.0).prepare([longer], title="x", shown=False)["longer"]


def test_a_progress_bar_counts_the_unusable(
    store: Callable[..., FeatureStore], corpus: list[Utterance], capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Utterance(id="gone", audio=Path("/nowhere/gone.wav"), text="x", duration=1.0)
    store().prepare([*corpus, gone], title="read train")
    shown = capsys.readouterr().err
    assert "read train" in shown and f"{len(corpus) + 1}/{len(corpus) + 1}" in shown and "1 unusable" in shown


def test_a_cache_below_a_file(store: Callable[..., FeatureStore], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        store(tmp_path / "file" / "cache")
    assert "data.cache" in str(caught.value) and str(tmp_path / "file") in str(caught.value)


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    store: Callable[..., FeatureStore], corpus: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    made = store()
    monkeypatch.setattr(folders, "_write_flushed", full)
    for fill in (lambda: made.prepare(corpus, title="x", shown=False), lambda: made.sound(corpus[0])):
        with pytest.raises(UserError) as caught:
            fill()
        assert "data.cache" in str(caught.value) and "No space left" in str(caught.value)
        assert "\n" not in str(caught.value) and files(tmp_path / "cache") == []


def test_features_that_float16_cannot_hold_make_a_bad_utterance(
    store: Callable[..., FeatureStore], corpus: list[Utterance], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = store()
    real = made.encoders["audio"].run
    monkeypatch.setattr(made.encoders["audio"], "run", lambda rows: [1e6 * row for row in real(rows)])
    reasons = made.prepare(corpus[:1], title="x", shown=False)
    assert "not finite in float16" in reasons[corpus[0].id] and str(corpus[0].audio) in reasons[corpus[0].id]
    with pytest.raises(ClipError, match="not finite in float16"):
        made.sound(corpus[0])
    assert files(tmp_path / "cache") == []


def test_features_are_on_the_disk_before_they_get_their_name(
    store: Callable[..., FeatureStore], corpus: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    store().sound(corpus[0])
    assert done == ["fsync", "replace"]
