"""A rank that hangs, in a step or at the start, is named with its stage and ended."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import avsr.training.run as run_module
from avsr.errors import EXIT_HUNG, UserError
from avsr.runtime.progress import ProgressBar
from avsr.training import watchdog
from avsr.training.watchdog import STAGES, Watchdog

pytestmark = pytest.mark.integration

HANGING = """
    import sys, time
    import avsr.training.run
    from avsr.cli import main
    from avsr.models.speech_llm import SpeechLLM
    from avsr.training import watchdog
    from avsr.training.engine import import_deepspeed

    point, recipe, timeout = sys.argv[1:]
    import_deepspeed()
    real = SpeechLLM.forward
    calls = [0]

    def hang(*arguments):
        calls[0] += arguments[0].training if arguments else 3
        if calls[0] == 3:
            time.sleep(600)
        return real(*arguments)

    if point == "start":
        avsr.training.run.start_distributed = lambda watchdog: hang()
        watchdog.START_LEAST = 1.0
    else:
        SpeechLLM.forward = hang
    main(["train", recipe, f"training.timeout={timeout}"])
"""


@pytest.mark.parametrize(
    ("point", "timeout", "where"),
    [
        ("start", 0.5, r"the start \(process group\) for \d+ s \(training\.timeout = 0\.5 s\)"),
        ("forward", 2.0, r"forward of step 3 for \d+ s \(training\.timeout = 2 s\)"),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_stage_and_ended(
    tiny_recipe: Callable[..., Path], tmp_path: Path, point: str, timeout: float, where: str
) -> None:
    recipe = tiny_recipe(tmp_path, **{"training.validate_every": 100})
    command = [sys.executable, "-c", textwrap.dedent(HANGING), point, str(recipe), str(timeout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == EXIT_HUNG, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("avsr: ")]
    assert re.fullmatch(f"avsr: rank 0 hangs in {where}", line)
    assert "in hang" in done.stderr  # the traceback says where


def test_a_start_that_hangs_says_in_which_stage(
    tiny_recipe: Callable[..., Path], run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    ended = threading.Event()

    def hang(*arguments: Any, **options: Any) -> None:
        watchdog.START_LEAST = 0.5
        ended.wait(60)
        raise UserError("ended")

    def leave(problem: str) -> None:
        left.append(problem)
        ended.set()

    monkeypatch.setattr(watchdog, "START_LEAST", watchdog.START_LEAST)
    monkeypatch.setattr(watchdog, "_leave", leave)
    monkeypatch.setattr(run_module, "load_dataset", hang)
    with pytest.raises(UserError, match="ended"):
        run(tiny_recipe(tmp_path), "training.timeout=0.5")
    assert re.fullmatch(r"rank 0 hangs in the start \(manifests\) for \d+ s \(training\.timeout = 0\.5 s\)", left[0])


@pytest.mark.parametrize(
    ("places", "said"),
    [
        # one reads for long, the others wait for it
        ([("manifests", 0, 1.0), ("manifests", 0, 100.0)], ""),
        ([("manifests", 0, 70.0), ("engine", 0, 90.0)], "rank 0 hangs in the start (manifests) for 70 s"),
        ([("data", 1, 70.0), ("engine", 0, 90.0)], "rank 1 hangs in the start (engine) for 90 s"),
        # and in an evaluation, where one may have more to decode
        ([("results", 0, 100.0), ("decoding", 0, 1.0)], ""),
        ([("results", 0, 100.0), ("decoding", 0, 70.0)], "rank 1 hangs in decoding for 70 s"),
        # in a step one is enough
        ([("forward", 3, 1.0), ("data", 3, 70.0)], "rank 1 hangs in data of step 3 for 70 s"),
        ([("forward", 3, 1.0), ("data", 3, 50.0)], ""),
        # the data of the next step is read before the weights are updated, with sums that all ranks add up
        ([("optimizer", 2, 69.0), ("metrics", 2, 69.0), ("data", 3, 69.0)], "rank 2 hangs in data of step 3 for 69 s"),
        ([("backward", 2, 70.0), ("data", 3, 69.0)], "rank 0 hangs in backward of step 2 for 70 s"),
    ],
)
def test_at_the_start_all_ranks_have_to_stand_still(places: list[tuple[str, int, float]], said: str) -> None:
    dog: Any = Watchdog(60.0)
    dog._ranks = len(places)
    texts = {f"rank/{n}": f'[1, {step}, "{stage}", {age}]' for n, (stage, step, age) in enumerate(places)}
    store = SimpleNamespace(check=lambda keys: keys[0] in texts, get=texts.__getitem__)
    assert dog._judge(store).startswith(said) and bool(dog._judge(store)) == bool(said)


def test_a_long_start_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(watchdog, "NOTICE", 0.2)
    dog: Any = Watchdog(0.0)
    dog._ranks = 3
    model, engine = STAGES.index("model"), STAGES.index("engine")
    places = [(0, model, -40.0, 1), (0, engine, -35.0, 0), (0, engine, -35.0, 2)]
    dog._notice(places)
    assert not caplog.text
    time.sleep(0.25)
    for _ in range(3):
        dog._notice(places)
    (record,) = caplog.records
    assert record.getMessage() == "rank 1 loads the model, for 40 s so far; 2 of 3 ranks wait for it"
    time.sleep(0.25)
    dog._notice([(0, engine, -50.0, 0), (1, STAGES.index("data"), -50.0, 1)])  # no longer the start
    dog._notice([(0, engine, -50.0, 0)])
    assert caplog.records[1].getMessage() == "rank 0 makes the engine, for 50 s so far"


def test_what_moves_a_progress_bar_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setattr(watchdog, "START_LEAST", 0.0)
    monkeypatch.setattr(watchdog, "_leave", left.append)
    with Watchdog(0.6) as dog, ProgressBar("read", 30, shown=False) as bar:
        dog.enter("manifests", 0)
        for _ in range(20):
            time.sleep(0.05)
            bar.advance()
        assert not left
        time.sleep(1.0)
    assert left and "manifests" in left[0] and not ProgressBar.moved
    assert set(watchdog.START) < set(STAGES)
