"""Where numbers go besides metrics.jsonl: whatever fails there is named once, and training goes on."""

from __future__ import annotations

import logging
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avsr.config import LogConfig, load_config
from avsr.errors import UserError
from avsr.training.metrics import MetricsLogger, read_metrics
from avsr.training.run import train
from avsr.training.trainer import Trainer


class Sink:
    """Stands for the package wandb and what it returns; fails at the point ``at``."""

    def __init__(self, at: str) -> None:
        self.at, self.rows = at, []  # type: ignore[var-annotated]

    def init(self, **_: Any) -> Sink:
        self._reach("start")
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step == 2:
            self._reach("write")
        self.rows.append(step)

    def finish(self) -> None:
        self._reach("close")

    def _reach(self, point: str) -> None:
        if point == self.at:
            raise RuntimeError(f"no {point}\nand a second line")


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    threads = threading.active_count()
    log = MetricsLogger(tmp_path, LogConfig())
    for step, ce in ((1, 2.5), (2, float("nan")), (3, 1.5)):
        log.write({"step": step, "ce": ce, "tokens": 7 * step, "name": "text"})
    assert threading.active_count() == threads  # a loader process is forked: no thread may hold a lock meanwhile
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["ce", "tokens"]
    assert [(event.step, event.value) for event in events.Scalars("ce")] == [(1, 2.5), (3, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("tokens")] == [(1, 7), (2, 14), (3, 21)]


@pytest.mark.parametrize(("at", "reached"), [("start", []), ("write", [1]), ("close", [1, 2, 3, 4])])
def test_a_log_that_fails_is_named_once_and_training_goes_on(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at: str,
    reached: list[int],
) -> None:
    sink = Sink(at)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=sink.init))
    with caplog.at_level(logging.WARNING):
        run = train(load_config(str(tiny_recipe(tmp_path)), ["log.wandb=mine"]))
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]
    assert caplog.text.count("W&B") == 1 and f"no {at}" in caplog.text and "second line" not in caplog.text
    assert sink.rows == reached


def test_tensorboard_that_cannot_begin_leaves_the_others(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink, fit = Sink(""), Trainer.fit

    def blocked(self: Trainer) -> None:
        (tmp_path / "run" / "tensorboard").touch()
        fit(self)

    monkeypatch.setattr(Trainer, "fit", blocked)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=sink.init))
    train(load_config(str(tiny_recipe(tmp_path)), ["log.wandb=mine", "log.tensorboard=true"]))
    assert sink.rows == [1, 2, 3, 4] and caplog.text.count("TensorBoard gets no more") == 1


def test_a_full_disk_ends_tensorboard_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No file may grow beyond a limit, then it may."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLogger(tmp_path, LogConfig())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
        for step in range(1, 60):
            log.write({"step": step, "ce": 1.0 / step, "accuracy": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    log.write({"step": 60, "ce": 0.0, "accuracy": 0.5})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 61))
    assert caplog.text.count("TensorBoard gets no more") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_rows_that_cannot_be_dropped_for_a_resume_stay(tmp_path: Path) -> None:
    log = MetricsLogger(tmp_path, LogConfig(tensorboard=False))
    for step in range(1, 40):
        log.write({"step": step, "ce": 1.0 / step})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(UserError, match=r"resume: cannot write .*metrics\.jsonl: .*File too large"):
            MetricsLogger(tmp_path, LogConfig(tensorboard=False), resume_at=30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    MetricsLogger(tmp_path, LogConfig(tensorboard=False), resume_at=30)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 31))


def test_wandb_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb: .* pip install wandb"):
        MetricsLogger(tmp_path, LogConfig(tensorboard=False, wandb="mine"))
