"""What a step makes the host wait for, counted as for a GPU, and how often the ranks meet in it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("task", ["audio", "audiovisual"])
def test_a_step_waits_for_deepspeed_alone_and_the_loop_reduces_once(
    av_recipe: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    """From a cache; and with encoders inside the model, packed, in two micro-batches."""
    inside = {"data.cache": None, "training.packed": True, "training.accumulation": 2, "training.utterances": 2}
    recipe = av_recipe(tmp_path, task, **{"loss.decorrelation": 2.0, **(inside if task == "audiovisual" else {})})
    command = [sys.executable, "-m", "bench.step_counts", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    places = re.findall(r"stops in \w+: (\S+)", done.stdout)
    assert places and [place for place in places if not place.startswith("deepspeed/")] == []
    stages, *rows = (line.split() for line in done.stdout.splitlines()[:4])
    numbers = {name: dict(zip(stages[2:], map(float, values), strict=True)) for name, *values in rows}
    assert numbers["stops"]["forward"] == numbers["stops"]["metrics"] == 0
    meetings = numbers["collectives"]
    assert meetings["metrics"] == 1 and meetings["forward"] == meetings.get("counts", 0) == meetings["loop"] == 0
    assert numbers["operators"]["forward"] > 100
