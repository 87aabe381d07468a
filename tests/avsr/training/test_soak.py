"""Five hundred steps of two ranks with everything that goes wrong, in one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from avsr.training.metrics import read_metrics

STEPS = 500
STARTS = 25  # at most


def begin(seed: int, out: Path, recipe: Path, port: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    folder = Path(sys.executable).parent
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    command = [str(folder / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port)]
    command += [str(Path(__file__).with_name("soaking.py")), str(seed), str(out), str(recipe), "resume=true"]
    with (out / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.distributed
@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_training_survives_everything_at_once(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"training.steps": STEPS, "training.utterances": 2, "training.save_every": 10, "deepspeed.stage": 2}
    more = {"training.validate_every": 50, "training.skip_nonfinite": 200, "loss.decorrelation": 1.0}
    recipe = tiny_recipe(tmp_path, **settings, **more)
    rng, run, out = random.Random(7), tmp_path / "run", tmp_path / "soak"
    out.mkdir()
    spoilt = starts = 0
    for starts in range(1, STARTS + 1):
        # the last start is left alone, for a long flat stretch
        rows = read_metrics(run)
        seed = starts if (rows[-1]["step"] if rows else 0) < STEPS // 2 else 0
        status = wait(begin(seed, out, recipe, 21000 + os.getpid() % 9000 + starts))
        if status == 0:
            break
        assert read_metrics(run), (out / "log").read_text(errors="replace")[-2000:]  # it must get off the ground
        last = run / "checkpoints" / "last"
        if rng.random() < 0.5 and last.is_dir() and (run / "checkpoints" / "previous").is_dir():
            path = rng.choice(sorted(last.glob("*.safetensors")))
            path.write_bytes(path.read_bytes()[:-7])
            spoilt += 1
    shown = (out / "log").read_text(errors="replace")[-4000:]
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), shown
    assert starts > 3 and spoilt > 0, "nothing went wrong: choose another seed"
    assert any(row.get("skipped") for row in rows)
    assert "No space left" in (out / "log").read_text(errors="replace")
    longest = max(out.glob("*.jsonl"), key=lambda path: len(path.read_text().splitlines()))
    seen = [json.loads(line) for line in longest.read_text().splitlines()]
    assert len(seen) > 150
    warm = seen[50]
    assert seen[-1]["resident"] <= 1.02 * warm["resident"], (warm, seen[-1])
    assert max(row["files"] for row in seen[50:]) <= warm["files"] + 3  # a checkpoint being written
    assert seen[-1]["files"] <= warm["files"]
    shutil.rmtree(run)
