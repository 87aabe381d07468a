"""``make bench``: measures the claims on this machine and appends every row to ``bench/results/ledger.csv``.

``python -m bench.run [NAME ...]``: all modules of :mod:`bench.claims`, or the named ones. ``data`` measures large
corpora (:mod:`bench.corpus.run`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.claims import MODULES
from bench.corpus.run import main as measure_corpora
from bench.runner import ledger, rehearsal
from bench.runner.ledger import Row
from bench.runner.measure import Bench, Comparison, DeviceLost, one_line

# shares of a time budget; all other modules have 1
WEIGHTS = {"training_step": 4.0, "options": 4.0, "attention_statistics": 3.0, "packed_headline": 2.0, "long_rows": 1.5}


def main() -> int:
    if sys.argv[1:2] == ["data"]:
        return measure_corpora(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODULES))
    parser.add_argument("--seconds", type=float, default=0.0, help="for the rounds of one comparison")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--layers", type=int, default=0, help="of the models whose steps are measured; 0 = all")
    parser.add_argument("--dry", action="store_true", help="print, but leave the ledger alone")
    parser.add_argument("--rows", type=Path, help="append what is measured to this JSON-lines file, and go on after it")
    parser.add_argument("--in-order", action="store_true", help="of what time is left, half is for the next module")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(MODULES)
    if unknown:
        parser.error(f"NAME: expected some of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
    rehearsal.prefer_triton()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []

    def keep(entry: dict[str, str]) -> None:
        if arguments.rows is not None:
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def emit(row: Row) -> None:
        rows.append(row)
        print(line(row), flush=True)
        keep(row)

    seconds = arguments.seconds or (0.25 if device.type == "cuda" else 1.5)
    bench = Bench(device, seconds, emit, layers=arguments.layers, rehearsal=rehearsal.ON)
    bench.done = {entry["done"] for entry in entries(arguments.rows) if "done" in entry}
    bench.finished = lambda key: keep({"done": key})
    if rehearsal.ON:
        bench.seconds, bench.least_rounds = 0.0, 1
    names, share = arguments.names or list(MODULES), 0.5 if arguments.in_order else 0.0
    lost = measure(bench, names, arguments.budget, keep, share)
    if not arguments.dry:
        ledger.append(rows)
    return 3 if lost else 0


def entries(path: Path | None) -> list[dict[str, str]]:
    """What a run has written so far: rows, and what it ``started``, has ``done`` and ``finished``. A killed process may
    leave half a line."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def measure(
    bench: Bench, names: list[str], budget: float, keep: Callable[[dict[str, str]], None], least: float = 0.0
) -> bool:
    """Measures the modules one after another, each with its share of the remaining time, ``least`` or more; tells
    ``keep`` which it has started and finished. Returns whether the device was lost, which ends the run. A module that
    fails becomes a row that says so."""
    end = time.monotonic() + budget
    for index, name in enumerate(names):
        weights = [WEIGHTS.get(other, 1.0) for other in names[index:]]
        now = time.monotonic()
        bench.deadline = now + max(end - now, 0.0) * max(weights[0] / sum(weights), least)
        bench.late = False
        module = importlib.import_module(f"bench.claims.{name}")
        whole = Comparison(module.CLAIMS[0].name, "all", bench.dtype)
        keep({"started": name})
        print(f"--- {name}: {(module.__doc__ or name).splitlines()[0]}", flush=True)
        if bench.deadline <= now:
            bench.row(whole, "all", verdict="no time left")
            continue
        try:
            for comparison in module.comparisons(bench):
                bench.compare(comparison)
        except DeviceLost as error:
            bench.row(whole, "all", verdict=f"error: device lost: {one_line(error)}")
            return True
        except Exception as error:
            bench.row(whole, "all", verdict=f"error: {one_line(error)}")
        if not bench.late:
            keep({"finished": name})
        bench.clean()
    return False


def line(row: Row) -> str:
    """A row for people."""
    parts = [f"{row['claim']:22s} {row['shape'][:52]:52s} {row['provider'][:48]:48s}"]
    if row.get("p50_ms"):
        parts.append(f"{float(row['p50_ms']):10.3f} ms")
    if row.get("peak_mib"):
        parts.append(f"{float(row['peak_mib']):9.1f} MiB")
    if row.get("ratio"):
        spread = f" ({row['ratio_p20']}..{row['ratio_p80']})" if row.get("ratio_p20") else ""
        parts.append(f"{row.get('metric', '')} ratio {row['ratio']}{spread}")
    parts.append(f"{row.get('target', '')} {row.get('verdict', '')}".strip())
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
