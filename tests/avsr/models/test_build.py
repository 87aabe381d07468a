"""Loading a run: what its weights may not be, and what is said where it is not used as it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avsr.config import read_run_config, to_yaml
from avsr.evaluation.run import evaluate
from avsr.models.build import load_run
from avsr.models.weights import WEIGHTS

Refuse = Callable[..., str]
CPU = torch.device("cpu")
NOT_FINITE = "has values that are not finite"


def spoil(path: Path, name: str, value: float) -> None:
    """Puts ``value`` at the end of a tensor."""
    state = load_file(str(path))
    state[name].view(-1)[-1] = value
    save_file(state, str(path))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_every_command(
    run_folder: Path, refuse: Refuse, value: float
) -> None:
    path, name = run_folder / "checkpoints" / "best" / WEIGHTS, "projectors.audio.2.bias"
    spoil(path, name, value)
    for command in (["evaluate"], ["transcribe", "a.wav"], ["analyze"], ["act-search"]):
        message = refuse(command[0], run_folder, *command[1:])
        assert message.startswith(f"avsr: {path}: {name} {NOT_FINITE}") and "\n" not in message
    assert not (run_folder / "metrics.json").exists()


def test_so_are_initial_weights_and_those_of_an_average(
    run_folder: Path, refuse: Refuse, refuse_training: Refuse, tmp_path: Path
) -> None:
    best = run_folder / "checkpoints" / "best"
    spoil(best / WEIGHTS, "delimiters", float("inf"))
    key = f"training.initial_weights={best / WEIGHTS}"
    assert f"training.initial_weights: {best / WEIGHTS}: delimiters {NOT_FINITE}" in refuse_training(
        key, f"run={tmp_path / 'other'}"
    )
    for step in (1, 2):
        shutil.copytree(best, best.with_name(f"step-{step:06d}"))
    assert f"step-000001/{WEIGHTS}: delimiters {NOT_FINITE}" in refuse("average", run_folder)
    assert not best.with_name("average").exists()


@pytest.mark.parametrize(
    ("part", "name", "key"),
    [
        ("tiny_llm", "model.layers.1.mlp.up_proj.weight", "model.llm.name"),
        ("tiny_whisper", "encoder.layers.1.fc1.bias", "model.audio.encoder.name"),
    ],
)
def test_so_are_the_frozen_parts(
    run_folder: Path, refuse: Refuse, tmp_path: Path, request: pytest.FixtureRequest, part: str, name: str, key: str
) -> None:
    folder = shutil.copytree(request.getfixturevalue(part), tmp_path / part)
    spoil(folder / WEIGHTS, name, float("nan"))
    message = refuse("evaluate", run_folder, f"{key}={folder}")
    assert f"{name.removeprefix('encoder.')} {NOT_FINITE}" in message and str(folder) in message


def test_model_keys_that_are_not_as_in_training_are_said(
    run_folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    load_run(run_folder, ["decode.beams=2", "data.limit=1", "noise.snr=[0]"], CPU)
    assert "trained with" not in caplog.text
    changes = ["model.prompts.audio=Say it.", "model.audio.compression.rate=2", "model.lora.alpha=1"]
    evaluate(run_folder, [*changes, "data.limit=1"])
    assert [line for line in caplog.messages if "trained with" in line] == [
        "model.audio.compression.rate: trained with 4, evaluated with 2",
        "model.prompts.audio: trained with 'Transcribe speech to text.', evaluated with 'Say it.'",
        "model.lora.alpha: trained with 8.0, evaluated with 1.0",
    ]
    caplog.clear()
    config = read_run_config(run_folder)
    config.model.audio.encoder.pad_to_30s = True
    (run_folder / "config.yaml").write_text(to_yaml(config))  # by hand, since the training
    load_run(run_folder, [], CPU)
    assert "model.audio.encoder.pad_to_30s: trained with False, evaluated with True" in caplog.text
