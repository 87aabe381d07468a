"""``make gpu``: everything on a GPU, the most worth first and within ``--seconds``: every kernel in bf16 and what is
around it (CUDA graphs, NCCL, peers), the packed headline, the training step, the norm, the kernels' tests, the other
claims, and one table last. Rows, table and logs are written as they come, to ``$OUT`` or ``runs/bench/``; a second call
on the same machine, commit and releases goes on where the first stopped (``--fresh``: from the beginning).
``--rehearse`` runs every part on the CPU, with tiny shapes in Triton's interpreter.

Claims run in a process of their own. If it loses the device (a kernel that reads out of bounds breaks the CUDA
context), hangs or stays silent, the remaining claims run in a new one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from bench import check as numbers
from bench import surroundings
from bench.claims import MODULES, loss_memory
from bench.run import entries, line
from bench.runner import ledger, rehearsal
from bench.runner.ledger import Row
from bench.runner.processes import Ended, together, watched
from bench.runner.progress import Progress, resume
from flashsink import verdicts

SECONDS = 500.0  # for everything, from the start of this process
CHECK, TESTS = 0.5, 0.3  # shares of it: at most for the check and for the tests
QUIET = 90.0  # seconds without output after which a claim is abandoned
LATE = "no time left"
# in order of worth; the tests of the kernels come after the first
FIRST = ("packed_headline", "training_step", "norm")
REST = ("attention_statistics", "decorrelation", "forward_statistics", "long_rows", "eager_attention")
REST += ("options", "loss_memory", "flag_attention")
# files of tests/flashsink that have tests for a GPU
TESTED = (
    *("activations", "attention", "calibrated", "decorrelation", "norm", "operators", "process_group", "statistics"),
    "triton",
)
OUTCOME = re.compile(r"::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: +\(.*\))? +\[ *\d+%\]$")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS:.0f})")
    parser.add_argument("--fresh", action="store_true", help="begin again")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--no-tests", action="store_true", help="claims alone")
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims; default all")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MODULES):
        parser.error(f"NAME: expected some of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
    if arguments.rehearse and not rehearsal.ON:
        again = [sys.executable, "-m", "bench.gpu", *sys.argv[1:]]
        return subprocess.run(again, env=os.environ | rehearsal.ENVIRONMENT, check=False).returncode
    if not torch.cuda.is_available() and not rehearsal.ON:
        print("make gpu: there is no CUDA device here; make bench measures the CPU set", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.seconds - age()
    os.environ[verdicts.VARIABLE] = "0"  # kernels that fail are to be seen here, not passed over
    progress = resume(arguments.fresh)
    if not rehearsal.ON:
        print(environment(), flush=True)
        torch.cuda.empty_cache()  # frees what environment() took for the processes below
    names = arguments.names or [*FIRST, *REST]
    before = results(progress.folder, names)
    good, outcome = True, "tests: not run"
    if not arguments.no_tests:
        good = check(progress, min(CHECK * arguments.seconds, end - time.monotonic()))
    if good:
        claims(progress, [name for name in FIRST if name in names], end)
    if not arguments.no_tests:
        outcome = tests(progress, min(TESTS * arguments.seconds, end - time.monotonic()))
    if good:
        claims(progress, [name for name in names if name not in FIRST], end)
    else:
        print("make gpu: nothing is timed before everything that would be is found correct (see above)")
    rows = results(progress.folder, names)
    finish(progress.folder, rows, [row for row in rows if row not in before], outcome)
    progress.record({})
    return int(not good or (rehearsal.ON and any(map(failed, rows))))


def failed(row: Row) -> bool:
    """Whether a rehearsal has shown that something does not run. Peers may have no CPU kernel, and the interpreter's
    memory is not a kernel's."""
    ours = row["provider"].startswith("flashsink") or row["provider"] == "all"
    return ours and row["verdict"].startswith("error") and row["verdict"] != loss_memory.LESS


def age() -> float:
    """Seconds since this process started, including its imports; 0 where the system does not tell."""
    try:
        began = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return seconds if 0 <= seconds < SECONDS else 0.0


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


def cases() -> dict[str, list[str]]:
    """The commands of the check: a process for every case, since compiling kernels takes most of the time."""
    modules = {"bench.check": numbers.CASES, "bench.surroundings": surroundings.KERNELS | surroundings.OTHERS}
    if rehearsal.ON:
        return {f"check-{name[6:]}": [sys.executable, "-m", name] for name in modules}
    return {
        f"check-{case}": [sys.executable, "-m", module, case] for module, found in modules.items() for case in found
    }


def check(progress: Progress, seconds: float) -> bool:
    """Runs what has not ended yet of :mod:`bench.check` and :mod:`bench.surroundings`, and prints what fails. Returns
    whether everything that would be timed is correct."""
    commands = cases()
    ended = together(_left(commands, progress), progress.folder, seconds)
    progress.record(ended)
    found = progress.results(list(commands)) | ended
    failed = {name: one for name, one in found.items() if one.code != 0}
    for name, one in failed.items():
        print(f"{name}: {one.why}\n{one.tail(30)}", flush=True)
    around = {f"check-{name}" for name in surroundings.OTHERS}
    good = not failed.keys() - around
    unsure = f", but {', '.join(sorted(failed))} failed or did not end" if failed else ""
    print(f"check of what is timed: {'passed' if good else 'FAILED'}{unsure}", flush=True)
    return good


def tests(progress: Progress, seconds: float) -> str:
    """Runs the GPU tests of ``tests/flashsink``, one process per file, and prints failures; returns the counts."""
    options = ["-v", "-m", "gpu and not slow", "-p", "no:cacheprovider", "--color=no"]
    commands = {}
    for name in TESTED[:1] if rehearsal.ON else TESTED:
        path = ledger.ROOT / "tests" / "flashsink" / f"test_{name}.py"
        commands[path.stem] = [sys.executable, "-m", "pytest", str(path), *options]
    ended = together(_left(commands, progress), progress.folder, seconds)
    progress.record(ended)
    for name, one in ended.items():
        if one.code not in (0, 5) or counts(one.text)["failed"]:  # 5: every test of the file was skipped
            print(f"{name}: {one.why}\n{one.tail(60)}", flush=True)
    text = summary(progress.results(list(commands)) | ended)
    print(text, flush=True)
    return text


def _left(commands: dict[str, list[str]], progress: Progress) -> dict[str, list[str]]:
    return {name: command for name, command in commands.items() if name not in progress.ended}


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


def claims(progress: Progress, names: list[str], end: float) -> None:
    """Measures what is left of the claims, into ``rows.jsonl``; the module docstring says how failures are handled."""
    store = progress.folder / "rows.jsonl"
    while (left := pending(store, names)) and end - time.monotonic() > 10:
        budget = end - time.monotonic() - 8
        command = [sys.executable, "-m", "bench.run", *left, "--dry", "--in-order"]
        command += ["--budget", str(budget), "--rows", str(store)]
        ended = watched(command, progress.folder / "claims.log", budget + 6, QUIET)
        if ended.code == 0 or ended.late:
            break
        # modules run in order: the last one that started is the one that broke
        started = [entry["started"] for entry in entries(store) if entry.get("started") in left]
        broken, why = started[-1] if started else left[0], ended.reason or f"the process ended with {ended.code}"
        with store.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"broken": broken, "verdict": f"error: {why}"}) + "\n")
        print(f"make gpu: {broken}: {why}; going on with {', '.join(pending(store, names)) or 'nothing'}", flush=True)
    progress.record({})


def pending(store: Path, names: list[str]) -> list[str]:
    """Those of ``names`` that have neither finished nor broken."""
    over = {entry.get("finished") or entry.get("broken") for entry in entries(store)}
    return [name for name in names if name not in over]


def results(folder: Path, names: list[str]) -> list[Row]:
    """What is known of the claims: rows that were measured, and one for each claim that broke or is left."""
    store, found = folder / "rows.jsonl", []
    for entry in entries(store):
        if "claim" in entry and entry["verdict"] != LATE:
            found.append(entry)
        elif "broken" in entry:
            found += _whole(entry["broken"], entry["verdict"])
    return found + [row for name in pending(store, names) for row in _whole(name, LATE)]


def _whole(module: str, verdict: str) -> list[Row]:
    """Rows that stand for the claims of ``module`` as a whole."""
    origin = ledger.origin(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    names = sorted(claim.name for claim in importlib.import_module(f"bench.claims.{module}").CLAIMS)
    return [{**origin, "claim": name, "provider": "all", "shape": "all", "verdict": verdict} for name in names]


def finish(folder: Path, rows: list[Row], new: list[Row], tests: str) -> None:
    """Adds ``new`` rows to the ledger, writes ``rows.csv``, ``rows.json`` and the table; prints the table and the line
    about the tests."""
    if not rehearsal.ON:
        ledger.append(row for row in new if row["verdict"] != LATE)
    (folder / "rows.csv").unlink(missing_ok=True)
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
