"""Manifests with bad lines and bad sound: refused before training starts, or skipped and counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from avsr.config import load_config
from avsr.data.dataset import Reading, load_dataset
from avsr.errors import UserError
from avsr.models.build import build_store

Tone = Callable[[Path, float], Path]
Refuse = Callable[..., str]
CPU = torch.device("cpu")


def read_rows(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def change_rows(manifest: Path, changes: dict[int, dict[str, Any] | str]) -> None:
    """``changes[number]`` = a whole line or new fields of line ``number`` (from 1)."""
    lines = manifest.read_text().splitlines()
    for number, change in changes.items():
        lines[number - 1] = (
            change if isinstance(change, str) else json.dumps({**json.loads(lines[number - 1]), **change})
        )
    manifest.write_text("\n".join(lines) + "\n")


# Manifests


def test_bad_lines_are_refused_up_front_and_listed(
    refuse: Refuse, one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    manifest = tmp_path / "corpus" / "train" / "manifest.jsonl"
    change_rows(manifest, {2: "{", 5: {"text": ""}, 6: {"audio": "gone.wav"}})
    message = refuse("train", recipe)
    for number in (2, 5, 6):
        assert f"{manifest}:{number}: " in message
    assert "data.on_bad=skip" in message and "3 of 8" in message


def test_bad_utterances_of_every_kind_are_refused_up_front(
    tone: Tone,
    refuse: Refuse,
    one_process: None,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(tmp_path)
    manifest = tmp_path / "corpus" / "train" / "manifest.jsonl"
    folder = manifest.parent
    tone(folder / "short.wav", 0.05)
    tone(folder / "long.wav", 200)
    (folder / "text.wav").write_text("no sound")
    soundfile.write(str(folder / "silent.wav"), np.zeros(16_000), 16_000)
    names = ["short", "long", "text", "silent", "gone"]
    change_rows(manifest, {number: {"audio": f"{name}.wav"} for number, name in enumerate(names, 1)})
    message = refuse("train", recipe)
    for number, name in enumerate(names, 1):
        assert f"{manifest}:{number}: " in message and f"{name}.wav" in message
    assert "5 of 8" in message and "0.05 s" in message and "200.00 s" in message


def test_long_lists_of_bad_lines_are_cut(
    refuse: Refuse, one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    change_rows(tmp_path / "corpus/train/manifest.jsonl", {n: {"audio": f"gone{n}.wav"} for n in range(1, 9)})
    message = refuse("train", recipe)
    assert "8 of 8" in message and "and 3 more" in message and "gone5.wav" in message and "gone6.wav" not in message


def test_a_transcript_that_is_too_long(
    refuse: Refuse, one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, **{"data.max_text_tokens": 40})
    manifest = tmp_path / "corpus/train/manifest.jsonl"
    change_rows(manifest, {3: {"text": "x" * 41}, 4: {"text": "y" * 40}})
    message = refuse("train", recipe)
    assert f"{manifest}:3: " in message and "41 tokens" in message and "data.max_text_tokens = 40" in message
    assert f"{manifest}:4" not in message


def test_a_transcript_longer_than_the_model_takes(
    refuse: Refuse, one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The tiny model has 256 positions: 34 are prompt and speech, which leaves fewer than the config allows."""
    recipe = tiny_recipe(tmp_path, **{"data.max_text_tokens": 256})
    manifest = tmp_path / "corpus/train/manifest.jsonl"
    change_rows(manifest, {3: {"text": "x" * 250}})
    message = refuse("train", recipe)
    assert f"{manifest}:3: " in message and "256" in message


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_utterance_above_the_frame_budget_is_named_before_training(
    tone: Tone,
    refuse: Refuse,
    one_process: None,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    split: str,
) -> None:
    recipe = tiny_recipe(tmp_path)
    manifest = tmp_path / "corpus" / split / "manifest.jsonl"
    tone(manifest.parent / "u001.wav", 3.0)  # 150 frames
    change_rows(manifest, {2: {"duration": 3.0}})
    message = refuse("train", recipe)
    assert f"{manifest}:2: " in message and "training.frames = 120" in message


def test_skipped_utterances_are_counted(
    tone: Tone,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load_config(str(tiny_recipe(tmp_path)), ["data.on_bad=skip", "data.max_text_tokens=30"])
    manifest = tmp_path / "corpus/train/manifest.jsonl"
    good = [row["id"] for row in read_rows(manifest)]
    tone(manifest.parent / "short.wav", 0.05)
    tone(manifest.parent / "tokenless.wav", 0.11)
    changes: dict[int, Any] = {
        1: "{",
        3: {"audio": "gone.wav"},
        4: {"audio": "short.wav"},
        6: {"text": "x" * 31},
        8: {"audio": "tokenless.wav", "duration": 0.11},
    }
    change_rows(manifest, changes)
    store = build_store(config, CPU)
    with caplog.at_level(logging.WARNING, logger="avsr"):
        dataset = load_dataset(
            str(manifest),
            config.data,
            store,
            list,
            title="x",
            reading=Reading("audio"),
            refuse=lambda frames, tokens: "short" * (frames["audio"] < 8),
        )
    assert [u.id for u in dataset.utterances] == [good[i] for i in (1, 4, 6)]
    assert dataset.skipped == 5 and len(dataset) == 3 == len(dataset.sizes)
    (record,) = caplog.records
    for number in changes:
        assert f"{manifest}:{number}: " in record.getMessage()
    assert "skipped 5 utterances" in record.getMessage()
    example = dataset[1]
    assert example.features["audio"].shape == (dataset.sizes[1], 32)
    assert example.text == list(example.utterance.text)


def test_the_limit_takes_the_first_ones(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(str(tiny_recipe(tmp_path)), ["data.limit=3"])
    dataset = load_dataset(
        config.data.train, config.data, build_store(config, CPU), list, title="x", reading=Reading("audio")
    )
    assert [u.id for u in dataset.utterances] == ["u000", "u001", "u002"] and dataset.skipped == 0


def test_skipping_everything_is_an_error(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(str(tiny_recipe(tmp_path)), ["data.on_bad=skip", "data.max_text_tokens=1"])
    with pytest.raises(UserError, match="no utterance can be used"):
        load_dataset(
            config.data.train, config.data, build_store(config, CPU), list, title="x", reading=Reading("audio")
        )
