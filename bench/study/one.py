"""``python -m bench.study.one KEY OUT``: trains one arm unless it is trained, measures it and writes its row."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

from avsr.errors import guarded
from avsr.training.checkpoint import STATE
from bench.study.arms import INFERENCE, START, arm_key
from bench.study.grid import ARMS
from bench.study.measure import measure, measure_inference, measure_start
from bench.study.train import config_of, train_arm


def main(key: str, out: Path) -> None:
    arm = ARMS[arm_key(key)]
    if key.startswith(START):
        row = measure_start(arm)
    elif key.startswith(INFERENCE):
        row = measure_inference(arm)
    else:
        config = config_of(arm)
        run = Path(config.run)
        if run.exists() and not _finished(run, config.training.steps):
            shutil.rmtree(run)
        if not run.exists():
            train_arm(arm)
        row = measure(arm)
    out.write_text(json.dumps(row) + "\n", encoding="utf-8")


def _finished(run: Path, steps: int) -> bool:
    state = run / "checkpoints" / "last" / STATE
    return state.is_file() and json.loads(state.read_text(encoding="utf-8"))["step"] == steps


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with guarded():
        main(sys.argv[1], Path(sys.argv[2]))
