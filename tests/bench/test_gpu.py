"""make gpu: child processes, counting of tests that did not finish, claims that break the device, going on after an
earlier call, and a rehearsal on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import check, gpu, surroundings, tune
from bench.claims import MODULES
from bench.runner import processes, progress
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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A new run in a folder of its own."""
    monkeypatch.setattr(progress, "KEPT", tmp_path / "kept")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu.ledger, "LEDGER", tmp_path / "ledger.csv")
    return progress.resume(fresh=True)


def test_wrong_numbers_stop_the_timing_and_what_is_around_does_not(run, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "cases", lambda: dict.fromkeys(("check-model", "check-collectives"), []))
    ended = {"check-model": Ended(0, "", "ok"), "check-collectives": Ended(1, "", "FAIL nccl: error 1, limit 0.1")}
    monkeypatch.setattr(gpu, "together", lambda commands, *_: {name: ended[name] for name in commands})
    for name in ended:
        (run.folder / f"{name}.log").write_text(ended[name].text)
    assert gpu.check(run, 1.0)
    assert "FAIL nccl" in capsys.readouterr().out
    run.ended.clear()
    ended["check-model"] = Ended(1, "", "FAIL out: error 1, limit 0.1")
    assert not gpu.check(run, 1.0)
    assert "FAIL out" in capsys.readouterr().out
    run.ended.clear()
    ended["check-model"] = Ended(None, "stopped after 1 s", "")
    assert not gpu.check(run, 1.0) and "check-model" not in run.ended
    ended["check-model"] = Ended(0, "", "ok")
    asked = []
    monkeypatch.setattr(
        gpu, "together", lambda commands, *_: asked.extend(commands) or {"check-model": ended["check-model"]}
    )
    assert gpu.check(run, 1.0) and asked == ["check-model"]  # the other has ended
    assert "FAIL nccl" in (run.folder / "check-collectives.log").read_text()


def test_every_case_is_a_process_of_its_own():
    commands = gpu.cases()
    assert len(commands) == len(check.CASES) + len(surroundings.KERNELS) + len(surroundings.OTHERS)
    assert {"check-model", "check-kernels-attention-128", "check-graph-packed", "check-flash-attn"} <= commands.keys()
    families = {name.split("-")[1] for name in surroundings.KERNELS}
    assert families == set(gpu.numbers.flashsink.selfcheck.FAMILIES)


def test_the_claims_are_in_order_of_worth():
    assert sorted(gpu.FIRST + gpu.REST) == sorted(MODULES)
    assert gpu.FIRST == ("packed_headline", "training_step", "norm")


def process_of(monkeypatch, behave):
    """Stands in for the process that measures claims; returns what it was asked for. ``behave(name, call)``: "row" that
    it measures and finishes, "late", or how the process ends."""
    asked = []

    def process(command, log, seconds, quiet):
        names = [word for word in command[3:] if word in MODULES]
        asked.append(names)
        with open(command[command.index("--rows") + 1], "a") as file:
            for name in names:
                file.write(json.dumps({"started": name}) + "\n")
                how = behave(name, len(asked))
                claim = importlib.import_module(f"bench.claims.{name}").CLAIMS[0].name
                if isinstance(how, Ended):
                    file.write('{"claim": "no')  # killed in the middle of a line
                    return how
                verdict = "report" if how == "row" else gpu.LATE
                file.write(json.dumps({"claim": claim, "provider": "x", "verdict": verdict}) + "\n")
                if how == "row":
                    file.write(json.dumps({"finished": name}) + "\n")
        return Ended(0, "", "")

    monkeypatch.setattr(gpu, "watched", process)
    return asked


@pytest.mark.parametrize(("code", "reason"), [(3, ""), (None, "no output for 90 s")])
def test_claims_continue_after_one_that_lost_the_device_or_is_silent(run, monkeypatch, code, reason):
    names = ["decorrelation", "norm", "long_rows"]
    asked = process_of(monkeypatch, lambda name, call: Ended(code, reason, "") if name == "norm" else "row")
    gpu.claims(run, names, float("inf"))
    assert asked == [names, ["long_rows"]]
    rows = gpu.results(run.folder, names)
    assert [row["claim"] for row in rows] == ["decorrelation_eager", "norm", "long_rows"]
    assert rows[1]["verdict"] == f"error: {reason or 'the process ended with 3'}"
    gpu.claims(run, names, float("inf"))  # nor does a second call try it again
    assert len(asked) == 2


def test_a_second_call_goes_on_with_what_is_left(run, monkeypatch):
    names = ["packed_headline", "norm", "long_rows"]
    stopped = Ended(None, "stopped after 9 s", "")
    asked = process_of(monkeypatch, lambda name, call: "row" if name == "packed_headline" or call > 2 else "late")
    gpu.claims(run, names, float("inf"))
    rows = gpu.results(run.folder, names)
    assert [row["verdict"] for row in rows] == ["report", gpu.LATE, gpu.LATE]
    again = progress.resume(fresh=False)
    assert again.folder == run.folder
    process_of(monkeypatch, lambda name, call: stopped)
    gpu.claims(again, names, float("inf"))
    assert gpu.pending(run.folder / "rows.jsonl", names) == names[1:]  # stopped for time is not broken
    asked = process_of(monkeypatch, lambda name, call: "row")
    gpu.claims(again, names, float("inf"))
    assert asked == [["norm", "long_rows"]]
    assert [row["verdict"] for row in gpu.results(run.folder, names)] == ["report"] * 3


def test_claims_without_time_say_so(run):
    gpu.claims(run, ["norm", "decorrelation"], 0.0)
    rows = gpu.results(run.folder, ["norm", "decorrelation"])
    assert {row["claim"] for row in rows} == {"norm", "decorrelation_eager", "decorrelation_compiled"}
    assert all(row["verdict"] == "no time left" for row in rows)


def test_the_table_ends_with_the_tests_and_all_rows(run, tmp_path, capsys):
    old, new, late = (
        {"claim": "norm", "shape": name, "provider": "all", "target": "", "verdict": verdict}
        for name, verdict in (("old", "met"), ("new", "error: x"), ("late", gpu.LATE))
    )
    for _ in range(2):
        gpu.finish(run.folder, [old, new, late], [new, late], "tests: 3 passed, 1 failed")
        last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "tests: 3 passed, 1 failed" and "1 met, 0 missed, 2 without a number" in last[1]
    assert [row["shape"] for row in gpu.ledger.read(run.folder / "rows.csv")] == ["old", "new", "late"]
    assert [row["shape"] for row in gpu.ledger.read(tmp_path / "ledger.csv")] == ["new", "new"]  # once for each call
    assert 0 <= gpu.age() < gpu.SECONDS


# ---- where a run is continued


def test_a_run_is_continued_in_another_out(run, monkeypatch, tmp_path):
    (run.folder / "rows.jsonl").write_text("")
    run.record({"check-model": Ended(0, "", ""), "late": Ended(None, "stopped after 1 s", "")})
    monkeypatch.setenv("OUT", str(tmp_path / "another"))
    again = progress.resume(fresh=False)
    assert again.folder == tmp_path / "another" / run.folder.name and (again.folder / "rows.jsonl").exists()
    assert again.ended == {"check-model": 0}
    assert progress.resume(fresh=True).ended == {}


@pytest.mark.parametrize("change", ["commit", "torch", "device", "file"])
def test_a_run_of_something_else_is_left_alone(run, monkeypatch, change):
    run.record({"check-model": Ended(0, "", "")})
    if change == "file":
        (run.folder / progress.STATE).write_text("{")
        (progress.KEPT / run.folder.name / progress.STATE).write_text("[]")
    else:
        own = progress.identity()
        monkeypatch.setattr(progress, "identity", lambda: own | {change: "other"})
    assert progress.resume(fresh=False).ended == {}


# ---- the rehearsal


def rehearse(out, *arguments):
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", *arguments]
    environment = os.environ | {"OUT": str(out), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, cwd=gpu.ledger.ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_claim_is_rehearsed_and_kept(tmp_path):
    done = rehearse(tmp_path, "norm", "--no-tests")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    rows = gpu.ledger.read(folder / "rows.csv")
    assert {row["provider"] for row in rows} == {"torch rms_norm", "flashsink, loss and statistics in the norm"}
    assert "---" in done.stdout
    again = rehearse(tmp_path, "norm", "--no-tests")
    assert again.returncode == 0 and "---" not in again.stdout  # there is nothing left to measure
    assert list(tmp_path.iterdir()) == [folder] and gpu.ledger.read(folder / "rows.csv") == rows


@pytest.mark.slow
def test_everything_is_rehearsed(tmp_path):
    """Every check passes, and every claim has a number of ours. Peers that have no CPU kernel may fail."""
    done = rehearse(tmp_path, "--seconds", "480")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    assert "FAIL" not in "".join(path.read_text() for path in folder.glob("check-*.log"))
    rows = gpu.ledger.read(folder / "rows.csv")
    assert not [row for row in rows if row["verdict"] == gpu.LATE]
    claims = {claim.name for name in MODULES for claim in importlib.import_module(f"bench.claims.{name}").CLAIMS}
    assert {row["claim"] for row in rows if row["p50_ms"] or row["ratio"]} == claims
    assert "tests: 0 passed, 0 failed" in done.stdout  # none of them is for a CPU


@pytest.mark.parametrize(
    "main", [gpu.main, tune.main, lambda: check.main(check.CASES, ""), lambda: check.main(surroundings.OTHERS, "")]
)
def test_without_a_gpu_there_is_one_line_and_a_failure(main, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["make gpu"])
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and "no CUDA device" in printed.err
