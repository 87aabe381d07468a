"""The demo from end to end, cut to a few steps and utterances."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from avsr.errors import EXIT_INTERRUPTED
from avsr.tools import demo


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(75)])
def test_a_demo_that_is_stopped_says_that_it_begins_again(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path, overrides: list[str]) -> None:
        raise stop

    monkeypatch.setattr(sys, "argv", ["demo", f"--folder={tmp_path / 'demo'}"])
    with pytest.raises(SystemExit) as ended:
        demo.command("demo", "", "", run, lambda summary: demo.make_table("", ()))
    assert ended.value.code == (75 if isinstance(stop, SystemExit) else EXIT_INTERRUPTED)
    assert "begins the demo again" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.smollm
@pytest.mark.timeout(1800)
def test_the_demo_runs_twice_and_writes_its_summary(tmp_path: Path) -> None:
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    command = [sys.executable, "-m", "avsr.tools.demo", "training.steps=4", "training.validate_every=4", "data.limit=8"]
    for _ in range(2):  # the second replaces the first's runs
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "report: runs/demo/report.html" in done.stdout
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert summary["lambda"] == 50.0 and summary["utterances"] == 8
    assert summary["intermediate_activation_off"] > 1000  # delimiters of std 0.02 are massive from the start
    assert (tmp_path / "runs/demo/off/metrics.json").is_file() and (tmp_path / "runs/demo/on/config.yaml").is_file()
    assert "<svg" in (tmp_path / "runs/demo/report.html").read_text()
