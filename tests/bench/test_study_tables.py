"""The study's grid, and its tables over made-up rows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.config import Config
from bench.study import tables
from bench.study.grid import (
    ARMS,
    HIGH,
    INFERENCES,
    LOW,
    MAIN,
    MARGIN_SWEEP,
    MARGIN_WEIGHT,
    PAPER,
    PAPER_SWEEP,
    SEEDS,
    STARTS,
    SWEEP_SEED,
    Arm,
    arm_key,
    margin,
    paper,
)
from bench.study.interventions import KINDS
from bench.study.rows import best_weight, read_rows
from bench.study.train import config_of

pytestmark = pytest.mark.integration

UTTERANCES = 24


def made_up(arm: Arm, rate: float, peak: float = 5000.0) -> dict[str, Any]:
    random = np.random.default_rng(arm.seed)
    score = {"wer": rate, "words": 8 * UTTERANCES, "errors": random.binomial(8, rate, UTTERANCES).tolist()}
    group = {"cosine": 0.5, "sink_rate": 0.2, "sink_rate_corrected": 0.1, "massive": 0.0}
    groups = {
        "BOS": {**group, "mass": 0.6, "peak": 20000.0},
        "<audio>": {**group, "mass": 0.1, "peak": peak, "massive": 1.0},
        "speech": {**group, "mass": 0.2, "peak": 50.0},
        "text": {**group, "mass": 0.05, "peak": 50.0},
    }
    names = ("sentences", "unseen_voices", "sentences int8", *(f"massive {kind}" for kind in KINDS))
    return {
        "arm": asdict(arm),
        "key": arm.key,
        "scores": dict.fromkeys(names, score),
        "sinks": {"cos2": 0.2, "features": [["<audio>", 507]], "groups": groups},
        "validation": [[50, 2.0], [100, 1.0]],
        "curve": [{"step": 25, "grad_norm_ce": 2.0, "grad_norm_decorrelation": 1.0, "grad_cosine": 0.1}],
        "perplexity": 20.0,
    }


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = {}
    for arm in ARMS.values():
        rows[arm.key] = made_up(arm, 0.2 if arm.name.startswith("paper") else 0.4)
    for key in STARTS:
        rows[key] = {**made_up(ARMS[arm_key(key)], 0.4), "key": key}
    for key in INFERENCES:
        rows[key] = {**made_up(ARMS[arm_key(key)], 0.4), "key": key, "act_heads": [[1, 2]]}
    monkeypatch.setattr(tables, "read_rows", lambda: rows)
    monkeypatch.setattr(tables, "HERE", tmp_path)
    held = {"words": [8] * UTTERANCES, "speakers": [f"s{i % 4}" for i in range(UTTERANCES)]}
    monkeypatch.setattr(tables, "UTTERANCES", tmp_path / "utterances.json")
    tables.UTTERANCES.write_text(json.dumps({"sentences": held, "unseen_voices": held}))
    tables.write_results(tmp_path / "RESULTS.md")
    return tmp_path


def test_the_page_has_every_comparison_and_arm(page: Path) -> None:
    text = (page / "RESULTS.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| paper's form, high rate |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == "5" and cells[8] == "primary"
    assert -0.26 < float(cells[4]) < -0.14 and float(cells[6]) < 0.01
    for arm in ARMS.values():
        assert arm.full or f"| {arm.name} |" in text, arm.name
    assert "massive in 5 of 5" in text
    lines = text[text.index("## Where sinks") : text.index("## Controls")].splitlines()[4:]
    assert len([line for line in lines if line.startswith("|")]) == 12
    assert all(cell.strip() for line in lines if line for cell in line.split("|")[1:-1])
    assert (page / "curves.svg").read_text().count("<svg") == 1
    assert "lambda" in (page / "sweep.svg").read_text()


def test_every_arm_has_a_config() -> None:
    first = {arm.name: key for key, arm in reversed(ARMS.items())}  # one per name; rate and seed are shared code
    settings = {key: config_of(ARMS[key]) for key in first.values()}
    assert all(isinstance(config, Config) and config.run.endswith(key) for key, config in settings.items())
    assert settings["off-r32-s1"].model.delimiters.init == "normal:0.02"
    assert settings[f"marks-table-trained-later-r{HIGH}-s1"].model.prompts.first
    assert {arm_key(key) for key in STARTS} <= ARMS.keys()
    for arm in MAIN:
        for rate in (HIGH, LOW):
            assert all(not ARMS[Arm(arm.name, rate, seed).key].full for seed in SEEDS)


def test_the_last_row_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == {}
    path.write_text('{"key": "a", "n": 1}\n{"key": "b", "n": 2}\n{"key": "a", "n": 3}\n')
    assert read_rows(path) == {"a": {"key": "a", "n": 3}, "b": {"key": "b", "n": 2}}


@pytest.mark.parametrize(
    ("peaks", "bos", "chosen"),
    [
        ({1.0: 9000, 10.0: 400, 100.0: 300}, {}, 10.0),  # both below a tenth: the lower loss
        ({1.0: 9000, 10.0: 400, 100.0: 300}, {10.0: 900}, 100.0),  # 10 made an end of BOS
        ({1.0: 9000, 10.0: 400, 100.0: 300}, {10.0: 900, 100.0: 100}, 10.0),  # so did both
        ({1.0: 9000, 10.0: 8000, 100.0: 7000}, {}, 100.0),  # none is below
    ],
)
def test_the_best_lambda_follows_the_plan(peaks: dict[float, float], bos: dict[float, float], chosen: float) -> None:
    rows = {"off": made_up(Arm("off"), 0.4, 10_000.0)}
    for weight, peak in peaks.items():
        row = made_up(Arm("off"), 0.4, float(peak))
        row["sinks"]["groups"]["BOS"]["peak"] = bos.get(weight, 20_000.0)
        rows[str(weight)] = {**row, "validation": [[100, 1.0 + weight / 1000]]}
    arms = {weight: str(weight) for weight in peaks}
    assert best_weight(rows, "off", arms) == chosen
    assert best_weight(rows, "off", {**arms, 7.0: "missing"}) is None


def test_the_grid_uses_the_best_lambdas() -> None:
    rows = read_rows()
    off = Arm("off", seed=SWEEP_SEED).key
    for form, sweep, taken in ((paper, PAPER_SWEEP, PAPER), (margin, MARGIN_SWEEP, MARGIN_WEIGHT)):
        keys = {weight: replace(form(weight), seed=SWEEP_SEED).key for weight in sweep}
        assert best_weight(rows, off, keys) in (None, taken)
