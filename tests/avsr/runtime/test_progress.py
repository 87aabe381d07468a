"""The one progress bar."""

from __future__ import annotations

import sys

import pytest

from avsr.runtime import progress


def test_without_a_terminal_a_line_now_and_then_with_an_eta(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(float(10 * tick) for tick in range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress.ProgressBar("train", 6) as bar:
        for step in range(6):
            bar.advance(1, f"ce {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("train 6/6") and lines[-1].endswith("ce 5")
    assert 1 < len(lines) < 6
    assert all("ETA" in line for line in lines)


def test_on_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.ProgressBar("train", 3) as bar:
        bar.advance(3)
    assert "3/3" in capsys.readouterr().err


def test_hidden_bars_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.ProgressBar("train", 3, shown=False) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""
