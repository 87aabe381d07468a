"""Correctness before timing: the check of what is timed (:mod:`bench.check`), and the tests of the kernels.

Both are bound by compiling kernels, so their parts run side by side, a process each.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from bench import ledger
from bench.check import CASES
from bench.processes import Ended, together

# files of tests/flashsink with tests that run on a GPU
TESTS = (
    "activations", "attention", "calibrated", "decorrelation", "norm", "operators", "process_group", "statistics",
    "triton",
)  # fmt: skip
OUTCOME = re.compile(r"::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: +\(.*\))? +\[ *\d+%\]$")


def check(folder: Path, seconds: float) -> bool:
    """Whether everything that is timed computes what it should; prints what does not."""
    commands = {f"check-{name}": [sys.executable, "-m", "bench.check", name] for name in CASES}
    good = True
    for name, ended in together(commands, folder, seconds).items():
        if ended.code != 0:
            good = False
            print(f"{name}: {_why(ended)}\n{_tail(ended, 30)}", flush=True)
    print(f"check of what is timed: {'passed' if good else 'FAILED'}", flush=True)
    return good


def tests(folder: Path, seconds: float) -> str:
    """Runs what of ``tests/flashsink`` is for a GPU and prints its failures; one line with the counts."""
    files = [ledger.ROOT / "tests" / "flashsink" / f"test_{name}.py" for name in TESTS]
    options = ["-v", "-m", "gpu and not slow", "-p", "no:cacheprovider", "--color=no"]
    commands = {path.stem: [sys.executable, "-m", "pytest", str(path), *options] for path in files}
    ended = together(commands, folder, seconds)
    for name, one in ended.items():
        if one.code not in (0, 5) or counts(one.text)["failed"]:  # 5: every test of the file was skipped
            print(f"{name}: {_why(one)}\n{_tail(one, 60)}", flush=True)
    text = summary(ended)
    print(text, flush=True)
    return text


def counts(text: str) -> Counter[str]:
    """Passed and failed tests in what ``pytest -v`` printed, also where it did not come to its end."""
    found = Counter(match[1] for line in text.splitlines() if (match := OUTCOME.search(line.rstrip())))
    return Counter(passed=found["PASSED"] + found["XFAIL"], failed=found["FAILED"] + found["ERROR"] + found["XPASS"])


def summary(ended: dict[str, Ended]) -> str:
    """ "tests: N passed, M failed", and the files that did not come to their end, with the reason."""
    total = sum((counts(one.text) for one in ended.values()), Counter())
    text = f"tests: {total['passed']} passed, {total['failed']} failed"
    # 0 passed, 1 failures, 5 nothing left to run: those are ends
    cut = [f"{name}: {_why(one)}" for name, one in ended.items() if one.code not in (0, 1, 5)]
    return "; ".join([text, *cut])


def _why(ended: Ended) -> str:
    return ended.reason or f"exit code {ended.code}"


def _tail(ended: Ended, lines: int) -> str:
    return "\n".join(ended.text.splitlines()[-lines:])
