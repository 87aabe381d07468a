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
def test_a_demo_that_is_stopped_says_that_it_goes_on(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path, overrides: list[str]) -> None:
        raise stop

    monkeypatch.setattr(sys, "argv", ["demo", f"--folder={tmp_path / 'demo'}"])
    with pytest.raises(SystemExit) as ended:
        demo.command("demo", "", "", run, lambda summary: demo.make_table("", ()))
    assert ended.value.code == (75 if isinstance(stop, SystemExit) else EXIT_INTERRUPTED)
    assert "the same command goes on" in capsys.readouterr().err


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo with stages that do nothing but say what was done; a training leaves a checkpoint."""
    done: list[str] = []

    def run_command(*arguments: str) -> None:
        done.append(" ".join(arguments[:2]) + (" on" if "resume=true" in arguments else ""))
        for name, run in (argument.split("=", 1) for argument in arguments if argument.startswith("run=")):
            assert name == "run"
            checkpoint = Path(run) / "checkpoints" / "last"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (Path(run) / "config.yaml").touch()
        if done.count(done[-1]) == 1 and done[-1] == "train demo_decorrelation":
            raise SystemExit(75)

    def warm(config: object, path: Path, steps: int) -> None:
        if not path.is_file():
            path.touch()
            done.append("projector")

    def untrained(overrides: list[str]) -> float:
        done.append("before")
        return 0.9

    monkeypatch.setattr(demo, "run_command", run_command)
    monkeypatch.setattr(demo, "warm_projector", warm)
    monkeypatch.setattr(demo, "_untrained", untrained)
    monkeypatch.setattr(demo, "load_run", lambda *_: (None, None, None))
    monkeypatch.setattr(demo, "test_sets", lambda *_: {"a": None})
    monkeypatch.setattr(demo, "evaluate_model", lambda *_: None)
    monkeypatch.setattr(demo, "analyze_model", lambda *_: {})
    monkeypatch.setattr(demo, "write_results", lambda *_: None)
    monkeypatch.setattr(demo, "summarise", lambda before, analyses, seconds: {"before": before, "seconds": seconds})
    return done


BEGUN = ["synth data/demo", "projector", "before", "train demo"]


def test_a_demo_that_was_stopped_goes_on(parts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with pytest.raises(SystemExit):
        demo.run_demo(folder, [])
    assert parts == [*BEGUN, "train demo_decorrelation"]
    parts.clear()
    summary = demo.run_demo(folder, [])
    assert parts == ["synth data/demo", "train demo on", "train demo_decorrelation on"]
    assert summary["before"] == 0.9 and summary["seconds"] > 0
    parts.clear()
    with pytest.raises(SystemExit):  # one that is done begins again
        demo.run_demo(folder, [])
    assert parts == [*BEGUN, "train demo_decorrelation"]


@pytest.mark.parametrize("change", ["overrides", "damaged", "a training without a checkpoint"])
def test_a_demo_that_cannot_go_on_begins_again(parts: list[str], tmp_path: Path, change: str) -> None:
    folder = tmp_path / "demo"
    with pytest.raises(SystemExit):
        demo.run_demo(folder, [])
    parts[:] = ["train demo_decorrelation"]  # which does not stop it any more
    if change == "damaged":
        (folder / "unfinished.json").write_text('{"overrides": [')
    elif change != "overrides":
        (folder / "on" / "checkpoints" / "last").rmdir()
    demo.run_demo(folder, ["training.seed=2"] if change == "overrides" else [])
    again = [*BEGUN, "train demo_decorrelation"]
    kept = ["synth data/demo", "train demo on", "train demo_decorrelation"]
    assert parts[1:] == (kept if change.startswith("a training") else again)
    assert not (folder / "unfinished.json").exists()


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
