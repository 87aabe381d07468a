"""Evaluation on many devices: ``deepspeed [--hostfile H] --module avsr.evaluate RUN [key=value ...]``, or torchrun.

The ranks share the decoding and write the files of ``avsr evaluate RUN``. It can be stopped, and go on with another
number of ranks.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from avsr.config import read_run_config
from avsr.errors import guarded
from avsr.evaluation.run import evaluate, score_lines
from avsr.training.engine import start_distributed
from avsr.training.run import process_group
from avsr.training.watchdog import Watchdog


def main() -> None:
    """Entry point for the ``deepspeed`` launcher."""
    parser = argparse.ArgumentParser(prog="avsr.evaluate")
    parser.add_argument("run", type=os.path.expanduser)
    parser.add_argument("--checkpoint", default="best")
    parser.add_argument("--out", type=os.path.expanduser, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    arguments = parser.parse_intermixed_args()
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    with guarded(), process_group():
        config = read_run_config(arguments.run, arguments.overrides)
        with Watchdog(config.training.timeout) as watchdog:
            rank, _ = start_distributed(watchdog)
            given = arguments.run, arguments.overrides, arguments.checkpoint, arguments.out
            scores = evaluate(*given, lambda stage: watchdog.enter(stage, 0))
    if rank == 0:
        print("\n".join(score_lines(scores)))


if __name__ == "__main__":
    main()
