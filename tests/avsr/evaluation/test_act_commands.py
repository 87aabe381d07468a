"""ACT by command: act-search, evaluate, transcribe and what they refuse."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import avsr.evaluation.act_search
from avsr.cli import main
from avsr.config import ActConfig, Config, load_config, to_yaml
from avsr.errors import UserError
from avsr.evaluation.act import calibrated
from avsr.evaluation.results import results_folder
from avsr.evaluation.run import evaluate
from avsr.evaluation.transcripts import transcribe_files
from avsr.models.build import load_run
from avsr.models.speech_llm import SpeechLLM

CPU = torch.device("cpu")
Refuse = Callable[..., str]
pytestmark = pytest.mark.integration


@pytest.fixture
def lively(run_folder: Path) -> Iterator[Path]:
    """A run whose adapters do something and whose validation finds heads."""
    from safetensors.torch import load_file, save_file

    for name in ("best", "last"):
        path = run_folder / "checkpoints" / name / "model.safetensors"
        generator = torch.Generator().manual_seed(3)
        state = load_file(str(path))
        for key, value in state.items():
            if "lora_" in key:
                state[key] = 0.3 * torch.randn(value.shape, generator=generator)
        save_file(state, str(path))
    yield run_folder


def hypotheses(run: Path, *overrides: str) -> list[str]:
    lines = (results_folder(run, [*overrides]) / "hypotheses.jsonl").read_text().splitlines()
    return [json.loads(line)["hypothesis"] for line in lines]


def decoding(run: Path, *overrides: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((results_folder(run, [*overrides]) / "metrics.json").read_text())["decoding"]
    return held


def test_search_and_evaluate_by_command(lively: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(lively)])
    plain = hypotheses(lively)
    capsys.readouterr()
    main(["act-search", str(lively), "act.beta=0.1"])
    shown = capsys.readouterr().out
    held = json.loads((lively / "act_heads.json").read_text())
    assert held["heads"] and f"{len(held['heads'])} of 12 heads" in shown and "act_heads.json" in shown
    assert (held["layers"], held["heads_per_layer"], held["beta"], held["threshold"]) == (3, 4, 0.1, 0.1)
    assert held["checkpoint"] == "best" and held["validation"].endswith("validation/manifest.jsonl")
    assert held["ce_act"] < held["ce"] and {row["heads"] for row in held["together"]} >= {1}
    assert len(held["alone"]) + held["heads_without_sink"] == 12
    main(["evaluate", str(lively), "act.beta=0.1"])
    assert decoding(lively, "act.beta=0.1")["act"] == {"beta": 0.1, "threshold": 0.1, "heads": len(held["heads"])}
    found = hypotheses(lively, "act.beta=0.1")
    every = ["act.beta=0.1", "act.heads=all", "act.threshold=0.15"]
    main(["evaluate", str(lively), *every])
    assert decoding(lively, *every)["act"] == {"beta": 0.1, "threshold": 0.15, "heads": 12}
    assert hypotheses(lively, *every) != plain == hypotheses(lively)
    named = ["act.beta=0.1", f"act.heads={lively / 'act_heads.json'}"]
    main(["evaluate", str(lively), *named])
    assert hypotheses(lively, *named) == found


def test_the_papers_beta_is_searched_where_act_is_off(lively: Path) -> None:
    main(["act-search", str(lively), "act.heads=" + str(lively / "other.json")])
    assert json.loads((lively / "other.json").read_text())["beta"] == 0.4
    assert not (lively / "act_heads.json").exists()


def test_transcribe_does_as_evaluate(lively: Path, tmp_path: Path) -> None:
    settings = ["act.beta=0.1", "act.heads=all"]
    evaluate(lively, settings)
    rows = list(map(json.loads, (results_folder(lively, settings) / "hypotheses.jsonl").open()))
    folder = tmp_path / "corpus" / "sentences"
    by_id = {row["id"]: folder / row["audio"] for row in map(json.loads, (folder / "manifest.jsonl").open())}
    files = [str(by_id[row["id"]]) for row in rows if row["set"] == "sentences"]
    texts = [text for _, text in transcribe_files(lively, files, settings)]
    assert texts == [row["hypothesis"] for row in rows if row["set"] == "sentences"]
    assert texts != [text for _, text in transcribe_files(lively, files, [])]


def test_beta_one_is_the_plain_path(lively: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avsr.evaluation.run.rtfx", lambda rows: 1.0)  # the one number that no evaluation repeats
    evaluate(lively, [])
    before = {name: (lively / name).read_bytes() for name in ("metrics.json", "hypotheses.jsonl")}

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("attached")

    monkeypatch.setattr(SpeechLLM, "attach", refuse)
    evaluate(lively, ["act.beta=1", "act.heads=all"])
    assert {name: (lively / name).read_bytes() for name in before} == before
    assert "act" not in decoding(lively)


def test_a_stopped_search_goes_on_and_finds_the_same(lively: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its second batch, and then while it decodes: what was computed is not computed again."""
    settings = ["act.beta=0.1", "training.frames=60", f"act.heads={lively / 'whole.json'}"]
    main(["act-search", str(lively), *settings])
    search = avsr.evaluation.act_search
    changes, rates, calls = search._batch_changes, search._error_rates, []

    def stop(*arguments: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return changes(*arguments)

    settings[-1] = f"act.heads={lively / 'stopped.json'}"
    monkeypatch.setattr(search, "_batch_changes", stop)
    with pytest.raises(KeyboardInterrupt):
        search.act_search(lively, settings)
    calls.clear()

    def rest(*arguments: Any) -> Any:
        calls.append(1)
        return changes(*arguments)

    def refuse(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_batch_changes", rest)
    monkeypatch.setattr(search, "_error_rates", refuse)
    with pytest.raises(KeyboardInterrupt):
        search.act_search(lively, settings)
    assert len(calls) == 1
    monkeypatch.setattr(search, "_batch_changes", refuse)
    monkeypatch.setattr(search, "_error_rates", rates)
    search.act_search(lively, settings)
    assert json.loads((lively / "stopped.json").read_text()) == json.loads((lively / "whole.json").read_text())
    assert not list(lively.glob("*.unfinished"))


def test_heads_found_with_other_settings_are_kept(lively: Path, refuse: Refuse) -> None:
    path = lively / "act_heads.json"
    main(["act-search", str(lively), "act.beta=0.1"])
    before = path.read_bytes()
    message = refuse("act-search", lively, "act.beta=0.1", "data.limit=2")
    assert f"{path} is the result of other settings (data.limit is 0 there, not 2): name another" in message
    path.write_text("{}")
    assert "does not say what made it" in refuse("act-search", lively, "act.beta=0.1")
    path.write_bytes(before)


def test_a_file_without_heads(lively: Path, caplog: pytest.LogCaptureFixture) -> None:
    main(["act-search", str(lively), "act.beta=0.1", "act.threshold=0.999"])
    assert json.loads((lively / "act_heads.json").read_text())["heads"] == []
    evaluate(lively, [])
    plain = hypotheses(lively)
    with caplog.at_level(logging.WARNING):
        evaluate(lively, ["act.beta=0.2"])
    assert "names no head" in caplog.text and "searched with beta 0.1 and threshold 0.999" in caplog.text
    assert hypotheses(lively, "act.beta=0.2") == plain and decoding(lively, "act.beta=0.2")["act"]["heads"] == 0


def test_an_old_run_has_act_off(run_folder: Path) -> None:
    config = load_config(str(run_folder / "config.yaml"))
    text = to_yaml(config)
    old = text[: text.index("act:\n")] + text[text.index("log:\n") :]
    assert old != text
    (run_folder / "config.yaml").write_text(old)
    assert load_run(run_folder, [], CPU)[0] == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("act.beta=1.5", ["act.beta", "1.5"]),
        ("act.beta=-0.1", ["act.beta", "-0.1"]),
        ("act.beta=nan", ["act.beta"]),
        ("act.threshold=0", ["act.threshold", "got 0"]),
        ("act.threshold=1", ["act.threshold", "got 1"]),
    ],
)
def test_numbers_out_of_range(refuse: Refuse, run_folder: Path, override: str, parts: list[str]) -> None:
    for command in ("evaluate", "act-search"):
        message = refuse(command, run_folder, override)
        assert all(part in message for part in parts) and "\n" not in message


GOOD = {"heads": [[0, 1]], "layers": 3, "heads_per_layer": 4, "beta": 0.4, "threshold": 0.1}


@pytest.mark.parametrize(
    ("held", "parts"),
    [
        (None, ["is missing", "avsr act-search", "act.heads=all"]),
        ("{", ["not a readable JSON file"]),
        ("[]", ["not a file of avsr act-search"]),
        (json.dumps({**GOOD, "heads": [1]}), ["not a file of avsr act-search"]),
        (json.dumps({**GOOD, "layers": 30}), ["expected 3 layers of 4 heads", "30"]),
        (json.dumps({**GOOD, "heads": [[0, 4]]}), ["no head [0, 4]"]),
        (json.dumps({**GOOD, "heads": [[-1, 0]]}), ["no head [-1, 0]"]),
    ],
)
def test_files_that_are_no_use(refuse: Refuse, run_folder: Path, held: str | None, parts: list[str]) -> None:
    path = run_folder / "act_heads.json"
    if held is not None:
        path.write_text(held)
    message = refuse("evaluate", run_folder, "act.beta=0.4")
    assert all(part in message for part in [*parts, "act.heads", str(path)]) and "\n" not in message


def test_a_file_that_cannot_be_written(lively: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the search."""
    monkeypatch.setattr(avsr.evaluation.act_search, "search", None)
    path = lively / "no" / "file.json"
    assert f"cannot write {path}: there is no folder {path.parent}" in refuse("act-search", lively, f"act.heads={path}")
    config = Config(run="none", act=ActConfig(beta=0.4))
    with pytest.raises(UserError, match="is missing"), calibrated(config, SpeechLLM.__new__(SpeechLLM)):
        pass
