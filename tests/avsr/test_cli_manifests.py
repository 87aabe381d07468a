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


GONE = {number: {"audio": f"gone{number}.wav"} for number in range(1, 9)}
LONG = {"audio": "3s.wav", "duration": 3.0}
BROKEN: dict[str, tuple[str, dict[int, Any], list[str], list[str]]] = {
    # what it is of: manifest, changed rows, what the message has, and what it has not
    "bad lines": (
        "train",
        {2: "{", 5: {"text": ""}, 6: {"audio": "gone.wav"}},
        ["data.on_bad=skip", "3 of 8", ":2: ", ":5: ", ":6: "],
        [],
    ),
    "bad sound": (
        "train",
        {n: {"audio": f"{name}.wav"} for n, name in enumerate(["short", "long", "text", "silent", "gone"], 1)},
        ["5 of 8", "0.05 s", "200.00 s", *(f":{n}: " for n in range(1, 6)), "text.wav", "silent.wav", "gone.wav"],
        [],
    ),
    "a long list, cut": ("train", GONE, ["8 of 8", "and 3 more", "gone5.wav"], ["gone6.wav"]),
    "a long transcript": (
        "train",
        {3: {"text": "x" * 41}, 4: {"text": "y" * 40}},
        [":3: ", "41 tokens", "data.max_text_tokens = 40"],
        [":4: "],
    ),
    "a long training clip": ("train", {2: LONG}, [":2: ", "training.frames = 120"], []),
    "a long validation clip": ("validation", {2: LONG}, [":2: ", "training.frames = 120"], []),
    "another clip than declared": (
        "train",
        {2: {"audio": "3s.wav"}, 4: {"duration": 600}, 5: {"sha256": "0" * 64}, 6: {"offset": 0.3, "duration": 0.2}},
        ["3 of 8", ":2: ", "3.00 s, but its 'duration' is 0.6 s", ":4: ", "milliseconds?", ":5: ", "sha256"],
        [":6: "],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_manifests_are_refused_before_training(
    tone: Tone, refuse_training: Refuse, tiny_recipe: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    split, changes, parts, absent = BROKEN[case]
    tiny_recipe(tmp_path)
    manifest = tmp_path / "corpus" / split / "manifest.jsonl"
    for name, seconds in (("short", 0.05), ("long", 200), ("3s", 3.0)):
        tone(manifest.parent / f"{name}.wav", seconds)
    (manifest.parent / "text.wav").write_text("no sound")
    soundfile.write(str(manifest.parent / "silent.wav"), np.zeros(16_000), 16_000)
    change_rows(manifest, changes)
    message = refuse_training("data.max_text_tokens=40")
    for part in parts:
        assert (f"{manifest}{part}" if part[0] == ":" else part) in message
    assert not any(part in message for part in absent)


def test_a_transcript_longer_than_the_model_takes(
    refuse_training: Refuse, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The tiny model has 256 positions: 34 are prompt and speech, which leaves fewer than the config allows."""
    tiny_recipe(tmp_path)
    manifest = tmp_path / "corpus/train/manifest.jsonl"
    change_rows(manifest, {3: {"text": "x" * 250}})
    message = refuse_training("data.max_text_tokens=256")
    assert f"{manifest}:3: " in message and "256" in message


def test_skipped_utterances_are_counted(
    tone: Tone, tiny_recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    assert "skipped 5 of 8 utterances" in record.getMessage()
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
