"""make gpu: child processes, counting of tests that did not finish, and claims that break the device."""

from __future__ import annotations

import importlib
import json
import sys
import time

import pytest
import torch

from bench import check, gpu, tune
from bench.claims import MODULES
from bench.runner import processes
from bench.runner.processes import Ended

pytestmark = pytest.mark.integration


def python(code):
    return [sys.executable, "-c", code]


def test_together_runs_at_once_and_kills_what_is_late(tmp_path):
    began = time.monotonic()
    ended = processes.together(
        {
            "good": python("print(1)"),
            "bad": python("raise SystemExit(3)"),
            "late": python("import time; time.sleep(60)"),
        },
        tmp_path,
        3.0,
    )
    assert time.monotonic() - began < 20
    assert (ended["good"].code, ended["good"].text, ended["good"].reason) == (0, "1\n", "")
    assert (ended["bad"].code, ended["late"].code, ended["late"].reason) == (3, None, "stopped after 3 s")


def test_a_silent_process_is_killed_and_what_it_wrote_is_shown(tmp_path, capsys):
    code = "import time; print('begun'); time.sleep(60)"
    ended = processes.watched(python(code), tmp_path / "log", 60.0, 2.0)
    assert ended.code is None and ended.reason == "no output for 2 s"
    assert capsys.readouterr().out == "begun\n"


def test_a_process_with_output_ends_by_itself_or_at_its_limit(tmp_path):
    code = "import time\nfor i in range(600): print(i); time.sleep(0.1)"
    ended = processes.watched(python(code), tmp_path / "log", 2.0, 60.0)
    assert ended.code is None and ended.reason == "stopped after 2 s"
    ended = processes.watched(python("print(2)"), tmp_path / "log", 60.0, 60.0)
    assert ended.code == 0 and ended.text.endswith("\n2\n")


LOG = """tests/flashsink/test_norm.py::test_a[right padding-torch.bfloat16] PASSED      [  1%]
tests/flashsink/test_norm.py::test_b FAILED                                    [ 50%]
tests/flashsink/test_norm.py::test_c[1] SKIPPED (no reason)                    [ 75%]
tests/flashsink/test_norm.py::test_d """


def test_tests_are_counted_also_where_they_were_stopped():
    assert gpu.counts(LOG) == {"passed": 1, "failed": 1}
    assert gpu.counts(LOG + "\nFAILED tests/flashsink/test_norm.py::test_b - assert\n")["failed"] == 1
    ended = {"a": Ended(1, "", LOG), "b": Ended(None, "stopped after 100 s", LOG)}
    assert gpu.summary(ended) == "tests: 2 passed, 2 failed; b: stopped after 100 s"
    assert gpu.summary({"a": Ended(5, "", "")}) == "tests: 0 passed, 0 failed"


def test_a_check_that_fails_stops_the_timing(tmp_path, monkeypatch, capsys):
    wrong = {"a": Ended(0, "", "ok"), "b": Ended(1, "", "FAIL out: error 1, limit 0.1")}
    monkeypatch.setattr(gpu, "together", lambda *given: wrong)
    assert not gpu.check(tmp_path, 1.0)
    assert "FAIL out" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "together", lambda *given: {"a": wrong["a"]})
    assert gpu.check(tmp_path, 1.0)


@pytest.mark.parametrize(("code", "reason"), [(3, ""), (None, "no output for 90 s")])
def test_claims_continue_after_one_that_lost_the_device_or_is_silent(tmp_path, monkeypatch, code, reason):
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


def test_the_table_ends_with_the_tests_and_all_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.ledger, "LEDGER", tmp_path / "ledger.csv")
    row = {"claim": "norm", "shape": "all", "provider": "all", "target": "", "verdict": "error: x"}
    gpu.finish(tmp_path, [row], "tests: 3 passed, 1 failed")
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "tests: 3 passed, 1 failed" and "0 met, 0 missed, 1 without a number" in last[1]
    assert gpu.ledger.read(tmp_path / "ledger.csv") == gpu.ledger.read(tmp_path / "rows.csv") != []
    assert 0 <= gpu.age() < gpu.WHOLE


@pytest.mark.parametrize("module", [gpu, tune, check])
def test_without_a_gpu_there_is_one_line_and_a_failure(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module.__name__])
    assert module.main() == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and "no CUDA device" in printed.err
