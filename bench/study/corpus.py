"""The study's corpus: open-vocabulary sentences in eight synthetic voices, audio only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path("data/study")
OPEN = FOLDER / "open"
OPTIONS = ["grid=0", "open=9000", "validation=100", "test=250", "video=0"]
TUNING = 4000  # utterances of the trainings; the others pretrain the projector
SETS = {"sentences": OPEN / "test_sentences.jsonl", "unseen_voices": OPEN / "test_voices.jsonl"}

OVERRIDES = [
    f"data.train={OPEN / 'tuning.jsonl'}",
    f"data.validation={OPEN / 'validation.jsonl'}",
    "data.test={" + ", ".join(f"{name}: {path}" for name, path in SETS.items()) + "}",
]
WARM = [f"data.train={OPEN / 'warm.jsonl'}"]


def make_corpus() -> None:
    """Synthesizes the corpus unless it exists, and splits its training set."""
    subprocess.run([sys.executable, "-m", "avsr.cli", "synth", str(FOLDER), *OPTIONS], check=True)
    lines = (OPEN / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (OPEN / "tuning.jsonl").write_text("".join(lines[:TUNING]), encoding="utf-8")
    (OPEN / "warm.jsonl").write_text("".join(lines[TUNING:]), encoding="utf-8")
