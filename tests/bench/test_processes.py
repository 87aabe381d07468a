"""Processes side by side and under a watch, and what is read from tests that did not come to their end."""

from __future__ import annotations

import sys
import time

from bench import correct, processes


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


def test_a_process_that_speaks_ends_by_itself_or_by_the_clock(tmp_path):
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
    assert correct.counts(LOG) == {"passed": 1, "failed": 1}
    assert correct.counts(LOG + "\nFAILED tests/flashsink/test_norm.py::test_b - assert\n")["failed"] == 1
    ended = {"a": processes.Ended(1, "", LOG), "b": processes.Ended(None, "stopped after 100 s", LOG)}
    assert correct.summary(ended) == "tests: 2 passed, 2 failed; b: stopped after 100 s"
    assert correct.summary({"a": processes.Ended(5, "", "")}) == "tests: 0 passed, 0 failed"


def test_a_check_that_fails_stops_the_timing(tmp_path, monkeypatch, capsys):
    wrong = {"a": processes.Ended(0, "", "ok"), "b": processes.Ended(1, "", "FAIL out: error 1, limit 0.1")}
    monkeypatch.setattr(correct, "together", lambda *given: wrong)
    assert not correct.check(tmp_path, 1.0)
    assert "FAIL out" in capsys.readouterr().out
    monkeypatch.setattr(correct, "together", lambda *given: {"a": wrong["a"]})
    assert correct.check(tmp_path, 1.0)
