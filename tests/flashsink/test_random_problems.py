"""A few of the random problems of bench.random_problems, and how it keeps its progress."""

from __future__ import annotations

import json

import pytest

from bench import random_problems

pytestmark = pytest.mark.integration


def test_a_few_problems_pass_and_a_second_start_continues(tmp_path, capsys):
    out = tmp_path / "progress.jsonl"
    assert random_problems.main(["--problems", "6", "--out", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"seed": 0, "done": 6}]
    assert random_problems.main(["--problems", "7", "--out", str(out)]) == 0
    assert "6 of 7 problems are done" in capsys.readouterr().out
    assert random_problems.finished(out, 0) == 7 and random_problems.finished(out, 1) == 0


@pytest.mark.parametrize("kind", random_problems.KINDS)
def test_a_failure_is_named_by_its_seed(tmp_path, capsys, monkeypatch, kind):
    calls = []

    def check(draw, backend, device):
        calls.append(backend)
        assert len(calls) < 3 * len(random_problems.backends()), "wrong"

    monkeypatch.setattr(random_problems, "KINDS", {kind: check})
    out = tmp_path / "progress.jsonl"
    out.write_text('{"seed": 40, "done": 1}\n{"seed": 40, "do')
    assert random_problems.main(["--problems", "9", "--seed", "40", "--out", str(out)]) == 1
    assert f"seed 43: {kind} on" in capsys.readouterr().out
    assert random_problems.finished(out, 40) == 3
