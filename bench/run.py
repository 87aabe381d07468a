"""``make bench``: measures the claims on this machine and appends every row to ``bench/ledger.csv``.

``python -m bench.run [NAME ...]``: all modules of :mod:`bench.claims`, or the named ones.
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

if not __package__:  # run as a script: the repository root is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import ledger
from bench.claims import MODULES
from bench.harness import Bench, Comparison, DeviceLost, one_line
from bench.ledger import Row

# how a time budget is shared out; all others have 1
WEIGHTS = {"training_step": 4.0, "options": 4.0, "attention_statistics": 3.0, "packed_headline": 2.0, "long_rows": 1.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODULES))
    parser.add_argument("--seconds", type=float, default=0.0, help="for the rounds of a comparison")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--layers", type=int, default=0, help="of the models whose steps are measured; 0 = all")
    parser.add_argument("--dry", action="store_true", help="print, but leave the ledger alone")
    parser.add_argument(
        "--rows", type=Path, help="also append to this file what starts and every row, a JSON object a line"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(MODULES)
    if unknown:
        parser.error(f"NAME: expected some of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []

    def keep(row: Row) -> None:
        if arguments.rows is not None:
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def emit(row: Row) -> None:
        rows.append(row)
        print(line(row), flush=True)
        keep(row)

    bench = Bench(device, arguments.seconds or (0.25 if device.type == "cuda" else 1.5), emit)
    names = arguments.names or list(MODULES)
    lost = measure(bench, names, arguments.budget, arguments.layers, lambda name: keep({"started": name}))
    if not arguments.dry:
        ledger.append(rows)
    return 3 if lost else 0


def measure(
    bench: Bench, names: list[str], budget: float, layers: int, started: Callable[[str], None] = lambda name: None
) -> bool:
    """Runs the modules one after another, each with its share of the time that is left, and tells ``started`` of each.
    Returns whether the device was lost on the way; a module that began is then over, and prints a line that says so.
    """
    end = time.monotonic() + budget
    for index, name in enumerate(names):
        weights = [WEIGHTS.get(other, 1.0) for other in names[index:]]
        now = time.monotonic()
        bench.deadline = now + max(end - now, 0.0) * weights[0] / sum(weights)
        module = importlib.import_module(f"bench.claims.{name}")
        options = {"layers": layers} if layers and name in ("training_step", "loss_memory", "options") else {}
        started(name)
        print(f"--- {name}: {(module.__doc__ or name).splitlines()[0]}", flush=True)
        if bench.deadline <= now:
            bench.row(nothing(module.CLAIMS[0].name, bench), "all", verdict="no time left")
            continue
        try:
            module.run(bench, **options)
        except DeviceLost as error:
            bench.row(nothing(module.CLAIMS[0].name, bench), "all", verdict=f"error: device lost: {one_line(error)}")
            return True
        except Exception as error:
            bench.row(nothing(module.CLAIMS[0].name, bench), "all", verdict=f"error: {one_line(error)}")
        bench.clean()
    return False


def nothing(claim: str, bench: Bench) -> Comparison:
    return Comparison(claim, "all", torch.bfloat16 if bench.cuda else torch.float32, ())


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
