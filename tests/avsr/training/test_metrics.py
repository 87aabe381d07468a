"""Logs of the metrics: whatever fails is named once, and training continues."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avsr.config import LogConfig
from avsr.errors import UserError
from avsr.training.metrics import MetricsLogger, read_metrics
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


@pytest.mark.parametrize(("at", "reached"), [("start", []), ("write", [1]), ("close", [1, 2, 3])])
def test_a_log_that_fails_is_named_once_and_gets_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str, reached: list[int]
) -> None:
    sink = Sink(at)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=sink.init))
    log = MetricsLogger(tmp_path, LogConfig(tensorboard=False, wandb="mine"))
    for step in (1, 2, 3):
        log.write({"step": step, "ce": 1.0})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert caplog.text.count("W&B") == 1 and f"no {at}" in caplog.text and "second line" not in caplog.text
    assert sink.rows == reached


@pytest.mark.integration
def test_a_training_goes_on_without_logs_that_fail(
    tiny_recipe: Callable[..., Path],
    run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """TensorBoard cannot begin, and W&B, which gets every step, cannot end."""
    sink, fit = Sink("close"), Trainer.fit

    def blocked(self: Trainer) -> None:
        (tmp_path / "run" / "tensorboard").touch()
        fit(self)

    monkeypatch.setattr(Trainer, "fit", blocked)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=sink.init))
    folder = run(tiny_recipe(tmp_path), "log.wandb=mine", "log.tensorboard=true")
    assert [row["step"] for row in read_metrics(folder)] == sink.rows == [1, 2, 3, 4]
    assert caplog.text.count("TensorBoard gets no more") == caplog.text.count("W&B gets no more") == 1


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


def test_what_a_full_disk_did_not_take_is_logged_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLogger(tmp_path, LogConfig(tensorboard=False))
    log.write({"step": 1, "ce": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.rename(tmp_path / "kept")
    path.mkdir()  # cannot be opened
    log.write({"step": 2, "ce": 0.9})
    path.rmdir()
    (tmp_path / "kept").rename(path)
    log.write({"step": 3, "ce": 0.8})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_wandb_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb: .* pip install wandb"):
        MetricsLogger(tmp_path, LogConfig(tensorboard=False, wandb="mine"))


def test_torn_lines_are_left_out_and_said_when_a_run_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [f'{{"step": {step}, "ce": {1 / step!r}}}\n' for step in range(1, 6)]
    path.write_text(whole[0] + '{"step": 2, "c\n' + whole[2] + "null\n[]\n" + '{"ce": 1.0}\n' + whole[4] + '{"step')
    log = MetricsLogger(tmp_path, LogConfig(tensorboard=False), resume_at=4)
    assert caplog.messages == [f"{path}: line 2 is no row, left out (5 in all)"]
    log.write({"step": 5, "ce": 0.25})
    assert path.read_text() == whole[0] + whole[2] + '{"step": 5, "ce": 0.25}\n'
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 5] and len(caplog.messages) == 1
