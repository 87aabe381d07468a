"""The check of what is timed, on the CPU: right results pass it, wrong ones do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import check
from bench.attention import Problem
from bench.shapes import Model

CPU = torch.device("cpu")
MODEL = Model("tiny", 6, 2, 32, 64, 2, 96, 50)
PADDED = Problem(MODEL, 2, 40, CPU, torch.float32, valid=(40, 21))
PACKED = Problem(MODEL, 1, 40, CPU, torch.float32, (7, 28, 5))


@pytest.mark.parametrize("problem", [PADDED, PACKED], ids=["padded", "packed"])
def test_right_attention_passes(problem):
    findings = list(check.attention(problem, ["triton", "cpu"]))
    assert len(findings) == 2 * 2 * len(check.NAMES)
    assert all(finding.fine for finding in findings), [str(f) for f in findings if not f.fine]


@pytest.mark.parametrize("wrong", range(len(check.NAMES)))
def test_a_wrong_number_is_found(monkeypatch, wrong):
    right = check.ours

    def ours(*given):
        step = right(*given).make()

        def run():
            results = list(step())
            results[wrong] = results[wrong] * 1.001
            return results

        return dataclasses.replace(right(*given), make=lambda: run)

    monkeypatch.setattr(check, "ours", ours)
    bad = {f.name.rsplit(" ", 1)[1] for f in check.attention(PADDED, ["reference"]) if not f.fine}
    assert bad == {check.NAMES[wrong]}


def test_nan_is_found():
    assert not check.Finding("x", float("nan"), 1.0).fine


def test_a_whole_model_passes_and_a_case_that_raises_fails(capsys):
    assert check.run(lambda device: check.model(device, torch.float32), CPU)
    assert capsys.readouterr().out.count("loss") == 2
    assert check.run(lambda device: check.hidden(device, torch.float32, 64), CPU)

    def broken(device):
        raise RuntimeError("no such kernel")
        yield

    assert not check.run(broken, CPU)
    assert "FAIL RuntimeError: no such kernel" in capsys.readouterr().out


def test_the_cases_are_those_of_the_claims():
    assert len(check.CASES) == 10
    problem = check.attention_problem(128, 3, False, CPU)
    assert (problem.model.heads // problem.model.kv_heads, problem.tokens, problem.valid) == (3, 1024, (1024, 700))
    assert sum(check.attention_problem(64, 4, True, CPU).lengths) == 2048
