"""Clips that vanish during a training: left out, named, and nothing else changes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from avsr.config import load_config
from avsr.data.batches import Lost, collate
from avsr.data.dataset import Reading, load_dataset
from avsr.data.manifest import Utterance, read_manifest
from avsr.errors import UserError
from avsr.models.build import build_model, build_store
from avsr.training import faults
from avsr.training.feed import StepData
from avsr.training.metrics import read_metrics
from avsr.training.trainer import Trainer

pytestmark = pytest.mark.integration
Recipe = Callable[..., Path]
Run = Callable[..., Path]
# as good as no learning: every utterance then has one loss and one gradient in all steps
STILL = {
    "data.on_bad": "skip",
    "training.learning_rate": 1e-12,
    "training.clip": 1e9,
    "training.validate_every": 100,
    "loss.decorrelation": 2.0,
}
NO_CACHE = {"data.cache": None}


@contextmanager
def watched() -> Iterator[list[list[str]]]:
    """The ids of every step that a training inside takes."""
    seen: list[list[str]] = []
    real = Trainer.step

    def step(self: Trainer, data: StepData) -> Any:
        seen.append([utterance.id for batch in data.batches for utterance in batch.utterances])
        return real(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        yield seen


@pytest.fixture
def steps() -> Iterator[list[list[str]]]:
    with watched() as seen:
        yield seen


def vanish(monkeypatch: pytest.MonkeyPatch, *clips: Path) -> None:
    """The clips disappear after everything has been read, just before the first step."""
    real = Trainer.fit

    def fit(self: Trainer) -> None:
        for clip in clips:
            clip.unlink()
        real(self)

    monkeypatch.setattr(Trainer, "fit", fit)


@pytest.fixture(scope="module")
def single(tiny_recipe: Recipe, run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The metrics of every utterance as the only one of its step."""
    settings = {"training.utterances": 1, "training.steps": 8}
    with watched() as seen:
        rows = read_metrics(run(tiny_recipe(tmp_path_factory.mktemp("single"), **STILL, **settings)))
    found = {ids[0]: row for ids, row in zip(seen, rows, strict=True)}
    assert len(found) == 8
    return found


@pytest.fixture(scope="module")
def whole(tiny_recipe: Recipe, run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The steps of two utterances each of a training that loses nothing."""
    settings = {"training.utterances": 2, "training.steps": 6}
    with watched() as seen:
        run(tiny_recipe(tmp_path_factory.mktemp("whole"), **STILL, **settings))
    return seen


def labels(tmp_path: Path, split: str = "train") -> dict[str, int]:
    rows = read_manifest(tmp_path / "corpus" / split / "manifest.jsonl")
    return {row.id: len(row.text) + 1 for row in rows}  # the tokenizer has one token a character


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (2, False), (0, True)])
def test_a_clip_that_vanishes_is_left_out_and_the_rest_stays_as_it_was(
    tiny_recipe: Recipe,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    steps: list[list[str]],
    single: dict[str, dict[str, Any]],
    whole: list[list[str]],
    workers: int,
    cache: bool,
) -> None:
    settings = {"training.utterances": 2, "training.steps": 6, "data.workers": workers}
    recipe = tiny_recipe(tmp_path, **STILL, **settings, **({} if cache else NO_CACHE))
    vanish(monkeypatch, tmp_path / "corpus" / "train" / "u003.wav")
    with caplog.at_level(logging.WARNING):
        rows = read_metrics(run(recipe))
    assert steps == [[name for name in ids if name != "u003"] for ids in whole] != whole
    count = labels(tmp_path)
    for ids, before, row in zip(steps, whole, rows, strict=True):
        total = sum(single[name]["ce"] * count[name] for name in ids)
        assert row["ce"] == pytest.approx(total / sum(count[name] for name in ids), rel=1e-4)
        assert row.get("lost") == (1 if "u003" in before else None)
    (line,) = (tmp_path / "run" / "lost.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["id"] == "u003" and entry["where"].endswith("manifest.jsonl:4") and "u003.wav" in entry["reason"]
    assert entry["step"] == 1 + next(n for n, ids in enumerate(whole) if "u003" in ids)
    assert caplog.text.count("u003 is left out") == 1


@pytest.mark.parametrize(
    ("stage", "packed", "cross_entropy"),
    [(1, False, "plain"), (3, False, "chunked"), (0, True, "plain")],
)
def test_a_micro_batch_that_loses_all_counts_for_nothing(
    tiny_recipe: Recipe,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[list[str]],
    single: dict[str, dict[str, Any]],
    stage: int,
    packed: bool,
    cross_entropy: str,
) -> None:
    """The loss and the gradient are those of the other micro-batch alone; decorrelation too."""
    settings = {"deepspeed.stage": stage, "training.packed": packed, "loss.cross_entropy": cross_entropy}
    two = {"training.utterances": 1, "training.accumulation": 2}
    recipe = tiny_recipe(tmp_path, **STILL, **settings, **two, **NO_CACHE)
    vanish(monkeypatch, tmp_path / "corpus" / "train" / "u005.wav")
    rows = read_metrics(run(recipe))
    (row,) = [row for row in rows if row.get("lost")]
    (left,) = steps[row["step"] - 1]
    for key in ("ce", "decorrelation", "loss", "accuracy", "grad_norm"):
        assert row[key] == pytest.approx(single[left][key], rel=1e-3), key
    assert row["tokens"] == single[left]["tokens"] and row["audio_seconds"] == single[left]["audio_seconds"]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_that_loses_all_is_skipped_and_too_many_of_them_end_the_training(
    tiny_recipe: Recipe,
    run: Run,
    weights: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
) -> None:
    settings = {"data.on_bad": "skip", "data.cache": None, "training.utterances": 1, "training.steps": 8}
    keep = {"training.keep_last": 8, "training.save_every": 1, "deepspeed.stage": stage}
    recipe = tiny_recipe(tmp_path, **settings, **keep)
    clips = [tmp_path / "corpus" / "train" / f"u{n:03d}.wav" for n in (2, 6)]
    contents = [clip.read_bytes() for clip in clips]
    vanish(monkeypatch, *clips)
    rows = read_metrics(run(recipe))
    gone = [row for row in rows if row.get("skipped")]
    assert len(gone) == 2 and all(row["ce"] is None and row["lost"] == 1 for row in gone)
    for row in rows[1:]:
        before, after = (weights(tmp_path / "run", f"step-{row['step'] - n:06d}") for n in (1, 0))
        assert all(torch.equal(after[name], before[name]) for name in before) == (row in gone)
    if stage == 0:
        for clip, content in zip(clips, contents, strict=True):
            clip.write_bytes(content)
        with pytest.raises(UserError, match=r"utterances: none, all its clips are lost; 2 steps so far, .* = 1"):
            run(recipe, f"run={tmp_path / 'again'}", "training.skip_nonfinite=1")


def test_validation_averages_over_what_is_left(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"training.validate_every": 1, "training.steps": 2, "training.utterances": 1}
    recipe = tiny_recipe(tmp_path, **{**STILL, **NO_CACHE, **settings})
    config = load_config(str(recipe))
    store = build_store(config, torch.device("cpu"))
    model, loaded = build_model(config, store, torch.device("cpu"))
    reading = Reading("audio")
    data = load_dataset(config.data.validation, config.data, store, loaded.tokenize, title="", reading=reading)
    with torch.no_grad():
        totals = [float(model.eval()(collate([data[i]])).cross_entropy) for i in range(4)]
    counts = list(labels(tmp_path, "validation").values())
    clips = sorted((tmp_path / "corpus" / "validation").glob("*.wav"))
    with monkeypatch.context() as patch:
        vanish(patch, clips[1])
        rows = read_metrics(run(recipe))
    left = [0, 2, 3]
    expected = sum(totals[n] for n in left) / sum(counts[n] for n in left)
    assert [row["validation_ce"] for row in rows] == pytest.approx([expected] * 2, rel=1e-4)
    assert json.loads((tmp_path / "run" / "lost.jsonl").read_text())["id"] == clips[1].stem
    vanish(monkeypatch, clips[0], *clips[2:])
    (tmp_path / "corpus" / "validation" / "u001.wav").write_bytes(clips[0].read_bytes())

    real = Trainer.validate

    def none_left(self: Trainer) -> dict[str, float]:
        clips[1].unlink(missing_ok=True)
        return real(self)

    monkeypatch.setattr(Trainer, "validate", none_left)
    folder = run(recipe, f"run={tmp_path / 'none'}")
    assert [row["validation_ce"] for row in read_metrics(folder)] == [None, None]
    assert not (folder / "checkpoints" / "best").exists()


def test_a_resumed_run_goes_on_with_its_own_batches(
    tiny_recipe: Recipe, run: Run, stop: Callable[..., int], tmp_path: Path, steps: list[list[str]]
) -> None:
    """Whatever was repaired or lost since it began: neither moves the others."""
    recipe = tiny_recipe(
        tmp_path, **{**STILL, "training.utterances": 2, "training.steps": 9, "training.validate_every": 2}
    )
    clips = tmp_path / "corpus" / "train"
    repaired = (clips / "u007.wav").read_bytes()
    (clips / "u007.wav").write_bytes(b"no sound")
    run(recipe, f"run={tmp_path / 'whole'}")
    whole = list(steps)
    steps.clear()
    assert "u007" not in {name for ids in whole for name in ids}
    stop(4, recipe)
    reached = len(steps)
    assert steps == whole[:reached]
    (clips / "u007.wav").write_bytes(repaired)
    (clips / "u002.wav").unlink()
    run(recipe, "resume=true")
    assert steps[reached:] == [[name for name in ids if name != "u002"] for ids in whole[reached:]] != whole[reached:]


@pytest.mark.parametrize("workers", [0, 1])
def test_refused_where_clips_must_be_whole_and_skipped_when_it_goes_on(
    tiny_recipe: Recipe, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    recipe = tiny_recipe(tmp_path, **{"data.cache": None, "data.workers": workers, "training.validate_every": 1})
    with monkeypatch.context() as patch:
        vanish(patch, tmp_path / "corpus" / "train" / "u003.wav")
        with pytest.raises(UserError) as caught:
            run(recipe)
    message = str(caught.value)
    assert "u003.wav" in message and "\n" not in message and "Traceback" not in message
    run(recipe, "resume=true", "data.on_bad=skip")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert all(math.isfinite(row["ce"]) for row in read_metrics(tmp_path / "run"))


def test_a_torn_list_of_lost_clips_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an earlier run of the folder; what it has whole is not written twice."""
    monkeypatch.setattr(faults.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(faults.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(faults.dist, "all_gather_object", lambda parts, own: parts.__setitem__(0, own))
    lost = [Lost(Utterance(f"u{n}", None, "x", 1.0, where=f"m\u202e.jsonl:{n}"), "audio", "gone") for n in range(3)]
    faults.LostClips(tmp_path).add(1, lost[:2])
    path = tmp_path / "lost.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    faults.LostClips(tmp_path).add(2, lost)
    assert f"{path}: line 2 is no row, left out (1 in all)" in caplog.messages
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert [(row["step"], row["id"]) for row in rows] == [(1, "u0"), (2, "u1"), (2, "u2")]
