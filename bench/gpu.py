"""``make gpu``: everything on a GPU in under nine minutes: the check of what is timed, the kernels' tests, every claim
with whole training steps, and one table last. Rows, table and logs are written as they come, to ``$OUT`` or
``runs/bench/``.

Claims run in a process of their own. If it loses the device (a kernel that reads out of bounds breaks the CUDA
context), hangs or stays silent, the remaining claims run in a new one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from bench.check import CASES
from bench.claims import MODULES
from bench.run import line
from bench.runner import ledger
from bench.runner.ledger import Row
from bench.runner.processes import Ended, together, watched

WHOLE = 500.0  # seconds for everything, from the start of this process
CHECK, TESTS = 130.0, 100.0  # of which at most for the check and for the tests
QUIET = 90.0  # seconds without output after which a claim is abandoned
# files of tests/flashsink that have tests for a GPU
TESTED = (
    *("activations", "attention", "calibrated", "decorrelation", "norm", "operators", "process_group", "statistics"),
    "triton",
)
OUTCOME = re.compile(r"::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: +\(.*\))? +\[ *\d+%\]$")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", type=float, default=WHOLE, help="seconds for everything")
    parser.add_argument("--no-tests", action="store_true", help="claims alone")
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims; default all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: there is no CUDA device here; make bench measures the CPU set", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.whole - age()
    place = Path(os.environ.get("OUT") or ledger.ROOT / "runs" / "bench")
    folder = place / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    print(environment(), flush=True)
    torch.cuda.empty_cache()  # frees what environment() took for the processes below
    good, outcome = True, "tests: not run"
    if not arguments.no_tests:
        good = check(folder, min(CHECK, end - time.monotonic()))
        outcome = tests(folder, min(TESTS, end - time.monotonic()))
    if not good:
        print("make gpu: what would be timed is not correct here (see above); nothing was timed", file=sys.stderr)
        return 1
    finish(folder, claims(folder, arguments.names or list(MODULES), end), outcome)
    return 0


def age() -> float:
    """Seconds since this process started, including its imports; 0 where the system does not tell."""
    try:
        began = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return seconds if 0 <= seconds < WHOLE else 0.0


def environment() -> str:
    """The device and its measured copy and product rates."""
    from triton.testing import do_bench

    order = getattr(torch._C, "_get_sdp_priority_order", lambda: "unknown")()
    major, minor = torch.cuda.get_device_capability()
    source = torch.randint(0, 100, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    steps = (lambda: target.copy_(source), lambda: a @ b)
    copy, product = (do_bench(step, return_mode="median") / 1e3 for step in steps)
    versions = f"torch {torch.__version__}, triton {ledger.triton.__version__}"
    return (
        f"{ledger.device_name(torch.device('cuda'))}, sm_{major}{minor}, {versions}\n"
        f"order of sdpa's backends (SDPBackend numbers): {order}\n"
        f"a copy of 1 GiB moves {2 * 2**30 / copy / 1e12:.2f} TB/s; "
        f"a bf16 product of 8192 x 8192 matrices makes {2 * 8192**3 / product / 1e12:.0f} TFLOP/s"
    )


def check(folder: Path, seconds: float) -> bool:
    """Runs :mod:`bench.check`, one process per case, since compiling kernels takes most of the time. Returns whether
    everything is correct; prints what is not."""
    commands = {f"check-{name}": [sys.executable, "-m", "bench.check", name] for name in CASES}
    ended = together(commands, folder, seconds)
    failed = {name: one for name, one in ended.items() if one.code != 0}
    for name, one in failed.items():
        print(f"{name}: {one.why}\n{one.tail(30)}", flush=True)
    print(f"check of what is timed: {'FAILED' if failed else 'passed'}", flush=True)
    return not failed


def tests(folder: Path, seconds: float) -> str:
    """Runs the GPU tests of ``tests/flashsink``, one process per file, and prints failures; returns the counts."""
    files = [ledger.ROOT / "tests" / "flashsink" / f"test_{name}.py" for name in TESTED]
    options = ["-v", "-m", "gpu and not slow", "-p", "no:cacheprovider", "--color=no"]
    commands = {path.stem: [sys.executable, "-m", "pytest", str(path), *options] for path in files}
    ended = together(commands, folder, seconds)
    for name, one in ended.items():
        if one.code not in (0, 5) or counts(one.text)["failed"]:  # 5: every test of the file was skipped
            print(f"{name}: {one.why}\n{one.tail(60)}", flush=True)
    text = summary(ended)
    print(text, flush=True)
    return text


def counts(text: str) -> Counter[str]:
    """Passed and failed tests in the output of ``pytest -v``, complete or not."""
    found = Counter(match[1] for line in text.splitlines() if (match := OUTCOME.search(line.rstrip())))
    return Counter(passed=found["PASSED"] + found["XFAIL"], failed=found["FAILED"] + found["ERROR"] + found["XPASS"])


def summary(ended: dict[str, Ended]) -> str:
    """ "tests: N passed, M failed", and the files that did not finish, with the reason."""
    total = sum((counts(one.text) for one in ended.values()), Counter())
    text = f"tests: {total['passed']} passed, {total['failed']} failed"
    # pytest ends with 0 if all passed, 1 after failures, 5 with nothing to run
    cut = [f"{name}: {one.why}" for name, one in ended.items() if one.code not in (0, 1, 5)]
    return "; ".join([text, *cut])


def claims(folder: Path, names: list[str], end: float) -> list[Row]:
    """Measures the claims and returns all rows; the module docstring says how failures are handled."""
    store, left, broken = folder / "rows.jsonl", list(names), []
    while left and end - time.monotonic() > 10:
        budget = end - time.monotonic() - 8
        command = [sys.executable, "-m", "bench.run", *left, "--dry", "--budget", str(budget), "--rows", str(store)]
        ended = watched(command, folder / "claims.log", budget + 6, QUIET)
        if ended.code == 0:
            left = []
            break
        # modules run in order: the last one that started is the one that broke
        started = [entry["started"] for entry in _entries(store) if entry.get("started") in left]
        index = max(map(left.index, started), default=0)
        why = ended.reason or f"the process ended with {ended.code}"
        broken += _whole(left[index], f"error: {why}")
        print(f"make gpu: {left[index]}: {why}; going on with {', '.join(left[index + 1 :]) or 'nothing'}", flush=True)
        left = left[index + 1 :]
    late = [row for name in left for row in _whole(name, "no time left")]
    return [*(entry for entry in _entries(store) if "claim" in entry), *broken, *late]


def _whole(module: str, verdict: str) -> list[Row]:
    """Rows that stand for the claims of ``module`` as a whole."""
    origin = ledger.origin(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    names = sorted(claim.name for claim in importlib.import_module(f"bench.claims.{module}").CLAIMS)
    return [{**origin, "claim": name, "provider": "all", "shape": "all", "verdict": verdict} for name in names]


def _entries(path: Path) -> list[dict[str, str]]:
    """What :mod:`bench.run` has written so far; a killed process may leave half a line."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def finish(folder: Path, rows: list[Row], tests: str) -> None:
    """Writes the ledger, ``rows.csv``, ``rows.json`` and the table; prints the table and the line about the tests."""
    ledger.append(rows)
    ledger.append(rows, folder / "rows.csv")
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    judged = [row for row in rows if row.get("target") or not row["verdict"].startswith("report")]
    verdicts = Counter(row["verdict"] for row in rows)
    met, missed = verdicts["met"], verdicts["missed"]
    lines = [line({field: row.get(field, "") for field in ledger.FIELDS}) for row in judged]
    lines += [tests, f"{met} met, {missed} missed, {len(judged) - met - missed} without a number; all rows in {folder}"]
    text = "\n".join(lines)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
