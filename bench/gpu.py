"""``make gpu``: everything on a GPU in under nine minutes. First the check of what is timed and the kernels' tests,
then every claim and whole steps, one table last. Rows, table and logs stay in ``$OUT`` where it is set, else in
``runs/bench/``; they are written as they come.

Claims run in a process of their own. Where that loses the device (a kernel that reads out of bounds breaks the CUDA
context), hangs or stays silent, the claims that are left go on in a new one.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch

if not __package__:  # run as a script: the repository root is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import correct, ledger
from bench.claims import MODULES
from bench.ledger import Row
from bench.processes import watched
from bench.run import line

WHOLE = 500.0  # seconds for everything, as of the start of this process
CHECK, TESTS = 130.0, 100.0  # of them at most for the check and for the tests
QUIET = 90.0  # seconds without output after which a claim is given up


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
    torch.cuda.empty_cache()  # what the lines above took belongs to the processes below
    good, tests = True, "tests: not run"
    if not arguments.no_tests:
        good = correct.check(folder, min(CHECK, end - time.monotonic()))
        tests = correct.tests(folder, min(TESTS, end - time.monotonic()))
    if not good:
        print("make gpu: what would be timed is not correct here (see above); nothing was timed", file=sys.stderr)
        return 1
    finish(folder, claims(folder, arguments.names or list(MODULES), end), tests)
    return 0


def age() -> float:
    """Seconds since this process began, its imports included; 0 where the system does not say."""
    try:
        began = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return seconds if 0 <= seconds < WHOLE else 0.0


def environment() -> str:
    """The lines that say on what the numbers were measured."""
    import triton

    order = getattr(torch._C, "_get_sdp_priority_order", lambda: "unknown")()
    major, minor = torch.cuda.get_device_capability()
    name = ledger.device_name(torch.device("cuda"))
    return (
        f"{name}, sm_{major}{minor}, torch {torch.__version__}, triton {triton.__version__}\n"
        f"order of sdpa's backends (SDPBackend numbers): {order}\n"
        f"a copy of 1 GiB moves {copy_rate():.2f} TB/s; "
        f"a bf16 product of 8192 x 8192 matrices makes {product_rate():.0f} TFLOP/s"
    )


def copy_rate() -> float:
    """TB/s, bytes read plus bytes written."""
    source = torch.randint(0, 100, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / _seconds(lambda: target.copy_(source)) / 1e12


def product_rate() -> float:
    """TFLOP/s."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / _seconds(lambda: a @ b) / 1e12


def _seconds(step: object) -> float:
    import triton

    return float(triton.testing.do_bench(step, return_mode="median")) / 1e3


def claims(folder: Path, names: list[str], end: float) -> list[Row]:
    """Runs the claims and gives all rows; see the module for what happens to those that break the device or hang."""
    store, left, broken = folder / "rows.jsonl", list(names), []
    while left and end - time.monotonic() > 10:
        budget = end - time.monotonic() - 8
        command = [sys.executable, "-m", "bench.run", *left, "--dry", "--budget", str(budget), "--rows", str(store)]
        ended = watched(command, folder / "claims.log", budget + 6, QUIET)
        if ended.code == 0:
            left = []
            break
        # modules come in order: the last that began is where it broke
        index = max((left.index(name) for name in _started(store) if name in left), default=0)
        why = ended.reason or f"the process ended with {ended.code}"
        broken += [_row(claim, f"error: {why}") for claim in sorted(_claims_of(left[index]))]
        print(f"make gpu: {left[index]}: {why}; going on with {', '.join(left[index + 1 :]) or 'nothing'}", flush=True)
        left = left[index + 1 :]
    late = [_row(claim, "no time left") for name in left for claim in sorted(_claims_of(name))]
    return [*_rows(store), *broken, *late]


def _row(claim: str, verdict: str) -> Row:
    """A row that stands for a claim as a whole."""
    origin = ledger.origin(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {**origin, "claim": claim, "provider": "all", "shape": "all", "verdict": verdict}


def _claims_of(module: str) -> set[str]:
    import importlib

    return {claim.name for claim in importlib.import_module(f"bench.claims.{module}").CLAIMS}


def _rows(path: Path) -> list[Row]:
    return [entry for entry in _entries(path) if "claim" in entry]


def _started(path: Path) -> list[str]:
    return [entry["started"] for entry in _entries(path) if "started" in entry]


def _entries(path: Path) -> list[dict[str, str]]:
    """What :mod:`bench.run` has written so far; a process that was killed may leave half a line."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def finish(folder: Path, rows: list[Row], tests: str) -> None:
    """The ledger, ``rows.csv``, ``rows.json`` and the table, which is printed last, with the line about the tests."""
    ledger.append(rows)
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ledger.FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    judged = [row for row in rows if row.get("target") or not row["verdict"].startswith("report")]
    text = "\n".join(line({field: row.get(field, "") for field in ledger.FIELDS}) for row in judged)
    met = sum(row["verdict"] == "met" for row in rows)
    missed = sum(row["verdict"] == "missed" for row in rows)
    rest = len(judged) - met - missed
    text += f"\n{tests}\n{met} met, {missed} missed, {rest} without a number; all rows in {folder}"
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
