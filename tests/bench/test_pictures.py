"""Tables and pictures of the README, from made-up runs."""

from __future__ import annotations

import json
import re

import pytest

from bench import pictures, svg
from bench.runner.ledger import RESULTS


def test_the_demos_table_and_picture(tmp_path, capsys):
    summary = {key.format(name): 0.5 for _, key, _ in pictures.ROWS for name in ("off", "on")}
    summary["wer_on_unseen_voices"] = None
    layers = {"groups": {"BOS": {"max_abs": [1.0, 100.0, 10.0]}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "analysis.json").write_text(json.dumps({"off": layers, "on": layers}))
    pictures.demo(tmp_path, tmp_path)
    assert "| WER, unseen voices | 0.500 | none |" in capsys.readouterr().out
    assert "decorrelation off" in (tmp_path / "demo.svg").read_text()


def test_noise_that_does_not_reach_a_task_leaves_its_rate(tmp_path, capsys):
    wer = {"audio": {"sentences": 0.1, "unseen_voices": 0.2}, "video": {"sentences": 0.3, "unseen_voices": 0.4}}
    wer["audio"] |= {f"sentences {level}": 0.5 for level in pictures.LEVELS[1:]}
    (tmp_path / "summary.json").write_text(json.dumps({"wer": wer}))
    pictures.av(tmp_path, tmp_path)
    printed = capsys.readouterr().out
    assert "| video | 0.300 | 0.300 | 0.300 | 0.300 | 0.300 | 0.400 |" in printed
    assert "| audio | 0.100 | 0.500 | 0.500 | 0.500 | 0.500 | 0.200 |" in printed


def test_slim_files_keep_what_is_drawn():
    given = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>x</metadata><g><g>
    <path d="M 1.2345 2.0 \nL 3.001 4" style="stroke: currentColor"/></g>
    <path d="M 0 0" style="fill: none; opacity: 0"/>
    <g style="a"><text transform="rotate(-0 1 2)">two words</text></g></g></svg>"""
    slim = svg.slim(given)
    assert '<path d="M 1.2 2 L 3 4" style="stroke: currentColor"/>' in slim
    assert '<g style="a"><text>two words</text>' in slim
    assert "metadata" not in slim and slim.count("<path") == 1 and slim.count("<g") == 1
    assert svg.slim(slim) == slim


@pytest.mark.parametrize("picture", [*RESULTS.glob("*.svg"), *RESULTS.parent.glob("study/*.svg")], ids=lambda p: p.name)
def test_committed_pictures_are_small(picture):
    text = picture.read_text(encoding="utf-8")
    assert len(text) < 40_000 and len(text.splitlines()) < 400
    assert set(re.findall(r'href="#(\w+)"', text)) <= set(re.findall(r'id="(\w+)"', text))
