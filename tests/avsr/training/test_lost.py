"""Clips that vanish while a training goes on: left out, named, and nothing else changes."""

from __future__ import annotations

import json
import logging
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from avsr.config import load_config
from avsr.data.batches import Batch
from avsr.data.manifest import read_manifest
from avsr.errors import Interrupted, UserError
from avsr.training.metrics import MetricsLogger, read_metrics
from avsr.training.run import train
from avsr.training.trainer import Trainer

Recipe = Callable[..., Path]
# as good as no learning: every utterance then has one loss and one gradient in all steps
STILL = {"data.on_bad": "skip", "training.learning_rate": 1e-12, "training.clip": 1e9, "training.validate_every": 100}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of every step that any training of the test takes."""
    seen: list[list[str]] = []
    real = Trainer.step

    def step(self: Trainer, batches: list[Batch]) -> Any:
        seen.append([utterance.id for batch in batches for utterance in batch.utterances])
        return real(self, batches)

    monkeypatch.setattr(Trainer, "step", step)
    return seen


def run(recipe: Path, *overrides: str) -> Path:
    return train(load_config(str(recipe), list(overrides)))


def vanish(monkeypatch: pytest.MonkeyPatch, *clips: Path) -> None:
    """The clips go when everything is read and the first step is about to be taken."""
    real = Trainer.fit

    def fit(self: Trainer) -> None:
        for clip in clips:
            clip.unlink()
        real(self)

    monkeypatch.setattr(Trainer, "fit", fit)


def alone(recipe: Path, folder: Path, steps: list[list[str]], *overrides: str) -> dict[str, dict[str, Any]]:
    """The metrics of every utterance as the only one of its step."""
    rows = read_metrics(run(recipe, f"run={folder}", "training.utterances=1", "training.steps=8", *overrides))
    found = {ids[0]: row for ids, row in zip(steps, rows, strict=True)}
    assert len(found) == 8
    steps.clear()
    return found


def labels(tmp_path: Path) -> dict[str, int]:
    rows = read_manifest(tmp_path / "corpus" / "train" / "manifest.jsonl")
    return {row.id: len(row.text) + 1 for row in rows}  # the tokenizer has one token a character


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (2, False), (0, True)])
def test_a_clip_that_vanishes_is_left_out_and_the_rest_stays_as_it_was(
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    steps: list[list[str]],
    workers: int,
    cache: bool,
) -> None:
    settings = {"training.utterances": 2, "training.steps": 6, "data.workers": workers}
    recipe = tiny_recipe(tmp_path, **STILL, **settings, **({} if cache else {"data.cache": None}))
    single = alone(recipe, tmp_path / "single", steps)
    run(recipe, f"run={tmp_path / 'whole'}")
    whole = list(steps)
    steps.clear()
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[list[str]],
    stage: int,
    packed: bool,
    cross_entropy: str,
) -> None:
    """The loss and the gradient are those of the other micro-batch alone; decorrelation too."""
    settings = {"loss.decorrelation": 2.0, "deepspeed.stage": stage, "training.packed": packed}
    recipe = tiny_recipe(tmp_path, **STILL, **settings, **{"loss.cross_entropy": cross_entropy})
    single = alone(recipe, tmp_path / "single", steps)
    vanish(monkeypatch, tmp_path / "corpus" / "train" / "u005.wav")
    two = ["training.utterances=1", "training.accumulation=2", "data.cache=null"]
    rows = read_metrics(run(recipe, *two))
    (row,) = [row for row in rows if row.get("lost")]
    (left,) = steps[row["step"] - 1]
    for key in ("ce", "decorrelation", "loss", "accuracy", "grad_norm"):
        assert row[key] == pytest.approx(single[left][key], rel=1e-3), key
    assert row["tokens"] == single[left]["tokens"] and row["audio_seconds"] == single[left]["audio_seconds"]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_that_loses_all_is_skipped_and_too_many_of_them_end_the_training(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
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

    def saved(step: int) -> dict[str, torch.Tensor]:
        return load_file(str(tmp_path / f"run/checkpoints/step-{step:06d}/model.safetensors"))

    for row in rows[1:]:
        before, after = saved(row["step"] - 1), saved(row["step"])
        assert all(torch.equal(after[name], before[name]) for name in before) == (row in gone)
    for clip, content in zip(clips, contents, strict=True):
        clip.write_bytes(content)
    with pytest.raises(UserError, match=r"utterances: none, all its clips are lost; 2 steps so far, .* = 1"):
        run(recipe, f"run={tmp_path / 'again'}", "training.skip_nonfinite=1")


def test_validation_averages_over_what_is_left(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"data.cache": None, "training.validate_every": 1, "training.steps": 2, "training.utterances": 1}
    recipe = tiny_recipe(tmp_path, **{**STILL, **settings})
    clips = sorted((tmp_path / "corpus" / "validation").glob("*.wav"))
    names = [json.loads(line) for line in (tmp_path / "corpus/validation/manifest.jsonl").read_text().splitlines()]
    totals, counts = [], []
    for number, row in enumerate(names):  # each as the only one
        one = tmp_path / "corpus" / "validation" / f"only{number}.jsonl"
        one.write_text(json.dumps(row) + "\n")
        found = read_metrics(run(recipe, f"run={tmp_path / str(number)}", f"data.validation={one}"))
        counts.append(len(row["text"]) + 1)
        totals.append(found[0]["validation_ce"] * counts[-1])
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
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[list[str]]
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
    write = MetricsLogger.write

    def write_and_stop(self: MetricsLogger, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "write", write_and_stop)
        with pytest.raises(Interrupted):
            run(recipe)
    reached = len(steps)
    assert 4 <= reached < 9 and steps == whole[:reached]
    (clips / "u007.wav").write_bytes(repaired)
    (clips / "u002.wav").unlink()
    run(recipe, "resume=true")
    assert steps[reached:] == [[name for name in ids if name != "u002"] for ids in whole[reached:]] != whole[reached:]


def test_a_resumed_run_needs_the_lines_of_its_manifest(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    run(recipe)
    manifest = tmp_path / "corpus" / "train" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match=r"^resume: .*manifest\.jsonl lacks 1 utterances .* \(u007\); restore"):
        run(recipe, "resume=true")


@pytest.mark.parametrize("workers", [0, 1])
def test_refused_where_clips_must_be_whole_and_skipped_when_it_goes_on(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
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
