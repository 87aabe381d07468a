"""The ledger: one row per measurement, and the verdict of a ratio against its target."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
LEDGER = RESULTS / "ledger.csv"
FIELDS = ["date", "commit", "device", "torch", "triton", "claim", "provider", "shape", "dtype"]
FIELDS += ["p20_ms", "p50_ms", "p80_ms", "peak_mib"]
# of the ratio named by metric (time, memory, bandwidth, MFU): percentiles over paired samples
FIELDS += ["metric", "against", "ratio_p20", "ratio", "ratio_p80", "target", "verdict", "note"]

CHANGE = ("results/ledger.csv", "results/corpus.csv", "LOG.md", "README.md")

Row = dict[str, str]
HOST_BOUND = "host-bound"  # ends the note of a step in which the device waited for the host


def read(path: Path = LEDGER) -> list[Row]:
    """All rows, oldest first; missing fields are empty."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{field: row.get(field) or "" for field in FIELDS} for row in csv.DictReader(file)]


def append(rows: Iterable[Row], path: Path | None = None, fields: Sequence[str] = FIELDS) -> None:
    """Appends rows to ``path``, by default the ledger.

    Raises:
        ValueError: the file has other columns.
    """
    path = path or LEDGER
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if header != list(fields):
            raise ValueError(f"{path}: expected the columns {','.join(fields)}, got {','.join(header)}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def verdict(target: str, ratio: float) -> str:
    """ "met" or "missed" for a target such as "<= 1.25" or ">= 2"; "report" where there is none."""
    if not target:
        return "report"
    sign, _, limit = target.partition(" ")
    if sign not in ("<=", ">="):
        raise ValueError(f"target: expected '<= number' or '>= number', got {target!r}")
    met = ratio <= float(limit) if sign == "<=" else ratio >= float(limit)
    return "met" if met else "missed"


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, with linear interpolation."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def origin(device: torch.device) -> Row:
    """The columns that say when, from which commit and on what a row was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def commit(tree: Path = ROOT) -> str:
    """``$BENCH_COMMIT`` (for a copy of the tree without its history), else what git says."""
    given = os.environ.get("BENCH_COMMIT", "").strip()
    if given:
        return given

    def git(*words: str) -> str:
        command = ["git", "-C", str(tree), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    # ledger, log and page change with every run; any other difference from the commit makes it "dirty"
    changed = git("status", "--porcelain", "--", ".", *(f":!bench/{name}" for name in CHANGE))
    head = git("rev-parse", "--short=7", "HEAD")
    return f"{head}-dirty" if head and changed else head or "unknown"
