"""The study's corpus: open-vocabulary sentences in eight synthetic voices, audio only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from avsr.data.rates import SAMPLE_RATE

FOLDER = Path("data/study")
OPEN = FOLDER / "open"
OPTIONS = ["grid=0", "open=9000", "validation=100", "test=250", "video=0"]
FRAME = 320 / SAMPLE_RATE  # seconds, of Whisper's encoder
TUNING = 4000  # utterances of the trainings; the others pretrain the projector
SETS = {"sentences": OPEN / "test_sentences.jsonl", "unseen_voices": OPEN / "test_voices.jsonl"}

OVERRIDES = [
    f"data.train={OPEN / 'tuning.jsonl'}",
    f"data.validation={OPEN / 'validation.jsonl'}",
    "data.test={" + ", ".join(f"{name}: {path}" for name, path in SETS.items()) + "}",
]


def make_corpus() -> None:
    """Synthesizes the corpus unless it exists, and splits its training set."""
    subprocess.run([sys.executable, "-m", "avsr.cli", "synth", str(FOLDER), *OPTIONS], check=True)
    lines = (OPEN / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (OPEN / "tuning.jsonl").write_text("".join(lines[:TUNING]), encoding="utf-8")
    (OPEN / "warm.jsonl").write_text("".join(lines[TUNING:]), encoding="utf-8")


def warm(rate: int) -> Path:
    """The manifest that the projector of a rate is taught on: of the utterances that have a token there."""
    path, shortest = OPEN / "warm.jsonl", rate * FRAME
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    long = [line for line in lines if json.loads(line)["duration"] >= shortest]
    if len(long) == len(lines):
        return path
    path = OPEN / f"warm-{rate}.jsonl"
    path.write_text("".join(long), encoding="utf-8")
    return path
