"""Rows, targets, and the claim table of bench/README.md."""

from __future__ import annotations

import re

import pytest
import torch

from bench.runner import ledger, report
from bench.workloads.shapes import HEADLINE_TOKENS, utterances


def row(**columns):
    return {field: "" for field in ledger.FIELDS} | columns


def test_quantiles_are_interpolated():
    assert ledger.quantiles([4.0, 0.0, 1.0, 3.0, 2.0]) == pytest.approx((0.8, 2.0, 3.2))
    assert ledger.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_verdicts():
    assert [ledger.verdict("<= 1.25", ratio) for ratio in (1.25, 1.26)] == ["met", "missed"]
    assert [ledger.verdict(">= 3", ratio) for ratio in (3.0, 2.9)] == ["met", "missed"]
    assert ledger.verdict("", 9.0) == "report"
    with pytest.raises(ValueError, match="target"):
        ledger.verdict("< 3", 2.0)


def test_rows_come_back_as_they_went(tmp_path):
    path = tmp_path / "ledger.csv"
    first = row(claim="a", shape='B1, "S2"', ratio="1.5", note="line, with commas")
    ledger.append([first], path)
    ledger.append([{"claim": "b"}], path)
    assert ledger.read(path) == [first, row(claim="b")]


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "ledger.csv"
    path.write_text("claim,ratio\na,1\n")
    with pytest.raises(ValueError, match="columns"):
        ledger.append([row(claim="a")], path)


def test_the_commit_without_git_and_as_given(monkeypatch):
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert ledger.origin(torch.device("cpu"))["commit"] == "unknown"
    monkeypatch.setenv("BENCH_COMMIT", "1234567")
    assert ledger.origin(torch.device("cpu"))["commit"] == "1234567"


def test_the_committed_ledger_is_readable():
    rows = ledger.read()
    assert ledger.LEDGER.read_text().splitlines()[0].split(",") == ledger.FIELDS
    assert rows and all(one["claim"] and one["device"] for one in rows)
    assert [one["date"] for one in rows] == sorted(one["date"] for one in rows), "rows are appended"
    assert not re.search(r"/(home|root|tmp|work|Users)/|@", ledger.LEDGER.read_text()), "no paths, users or hosts"


def test_verdicts_of_the_committed_ledger_follow_from_its_ratios():
    judged = [one for one in ledger.read() if one["target"] and one["ratio"]]
    assert judged
    for one in judged:
        assert one["verdict"] == ledger.verdict(one["target"], float(one["ratio"])), one


def test_the_table_of_the_readme_is_the_ledgers():
    text = report.README.read_text(encoding="utf-8")
    table = report.table(ledger.read())
    assert report.replaced(text, report.CLAIMS, table) == text, "python -m bench.runner.report --write"


def test_only_the_named_block_is_replaced():
    text = "a\n<!-- x: by -->\nold\n<!-- x end -->\nb <!-- y: z -->\n<!-- y end -->"
    assert report.replaced(text, "x", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="expected a block"):
        report.replaced(text, "other", "new")


def measured(*rows, column="cpu"):
    return report.measured([row(claim="norm", provider="flashsink", **one) for one in rows], "norm", column)


def test_a_cell_holds_the_newest_row_of_every_shape():
    cpu = {"device": "CPU x86_64", "metric": "time", "target": "<= 1.15"}
    rows = (
        {**cpu, "shape": "a", "ratio": "2", "verdict": "missed"},
        {**cpu, "shape": "a", "ratio": "1.1", "verdict": "met"},
        {**cpu, "shape": "b", "ratio": "1.3", "verdict": "missed"},
        {**cpu, "shape": "c", "ratio": "9", "verdict": "report", "target": ""},
    )
    assert measured(*rows) == "1.1..1.3 (<= 1.15: met in 1 of 2)"
    noted = {**cpu, "shape": "a", "ratio": "1.2", "verdict": "missed", "note": "host-bound"}
    assert measured(*rows, noted) == "1.2..1.3 (<= 1.15: missed)"
    assert measured(*rows, column="gpu") == report.NOT_MEASURED
    assert measured({**cpu, "device": "NVIDIA H200", "ratio": "1.02", "verdict": "met"}, column="gpu") == (
        "1.02 (<= 1.15: met)"
    )
    assert measured({**cpu, "shape": "a", "verdict": "error: x", "target": ""}) == report.NOT_MEASURED


def test_utterances_fill_the_batch_exactly():
    for tokens in (48, 400, 448, 1024, HEADLINE_TOKENS):
        lengths = utterances(tokens)
        assert sum(lengths) == tokens and min(lengths) >= 48 and max(lengths) <= 400
    assert utterances(4096) == utterances(4096) != utterances(4096, seed=1)
