"""The check of what is timed, on the CPU: right results pass it, wrong ones do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import check
from bench.workloads.attention import Problem
from bench.workloads.shapes import Model

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
MODEL = Model("tiny", 6, 2, 32, 64, 2, 96, 50)
PADDED = Problem(MODEL, 2, 40, CPU, torch.float32, valid=(40, 21))
PACKED = Problem(MODEL, 1, 90, CPU, torch.float16, (7, 78, 5))  # rounded as it will be on a GPU, or nearly


@pytest.mark.parametrize(
    ("problem", "names"), [(PADDED, ["triton", "cpu"]), (PACKED, ["triton"])], ids=["padded", "packed"]
)
def test_right_attention_passes(problem, names):
    findings = list(check.attention(problem, names))
    assert len(findings) == 2 * len(names) * len(check.NAMES)
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


def test_nan_and_a_fault_in_small_tokens_are_found():
    want = torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(0)).double()
    want[:, 50:] *= 1e-2
    low = want.bfloat16()
    assert check.excess(low, low, want) <= 1
    wrong = low.clone()
    wrong[0, 99] *= 1.1
    assert check.excess(wrong, low, want) > 1
    wrong[0, 0, 0] = float("nan")
    assert not check.Finding("x", check.excess(wrong, low, want), 1.0).fine


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
