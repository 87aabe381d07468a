"""Jobs in processes: which of them died or hung, what they raise, and that none is left."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avsr.errors import UserError
from avsr.runtime.locks import process_start
from avsr.runtime.pool import Lost, run_jobs, tick

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Other tests of this process may have left some of theirs."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


# in a file of its own, so that new interpreters can import it whatever pytest's import mode
HELPERS = """
import os, time
from avsr.errors import UserError
from avsr.runtime.pool import run_jobs, tick

def process_of(job):
    tick()
    time.sleep(0.1)
    return os.getpid()

def complain(job):
    raise job

def write_and_sleep(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    import sys
    list(run_jobs(write_and_sleep, sys.argv[1:], 2))
"""


@pytest.fixture
def helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "pool_test_helpers.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("pool_test_helpers")


@pytest.mark.parametrize("fresh", [False, True])
def test_processes_are_kept_or_fresh(helpers: Any, fresh: bool) -> None:
    ticks: list[int] = []
    results = list(run_jobs(helpers.process_of, range(4), 2, fresh=fresh, on_tick=lambda: ticks.append(1)))
    assert sorted(job for job, _ in results) == [0, 1, 2, 3] and len(ticks) == 4
    processes = {process for _, process in results}
    assert len(processes) == (4 if fresh else 2) and os.getpid() not in processes


def test_one_worker_is_this_process() -> None:
    tick()  # of a job that runs here, and of no interest
    assert list(run_jobs(lambda job: (job, os.getpid()), "ab", 1)) == [(job, (job, os.getpid())) for job in "ab"]
    (_, found), *_ = run_jobs(os.getenv, ["HOME"], 1, fresh=True)
    assert found == os.environ.get("HOME")


def test_a_process_that_dies_takes_only_its_own_job() -> None:
    harmless, deadly = signal.SIGCONT, signal.SIGKILL
    jobs = [harmless, harmless, deadly, harmless, harmless]
    results = list(run_jobs(signal.raise_signal, jobs, 2))
    assert sorted(job for job, _ in results) == sorted(jobs)
    assert [result for job, result in results if job == deadly] == [Lost("died (exit status -9)")]
    assert {result for job, result in results if job == harmless} == {None}


def test_a_process_that_hangs_is_ended() -> None:
    began = time.monotonic()
    results = dict(run_jobs(time.sleep, [600, 0], 2, stall_seconds=3.0))
    assert results == {600: Lost("did nothing for 3 s and was ended"), 0: None}
    assert time.monotonic() - began < 60


def test_what_a_job_raises_is_raised_and_ends_the_others(helpers: Any) -> None:
    with pytest.raises(UserError, match="no good"):
        list(run_jobs(helpers.complain, [UserError("no good")], 2))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError: a bug"):
        list(run_jobs(helpers.complain, [ZeroDivisionError("a bug")], 2))


def test_no_process_outlives_a_closed_iterator() -> None:
    for job, _ in run_jobs(time.sleep, [0, 600], 2):
        assert job == 0
        break


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(helpers: Any, tmp_path: Path, number: int) -> None:
    files = [tmp_path / name for name in "ab"]
    with subprocess.Popen([sys.executable, helpers.__file__, *map(str, files)], stderr=subprocess.DEVNULL) as parent:
        while not all(file.is_file() and file.read_text() for file in files):
            time.sleep(0.05)
        parent.send_signal(number)
    began = time.monotonic()
    while any(process_start(int(file.read_text())) for file in files):
        assert time.monotonic() - began < 30
        time.sleep(0.05)
