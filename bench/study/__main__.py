"""``make study``: trains and measures what has no row yet, then writes the tables.

Rows are kept in ``rows.jsonl`` next to this file, and a training that is killed goes on from its last checkpoint, so
that a restart continues where the last run stopped. The settled study comes first.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from avsr.errors import guarded
from avsr.runtime.machine import cpus
from bench.study import corpus, human, settled
from bench.study.export import export, import_rows, settled_arms
from bench.study.grid import ARMS, HIGH, INFERENCE, INFERENCES, SEEDS, STARTS, arm_key
from bench.study.measure import arm_of, row_of
from bench.study.rows import ROWS, read_rows
from bench.study.settled_tables import write_settled
from bench.study.tables import keep_utterances, write_results
from bench.study.train import FOLDER, projector_file

logger = logging.getLogger("avsr")


def run_all(full: bool, only: str, workers: int) -> list[str]:
    """Runs what is missing, ``workers`` at a time; returns the keys that failed (their logs are in runs/study/logs)."""
    done = read_rows()
    trained = [*settled.ARMS, *(key for key, arm in ARMS.items() if full or not arm.full)]
    keys = [*trained, *STARTS, *settled.INFERENCES, *INFERENCES]
    wanted = [key for key in keys if arm_key(key).startswith(only) and key not in done]
    if wanted:
        corpus.make_corpus()
    if any(arm_of(key).settled for key in wanted):
        human.make_corpus()
    for rate, layernorm in sorted({(arm_of(key).rate, arm_of(key).layernorm) for key in wanted}):
        projector_file(rate, layernorm=layernorm)
    # changes at inference need the trainings; of these, the first seed of a rate finds the heads for the others
    late = [key for key in wanted if key.startswith(INFERENCE)]
    first = [key for key in late if arm_of(key).seed == SEEDS[0]]
    failed: list[str] = []
    for wave in ([key for key in wanted if key not in late], first, [key for key in late if key not in first]):
        failed += _run(wave, workers)
    logger.info("%d of %d done", len(wanted) - len(failed), len(wanted))
    return failed


def _run(wanted: list[str], workers: int) -> list[str]:
    logs = FOLDER / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    began, whole = time.monotonic(), len(wanted)
    while wanted or running:
        while wanted and len(running) < workers:
            key = wanted.pop(0)
            running[key] = _start(key, logs)
            ended = whole - len(wanted) - len(running)
            hours = (time.monotonic() - began) / 3600 / max(ended, 1) * (len(wanted) + len(running))
            logger.info("%s (%d to go%s)", key, len(wanted), f", about {hours:.1f} hours" if ended else "")
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        for key, process in list(running.items()):
            if process.poll() is not None:
                del running[key]
                if process.returncode:
                    failed.append(key)
                    logger.warning("%s failed: %s", key, logs / f"{key}.log")
                else:
                    _keep(logs / f"{key}.json")
    return failed


def _start(key: str, logs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bench.study", "--row", key, str(logs / f"{key}.json")]
    with (logs / f"{key}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _keep(path: Path) -> None:
    row = json.loads(path.read_text(encoding="utf-8"))
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.study", description="The study of PLAN.md.")
    parser.add_argument("grid", nargs="?", default="base", choices=["base", "full"])
    parser.add_argument("--only", default="", metavar="PREFIX", help="arms whose key starts with it")
    parser.add_argument("--workers", type=int, default=cpus(), help="parallel trainings (default: one per core)")
    parser.add_argument("--row", nargs=2, metavar=("KEY", "FILE"), help="in this process: writes one row to FILE")
    parser.add_argument("--tables", action="store_true", help="only write the pages from the rows")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="makes a folder that trains without this project")
    parser.add_argument("--rate", type=int, default=HIGH, help=f"of --export, frames per token (default: {HIGH})")
    parser.add_argument("--import", type=Path, metavar="FILE", dest="rows", help="adds the rows of such a folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with guarded():
        if arguments.row is not None:
            key, file = arguments.row
            Path(file).write_text(json.dumps(row_of(key)) + "\n", encoding="utf-8")
            return
        if arguments.export is not None:
            export(arguments.export, arguments.rate)
            return
        if arguments.rows is not None:
            logger.info("%d rows added", import_rows(arguments.rows, settled_arms()))
            return
        failed = [] if arguments.tables else run_all(arguments.grid == "full", arguments.only, arguments.workers)
        keep_utterances()
        write_results()
        write_settled()
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
