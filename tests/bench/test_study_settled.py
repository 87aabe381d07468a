"""The settled study: its grid, corpus and tables over made-up rows."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.data.manifest import write_manifest
from avsr.errors import UserError
from bench.study import human, recognize, settled, settled_tables
from bench.study.grid import INFERENCE, SEEDS, Arm, arm_key
from bench.study.measure import arm_of
from bench.study.statistics import compare
from bench.study.train import config_of

pytestmark = pytest.mark.integration

UTTERANCES, WORDS = 24, 8
LOWER = [settled.CORE[1], settled.ANCHORED]  # the arms of rate 8
RATES = {settled.OFF.name: 0.4, settled.ANCHORED.name: 0.2}  # of the others 0.4


def group(peak: float, massive: float = 0.0) -> dict[str, float]:
    return {"cosine": 0.5, "sink_rate": 0.2, "sink_rate_corrected": 0.1, "mass": 0.1, "peak": peak, "massive": massive}


def made_up(arm: Arm) -> dict[str, Any]:
    random = np.random.default_rng(arm.seed)
    rate = RATES.get(arm.name, 0.4)
    score = {
        "wer": rate,
        "words": WORDS * UTTERANCES,
        "errors": random.binomial(WORDS, rate, UTTERANCES).tolist(),
    }
    off = arm.name == settled.OFF.name
    groups = {
        "BOS": group(20_000.0, 1.0),
        "<audio>": group(10_000.0 if off else 500.0, float(off)),
        "text": group(50.0),
    }
    return {
        "key": arm.key,
        "scores": dict.fromkeys(human.TESTS, score),
        "sinks": {"cos2": 0.2, "features": [], "groups": groups},
        "validation": [[200, 3.0], [400, 2.5]],
        "perplexity": 20.0,
    }


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    made = {arm.key: made_up(arm) for arm in settled.ARMS.values()}
    made |= {key: {**made_up(arm_of(key)), "key": key} for key in settled.INFERENCES}
    held = {"words": [WORDS] * UTTERANCES, "speakers": [f"s{i % 4}" for i in range(UTTERANCES)]}
    path = tmp_path / "utterances.json"
    path.write_text(json.dumps({f"settled {name}": held for name in human.TESTS}))
    monkeypatch.setattr(settled_tables, "UTTERANCES", path)
    monkeypatch.setattr(settled_tables, "read_rows", lambda: made)
    monkeypatch.setattr(settled_tables, "compare", functools.partial(compare, draws=2000))
    return made


def test_every_arm_has_a_config_of_its_own() -> None:
    first = {(arm.name, arm.rate): key for key, arm in reversed(settled.ARMS.items())}  # the seed is shared code
    configs = {key: config_of(settled.ARMS[key]) for key in first.values()}
    assert len({config.run for config in configs.values()}) == len(configs)
    for key, config in configs.items():
        arm = settled.ARMS[key]
        steps = settled.STEPS * (2 if arm in settled.DOUBLED else 1)
        assert arm_of(key) is arm and config.training.steps == steps and config.training.decay == 0.2
        assert config.model.audio.compression.rate == arm.rate and config.model.projector.layernorm is arm.layernorm
        assert list(config.data.test) == list(human.TESTS) and config.training.packed
        assert (config.loss.decorrelation, config.loss.anchor) == (arm.weight, arm.anchor)
    core = [arm for arm in settled.ARMS.values() if arm.rate == 32]
    seeds = {name: [arm.seed for arm in core if arm.name == name] for name in RATES}
    assert all(sorted(found) == [*SEEDS, settled.SWEEP_SEED] for found in seeds.values())
    assert {arm_key(key) for key in settled.INFERENCES} <= settled.ARMS.keys()


def test_a_short_and_a_settled_arm_of_one_name_are_two_rows() -> None:
    short, long = Arm("off"), replace(Arm("off"), settled=True)
    assert short.key != long.key and arm_key(INFERENCE + long.key) == long.key
    assert config_of(short).data.train != config_of(long).data.train


def test_the_comparisons_are_those_of_the_plan(rows: dict[str, dict[str, Any]]) -> None:
    found = settled_tables.comparisons(rows)
    assert (found[0].name, found[0].test) == (settled_tables.NAMES[settled_tables.PAPER.name], "texts")
    assert len(found) == len({(one.name, one.test) for one in found}) == 4 * len(human.TESTS) + 1 + 2
    assert [one.name for one in found[-2:]] == [f"{settled_tables.NAMES[a.name]}, rate 8" for a in LOWER]
    assert [one.seeds for one in found[-2:]] == [one.planned for one in found[-2:]] == [3, 3]
    table = settled_tables.comparison_table(found).splitlines()
    anchored = next(line for line in table if "anchored" in line and "| texts |" in line).split("|")
    assert -0.26 < float(anchored[6]) < -0.14 and float(anchored[9]) < 0.05  # difference, and p after Holm
    assert "primary" in table[2] and float(table[2].split("|")[6]) == 0.0


def test_nothing_is_corrected_or_tested_before_all_seeds_are_in(rows: dict[str, dict[str, Any]]) -> None:
    part = {key: row for key, row in rows.items() if arm_of(key).seed in (1, settled.SWEEP_SEED)}
    found = settled_tables.comparisons(part)
    assert {one.seeds for one in found} == {1}
    for line in settled_tables.comparison_table(found).splitlines()[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[2] == "1" and cells[5] != "" and cells[6:] in (["", "", "", ""], ["", "", "primary", ""])
    assert {one.seeds for one in settled_tables.comparisons({})} == {0}
    assert settled_tables.comparison_table(settled_tables.comparisons({})).count("\n") == len(found) + 2


def test_rates_are_compared_with_off_of_the_same_rate(rows: dict[str, dict[str, Any]]) -> None:
    for key, row in rows.items():
        if arm_of(key).rate == 16 and arm_of(key).name != settled.OFF.name:
            row["scores"]["texts"] = {**row["scores"]["texts"], "errors": [0] * UTTERANCES}
    del rows["settled off-r4-s2"]
    lines = settled_tables.rate_table(settled_tables.rate_comparisons(rows)).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [line[:2] for line in cells] == [
        ["4", "2 of 3"], ["8", "3 of 3"], ["16", "3 of 3"], ["32", "5 of 5"], ["64", "3 of 3"]
    ]  # fmt: skip
    assert [line[4] for line in cells if line[0] != "16"] == ["+0.000"] * 4
    assert cells[2][3] == "0.000" and float(cells[2][4]) == -float(cells[2][2])


def test_settled_is_what_moves_less_than_the_interval(rows: dict[str, dict[str, Any]]) -> None:
    primary = settled_tables.comparisons(rows)[3]  # the first one here whose seeds differ
    assert primary.difference is not None
    width = primary.difference.high - primary.difference.low
    for moved, answer in ((0.9 * width, "yes"), (1.1 * width, "no")):
        held = rows[settled.DOUBLED[1].key]["scores"]
        rows[settled.DOUBLED[1].key]["scores"] = {**held, "texts": {**held["texts"], "wer": 0.4 + moved}}
        assert settled_tables.doubled_table(rows, primary).splitlines()[-1].endswith(f"| {answer} |")
    del rows[settled.DOUBLED[0].key]
    assert settled_tables.doubled_table(rows, primary).splitlines()[-1] == "| 1600 |  |  |  |  |"


@pytest.mark.parametrize(
    ("audio", "bos", "expected"),
    [(999.0, 20_000.0, True), (1001.0, 20_000.0, False), (500.0, 9_999.0, False), (500.0, 10_001.0, True)],
)
def test_removal_is_judged_by_marks_and_bos(audio: float, bos: float, expected: bool) -> None:
    off = made_up(settled.OFF)
    on = made_up(settled.ANCHORED)
    on["sinks"]["groups"] |= {"<audio>": group(audio), "BOS": group(bos), "text": group(1e6)}
    assert settled_tables.removed(on, off) is expected


def test_the_page_has_every_arm_and_its_figures(rows: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    settled_tables.write_settled(tmp_path / "SETTLED.md")
    text = (tmp_path / "SETTLED.md").read_text()
    assert all(text.count(f"| {name} |") >= 2 for name in list(settled_tables.NAMES.values())[:-1])
    for weight in settled.PAPER_SWEEP:
        assert f"paper's form, lambda {weight:g}" in text
    removal = text[text.index("## Are the sinks") : text.index("## Sweep")]
    assert removal.count("| 5 | 5 |") == 4
    fragile = text[text.index("## A fragile") :].splitlines()
    assert [line.count("0.400") for line in fragile if "e-" in line or "0.00" in line] == [2] * 6
    for name in ("settled-curves.svg", "settled-differences.svg", "settled-rates.svg"):
        assert (tmp_path / name).read_text().count("<svg") == 1


def test_clips_below_a_token_of_the_highest_rate_are_in_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(human, "FOLDER", tmp_path)
    lines = [
        {"id": str(n), "audio": f"clips/{n}.wav", "text": "a", "duration": seconds}
        for n, seconds in enumerate((1.2799, human.SHORTEST, 5.0))
    ]
    (tmp_path / "debian").mkdir()
    write_manifest(tmp_path / "debian" / "test.jsonl", lines)
    human._write("texts", tmp_path / "debian" / "test.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "settled_texts.jsonl").read_text().splitlines()]
    assert [(row["id"], row["audio"]) for row in kept] == [("1", "debian/clips/1.wav"), ("2", "debian/clips/2.wav")]


def test_another_whisper_than_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recognize, "resolve", lambda name: tmp_path / name.rpartition("/")[2])
    for name in recognize.BASE:
        (tmp_path / name.rpartition("/")[2]).write_bytes(b"another")
    with pytest.raises(UserError, match="not the known Whisper-base: pip install"):
        recognize.base_folder()
    assert not list((tmp_path / "cache").rglob("model.bin"))
