"""``make gpu``: everything on a GPU in under nine minutes. Correctness in bf16 first, then every claim, then whole
steps, one table last. Rows, table and logs stay in ``runs/bench/`` and, where it is set, in ``$OUT``.

Claims run in a process of their own. Where that loses the device (a kernel that reads out of bounds breaks the CUDA
context) or hangs, the claims that are left go on in a new one.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

if not __package__:  # run as a script: the repository root is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import ledger
from bench.claims import MODULES
from bench.ledger import Row
from bench.run import line

WHOLE = 530.0  # seconds for everything
CORRECTNESS = 150.0  # of them at most for the tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", type=float, default=WHOLE, help="seconds for everything")
    parser.add_argument("--no-tests", action="store_true", help="claims alone")
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims; default all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: there is no CUDA device here; make bench measures the CPU set", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.whole
    folder = ledger.ROOT / "runs" / "bench" / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    print(environment())
    if not arguments.no_tests and not correct(folder, end):
        print("make gpu: the kernels are not correct here (see above); nothing was timed", file=sys.stderr)
        keep(folder)
        return 1
    rows = claims(folder, arguments.names or list(MODULES), end)
    finish(folder, rows)
    keep(folder)
    return 0


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


def correct(folder: Path, end: float) -> bool:
    """Whether the tests of the kernels pass on this GPU; what they print is shown and kept."""
    tests = [name for name in ("tests/flashsink", "tests/gpu") if (ledger.ROOT / name).is_dir()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", *tests, "-m", "not smollm and not slow"]
    command += ["-p", "no:cacheprovider"]
    left = min(CORRECTNESS, end - time.monotonic())
    try:
        done = subprocess.run(command, cwd=ledger.ROOT, capture_output=True, text=True, timeout=left, check=False)
        text, passed = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as expired:
        # -x ends at the first failure, so there was none; the rest of the time belongs to the claims
        output, passed = expired.stdout or b"", True
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        text += f"\nthe tests were stopped after {left:.0f} s, without a failure so far\n"
    (folder / "tests.log").write_text(text, encoding="utf-8")
    print(text if not passed else "\n".join(text.splitlines()[-3:]), flush=True)
    return passed


def claims(folder: Path, names: list[str], end: float) -> list[Row]:
    """Runs the claims and gives all rows; see the module for what happens to those that break the device."""
    store, left = folder / "rows.jsonl", list(names)
    while left and end - time.monotonic() > 10:
        budget = end - time.monotonic() - 8
        command = [sys.executable, "-m", "bench.run", *left, "--dry", "--budget", str(budget), "--rows", str(store)]
        seen = len(_rows(store))
        try:
            code = subprocess.run(command, cwd=ledger.ROOT, timeout=budget + 6, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 4
        if code == 0:
            return _rows(store)
        # rows of a module come in order: the last that reported is where it broke
        reported = {row["claim"] for row in _rows(store)[seen:]}
        broken = max((i for i, name in enumerate(left) if _claims_of(name) & reported), default=0)
        left = left[broken + 1 :]
        print(f"make gpu: the process ended with {code}; going on with {', '.join(left) or 'nothing'}", flush=True)
    rows = _rows(store)
    origin = ledger.origin(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for name in left:
        for claim in sorted(_claims_of(name)):
            rows.append({**origin, "claim": claim, "provider": "all", "shape": "all", "verdict": "no time left"})
    return rows


def _claims_of(module: str) -> set[str]:
    import importlib

    return {claim.name for claim in importlib.import_module(f"bench.claims.{module}").CLAIMS}


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def finish(folder: Path, rows: list[Row]) -> None:
    """The ledger, ``rows.csv``, ``rows.json`` and the table, which is printed last."""
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
    text += f"\n{met} met, {missed} missed, {len(judged) - met - missed} without a number; all rows in {folder}"
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)


def keep(folder: Path) -> None:
    """A copy in ``$OUT``, which a machine that is lent for a command gives back."""
    out = os.environ.get("OUT")
    if out:
        shutil.copytree(folder, Path(out) / folder.name, dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
