"""The suites as wholes: the GPU set is built without a GPU, and goes on after a claim that takes the device along."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import attention, gpu, ledger, run
from bench.claims import MODULES
from bench.claims.flag_attention import own_pass
from bench.harness import Bench
from bench.processes import Ended
from bench.shapes import Model

CPU = torch.device("cpu")
TINY = Model("tiny", 2, 1, 16, 32, 2, 48, 50)


class Recorder(Bench):
    """Takes itself for a GPU, and keeps comparisons instead of measuring them."""

    cuda = True

    def __init__(self):
        self.rows, self.comparisons = [], []
        super().__init__(CPU, 0.0, self.rows.append)

    def compare(self, comparison):
        self.comparisons.append(comparison)
        return {}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "loss_memory"])
def test_the_gpu_set_is_complete(name):
    bench, module = Recorder(), importlib.import_module(f"bench.claims.{name}")
    module.run(bench)
    assert {c.claim for c in bench.comparisons} == {claim.name for claim in module.CLAIMS}
    for comparison in bench.comparisons:
        assert sum(not p.ours for p in comparison.providers) >= 1, comparison
        assert sum(p.ours for p in comparison.providers) >= 1, comparison
        ledger.verdict(comparison.target, 1.0)
    for claim in module.CLAIMS:
        targets = {c.target for c in bench.comparisons if c.claim == claim.name} - {""}
        assert targets, f"{claim.name} has a target on a GPU"


@pytest.mark.parametrize("lengths", [None, (20, 13)])
def test_captured_statistics_need_no_launch_behind_the_backward(lengths):
    from flashsink.triton.launch import observe

    problem = attention.Problem(TINY, 1, 33, CPU, torch.float32, lengths)
    kernels = {}
    for how in ("", "captured", "pass"):
        names = kernels[how] = []
        step = attention.ours(problem, "triton", how).make()
        with observe(lambda launch, names=names: names.append(launch.kernel.__name__) or True):
            kernels[how + " result"] = step()
    assert "received_kernel" not in kernels["captured"] and kernels["captured"] == kernels[""]
    assert kernels["pass"].count("received_kernel") == 1
    torch.testing.assert_close(kernels["captured result"][4], kernels["pass result"][4], rtol=1e-4, atol=1e-5)


def test_the_pass_alone_is_the_pass_alone():
    from flashsink.triton.launch import observe

    forward, read = own_pass(attention.Problem(TINY, 1, 33, CPU, torch.float32), "triton").make()
    names = []
    for _ in range(2):
        forward()
        with observe(lambda launch: names.append(launch.kernel.__name__) or True):
            read()
    assert names == ["received_kernel"] * 2


@pytest.mark.parametrize(("code", "reason"), [(3, ""), (None, "no output for 90 s")])
def test_claims_go_on_after_one_that_lost_the_device_or_is_silent(tmp_path, monkeypatch, code, reason):
    asked = []

    def process(command, log, seconds, quiet):
        names = [word for word in command[3:] if word in MODULES]
        asked.append(names)
        with open(command[command.index("--rows") + 1], "a") as file:
            for name in names:
                file.write(json.dumps({"started": name}) + "\n")
                if name == "norm" and len(asked) == 1:
                    file.write('{"claim": "no')  # killed in the middle of a line
                    return Ended(code, reason, "")
                row = {"claim": importlib.import_module(f"bench.claims.{name}").CLAIMS[0].name, "verdict": "report"}
                file.write(json.dumps(row) + "\n")
        return Ended(0, "", "")

    monkeypatch.setattr(gpu, "watched", process)
    rows = gpu.claims(tmp_path, ["decorrelation", "norm", "long_rows"], float("inf"))
    assert asked == [["decorrelation", "norm", "long_rows"], ["long_rows"]]
    assert [row["claim"] for row in rows] == ["decorrelation_eager", "long_rows", "norm"]
    assert rows[-1]["verdict"] == f"error: {reason or 'the process ended with 3'}"


def test_claims_without_time_say_so(tmp_path, monkeypatch):
    rows = gpu.claims(tmp_path, ["norm", "decorrelation"], 0.0)
    assert {row["claim"] for row in rows} == {"norm", "decorrelation_eager", "decorrelation_compiled"}
    assert all(row["verdict"] == "no time left" for row in rows)


def test_a_claim_that_raises_is_a_row(monkeypatch):
    rows = []

    def fails(bench):
        raise RuntimeError("broken")

    module = SimpleNamespace(__doc__="A claim.", CLAIMS=[SimpleNamespace(name="norm")], run=fails)
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module)
    bench, started = Bench(CPU, 0.0, rows.append), []
    assert run.measure(bench, ["norm", "long_rows"], float("inf"), 0, started.append) is False
    assert started == ["norm", "long_rows"]
    assert [row["verdict"] for row in rows] == ["error: RuntimeError: broken"] * 2


def test_the_table_ends_with_the_tests_and_all_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.ledger, "append", lambda rows: None)
    row = {"claim": "norm", "shape": "all", "provider": "all", "target": "", "verdict": "error: x"}
    gpu.finish(tmp_path, [row], "tests: 3 passed, 1 failed")
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "tests: 3 passed, 1 failed" and "0 met, 0 missed, 1 without a number" in last[1]
    assert 0 <= gpu.age() < gpu.WHOLE


@pytest.mark.parametrize("module", ["bench.gpu", "bench.tune", "bench.check"])
def test_without_a_gpu_there_is_one_line_and_a_failure(module):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, "-m", module], cwd=ledger.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no CUDA device" in done.stderr
