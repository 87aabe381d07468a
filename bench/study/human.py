"""The corpus of the settled study: acted human dialogue to train on; tests on it, on prompts, on synthetic sentences.

All manifests are in one folder, with the paths of both corpora below it. Clips that are shorter than a token of the
highest rate are in none.
"""

from __future__ import annotations

import json
from pathlib import Path

from avsr.data.manifest import write_manifest
from avsr.tools.corpora.debian.corpus import prepare_debian
from bench.study import corpus

FOLDER = Path("data")
HUMAN = FOLDER / "debian"
SHORTEST = 64 * corpus.FRAME  # seconds: a token of rate 64

TESTS = {
    "texts": HUMAN / "test_texts.jsonl",
    "roles": HUMAN / "test_roles.jsonl",
    "prompts": HUMAN / "test_prompts.jsonl",
    "synthetic": corpus.SETS["sentences"],
}
OVERRIDES = [
    f"data.train={FOLDER / 'settled_train.jsonl'}",
    f"data.validation={FOLDER / 'settled_validation.jsonl'}",
    "data.test={" + ", ".join(f"{name}: {FOLDER / f'settled_{name}.jsonl'}" for name in TESTS) + "}",
]


def make_corpus() -> None:
    """Makes both corpora unless they exist, and the study's manifests."""
    corpus.make_corpus()
    prepare_debian(HUMAN)
    training = {name: HUMAN / f"{name}.jsonl" for name in ("train", "validation")}
    for name, manifest in {**training, **TESTS}.items():
        _write(name, manifest)


def _write(name: str, manifest: Path) -> None:
    rows = []
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["duration"] >= SHORTEST:
            below = manifest.parent.relative_to(FOLDER)
            paths = {key: str(below / row[key]) for key in ("audio", "times") if key in row}
            rows.append({**row, **paths})
    write_manifest(FOLDER / f"settled_{name}.jsonl", rows)
