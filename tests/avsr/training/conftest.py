"""Trainings in this process: run, stopped at a step, and compared."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from avsr.config import load_config
from avsr.errors import Interrupted
from avsr.training.metrics import MetricsLogger, read_metrics
from avsr.training.run import train


def _run(recipe: Path, *overrides: str) -> Path:
    before = dict(os.environ)
    try:
        return train(load_config(str(recipe), list(overrides)))
    finally:  # the launcher's variables must not reach later processes, whichever fixture trains
        os.environ.clear()
        os.environ.update(before)


def _weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(str(run / "checkpoints" / name / "model.safetensors"))


@pytest.fixture(scope="session")
def run() -> Callable[..., Path]:
    """``run(recipe, "key=value", ...)`` trains in this process and returns the run folder."""
    return _run


@pytest.fixture(scope="session")
def weights() -> Callable[..., dict[str, torch.Tensor]]:
    """``weights(run, name="last")``: the tensors of a checkpoint."""
    return _weights


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``stop(3, recipe, "key=value", ..., number=signal.SIGTERM)``: a training that is told to stop when the metrics of
    step 3 are written. Returns its last step."""

    def train_and_stop(step: int, recipe: Path, *overrides: str, number: int = signal.SIGTERM) -> int:
        write = MetricsLogger.write

        def write_and_stop(self: MetricsLogger, row: dict[str, Any]) -> None:
            write(self, row)
            if row["step"] == step:
                signal.raise_signal(number)

        config = load_config(str(recipe), list(overrides))
        with monkeypatch.context() as patch:
            patch.setattr(MetricsLogger, "write", write_and_stop)
            with pytest.raises(Interrupted):
                train(config)
        reached = read_metrics(Path(config.run))[-1]["step"]
        assert step <= reached < config.training.steps
        return reached

    return train_and_stop


@pytest.fixture(scope="session")
def agree() -> Callable[..., float]:
    """``agree(one, other, *keys, rel=1e-3, rtol=1e-2, atol=1e-4)``: two runs have the same curves of ``keys`` up to
    ``rel``, and the same weights up to the others. Returns the largest relative difference of the curves."""

    def compare(one: Path, other: Path, *keys: str, rel: float = 1e-3, rtol: float = 1e-2, atol: float = 1e-4) -> float:
        largest = 0.0
        for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
            for key in [key for key in keys if key in a]:
                assert b.get(key) == pytest.approx(a[key], rel=rel), (a["step"], key)
                largest = max(largest, abs(b[key] - a[key]) / max(abs(a[key]), 1e-12))
        others = _weights(other)
        for name, tensor in _weights(one).items():
            torch.testing.assert_close(others[name], tensor, rtol=rtol, atol=atol)
        return largest

    return compare


@pytest.fixture(scope="session")
def identical() -> Callable[[Path, Path], None]:
    """Two runs have the same curves and weights, bit for bit."""
    numbers = ("step", "epoch", "ce", "decorrelation", "grad_norm", "lr", "validation_ce")

    def compare(one: Path, other: Path) -> None:
        curves = [[[row.get(key) for key in numbers] for row in read_metrics(run)] for run in (one, other)]
        assert curves[1] == curves[0]
        others = _weights(other)
        for name, tensor in _weights(one).items():
            assert torch.equal(others[name], tensor), name

    return compare
