"""The console script with bad input: one clear message, status 2, no traceback, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from avsr.cli import main
from avsr.config import LogConfig, read_run_config, to_yaml
from avsr.evaluation.results import results_folder
from avsr.models.weights import WEIGHTS
from avsr.training.metrics import MetricsLogger, read_metrics

pytestmark = pytest.mark.integration

Tone = Callable[[Path, float], Path]
Refuse = Callable[..., str]
CPU = torch.device("cpu")


# Configs


def test_a_missing_config(refuse: Refuse) -> None:
    assert "'nosuch'" in refuse("train", "nosuch")
    assert "'demo'" in refuse("train", "dmo")


def test_config_errors_name_the_key(refuse: Refuse, tiny_recipe: Callable[..., Path], tmp_path: Path):
    recipe = tiny_recipe(tmp_path)
    assert "training.steps" in refuse("train", recipe, "training.step=3")
    assert "training.steps" in refuse("train", recipe, "training.steps=x")
    assert "65,504" in refuse("train", recipe, "training.precision=fp16")
    assert "key=value" in refuse("train", recipe, "resume")
    recipe.write_text("run: [\n")
    message = refuse("train", recipe)
    assert str(recipe) in message and "YAML" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.llm.name=package:not_installed/x.gguf", ["'not_installed' is not installed"]),
        ("model.audio.encoder.name=package:not_installed/x", ["'not_installed' is not installed"]),
        ("model.audio.encoder.name=package:not_installed.sub/x", ["'not_installed.sub' is not installed"]),
        ("model.llm.name=package:omegaconf/no/such/file", ["omegaconf", "no/such/file"]),
        ("model.llm.name=/no/such/folder", ["/no/such/folder"]),
        ("model.audio.encoder.name=./no.such", ["./no.such"]),
        ("model.llm.name=gone.gguf", ["gone.gguf"]),
        ("model.lora.targets=[no_proj]", ["model.lora.targets", "no_proj"]),
        ("model.delimiters.init=zeros", ["model.delimiters.init", "zeros", "normal:STD"]),
        ("model.llm.bos_token=<nothing>", ["model.llm.bos_token", "<nothing>"]),
        ("data.train=no/such.jsonl", ["no/such.jsonl"]),
    ],
)
def test_train_names_what_is_missing(refuse_training: Refuse, override: str, parts: list[str]) -> None:
    message = refuse_training(override)
    for part in parts:
        assert part in message


def test_after_a_refusal_the_same_command_can_be_repeated(refuse_training: Refuse) -> None:
    """A folder without a single step is not a run that could be lost."""
    for _ in range(2):
        assert "no/such.jsonl" in refuse_training("data.train=no/such.jsonl")


def test_a_run_that_exists_is_kept(refuse_training: Refuse, run_folder: Path) -> None:
    before = (run_folder / "config.yaml").read_text()
    message = refuse_training("training.steps=9")
    assert str(run_folder) in message and "resume=true" in message
    assert (run_folder / "config.yaml").read_text() == before


def test_an_unwritable_run_folder(refuse_training: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refuse_training(f"run={tmp_path / 'file' / 'run'}")
    assert "run" in message and str(tmp_path / "file") in message


@pytest.mark.parametrize("part", ["llm", "encoder"])
@pytest.mark.parametrize("damage", ["truncated", "empty folder", "broken config"])
def test_damaged_model_folders(
    refuse_training: Refuse, tiny_llm: Path, tiny_whisper: Path, tmp_path: Path, part: str, damage: str
) -> None:
    folder = tmp_path / "model"
    if damage == "empty folder":
        folder.mkdir()
    else:
        shutil.copytree(tiny_llm if part == "llm" else tiny_whisper, folder)
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 3000)
    if damage == "broken config":
        (folder / "config.json").write_text("{")
    key = {"llm": "model.llm.name", "encoder": "model.audio.encoder.name"}[part]
    message = refuse_training(f"{key}={folder}")
    assert str(folder) in message and key in message and "unknown key" not in message


# Runs and checkpoints


@pytest.mark.parametrize("command", ["evaluate", "analyze", "transcribe", "act-search"])
def test_no_run_and_a_run_without_a_checkpoint(
    tone: Tone, refuse: Refuse, run_folder: Path, tmp_path: Path, command: str
) -> None:
    files = [tone(tmp_path / "a.wav", 0.5)] if command == "transcribe" else []
    message = refuse(command, tmp_path / "nowhere", *files)
    assert str(tmp_path / "nowhere") in message and re.search("is (not a run|neither a run nor a model)", message)
    shutil.rmtree(run_folder / "checkpoints")
    message = refuse(command, run_folder, *files)
    assert str(run_folder) in message and "no checkpoint" in message


def test_a_damaged_checkpoint(refuse: Refuse, run_folder: Path) -> None:
    path = run_folder / "checkpoints" / "best" / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)
    assert str(path) in refuse("evaluate", run_folder)


@pytest.mark.parametrize(
    ("override", "tensor"),
    [
        ("model.lora.rank=8", "lora_A"),
        ("model.lora.rank=0", "lora_A"),
        ("model.lora.targets=[q_proj]", "v_proj"),
        ("model.projector.hidden=31", "projectors.audio.0"),
        ("model.projector.layernorm=false", "projectors.audio.3"),
        ("model.audio.compression.kind=stack", "projectors.audio.0.weight"),
    ],
)
def test_a_config_that_does_not_fit_names_tensor_and_key(
    refuse: Refuse, run_folder: Path, override: str, tensor: str
) -> None:
    message = refuse("evaluate", run_folder, override)
    key = override.split("=")[0]
    assert tensor in message and f"{key}: " in message and str(run_folder) in message
    assert message.count("!=") == 2  # only the heading and this key


def test_another_language_model_names_the_key(refuse: Refuse, run_folder: Path, tiny_llm: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other_llm"
    shutil.copytree(tiny_llm, other)
    config = LlamaConfig.from_pretrained(str(tiny_llm))
    config.hidden_size, config.head_dim = 64, 16
    LlamaForCausalLM(config).save_pretrained(other)
    message = refuse("evaluate", run_folder, f"model.llm.name={other}")
    assert "model.llm.name: " in message and str(other) in message and str(tiny_llm) in message
    assert "48" in message and "64" in message


def test_an_unchanged_run_is_evaluated(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run_folder), "decode.beams=2"])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["sentences", "unseen_voices"]
    folder = results_folder(run_folder, ["decode.beams=2"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["sentences"]["utterances"] == 4 and metrics["unseen_voices"]["utterances"] == 3
    assert metrics["decoding"]["beams"] == 2
    assert f"WER {metrics['sentences']['wer']:.4f}" in shown[0]
    rows = [json.loads(line) for line in (folder / "hypotheses.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == ["sentences"] * 4 + ["unseen_voices"] * 3
    assert "REF:" in (folder / "errors.txt").read_text()
    assert read_run_config(run_folder).decode.beams == 1  # the saved config is as it was


def test_a_run_without_test_sets(refuse: Refuse, run_folder: Path) -> None:
    config = read_run_config(run_folder)
    config.data.test = {}
    (run_folder / "config.yaml").write_text(to_yaml(config))
    for command in ("evaluate", "analyze"):
        assert "data.test" in refuse(command, run_folder)


def test_results_that_cannot_be_written(refuse: Refuse, run_folder: Path) -> None:
    (run_folder / "hypotheses.jsonl").mkdir()
    assert str(run_folder) in refuse("evaluate", run_folder)


# Transcribing


def test_transcribe_goes_on_after_bad_files(
    tone: Tone, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = tone(tmp_path / "good.wav", 0.7), tone(tmp_path / "other.flac", 0.4)
    short, long = tone(tmp_path / "short.wav", 0.05), tone(tmp_path / "long.wav", 200)
    (tmp_path / "text.wav").write_text("no sound")
    gone = tmp_path / "gone.wav"
    files = [good, short, long, tmp_path / "text.wav", gone, other]
    with pytest.raises(SystemExit) as caught:
        main(["transcribe", str(run_folder), *map(str, files)])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert [line.split("\t")[0] for line in shown.out.splitlines()] == [str(good), str(other)]
    errors = [line for line in shown.err.splitlines() if line.startswith("avsr: ")]
    assert len(errors) == 4 and "Traceback" not in shown.err
    for path, part, line in zip(
        (short, long, tmp_path / "text.wav", gone), ("0.05 s", "200.00 s", "sound file", "no file"), errors, strict=True
    ):
        assert str(path) in line and part in line


def test_transcribe_a_clip_below_one_token(tone: Tone, refuse: Refuse, run_folder: Path, tmp_path: Path) -> None:
    path = tone(tmp_path / "a.wav", 0.05)
    message = refuse("transcribe", run_folder, path, "data.min_seconds=0.01")
    assert str(path) in message and "one token" in message


def test_transcribe_a_clip_that_leaves_no_room_for_text(
    tone: Tone, refuse: Refuse, run_folder: Path, tmp_path: Path
) -> None:
    """28 s are 350 tokens at rate 4, and the tiny model has 256 positions."""
    path = tone(tmp_path / "a.wav", 28)
    message = refuse("transcribe", run_folder, path)
    assert str(path) in message and "256" in message


def test_transcribe_without_a_file(refuse: Refuse, run_folder: Path) -> None:
    assert "FILE" in refuse("transcribe", run_folder)
    assert "no file given" in refuse("transcribe", run_folder, "decode.beams=2")


# The other commands


def test_analyze_without_a_run(refuse: Refuse) -> None:
    assert "no run" in refuse("analyze", "decode.beams=2")


def test_synth_with_a_bad_option(refuse: Refuse, tmp_path: Path) -> None:
    message = refuse("synth", tmp_path / "out", "gird=5")
    assert "'gird'" in message and "'grid'" in message
    message = refuse("synth", tmp_path / "out", "grid=many")
    assert "grid" in message and "'many'" in message
    assert not (tmp_path / "out").exists()


def test_doctor_prints_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        main(["doctor"])
        code: object = 0
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out and "devices:" in out
    backends = out.split("flashsink backends:\n")[1].splitlines()
    assert {line.split()[0] for line in backends if line.startswith("  ")} >= {"reference", "cpu", "triton"}
    assert code in (0, 1)
    if code:
        assert "missing" in out


def test_doctor_marks_untested_versions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.1" if name == "transformers" else known(name))
    with contextlib.suppress(SystemExit):
        main(["doctor"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "untested" in line]
    assert line.split()[:2] == ["transformers", "9.9.1"] and "tested are 5." in line


def test_an_unknown_command(refuse: Refuse) -> None:
    assert "trian" in refuse("trian")


# Disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_while_metrics_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training continues with a warning; the row is written when there is room again."""
    log = MetricsLogger(tmp_path, LogConfig(tensorboard=False))
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log.write({"step": 1, "ce": 2.0})
    assert "metrics.jsonl" in caplog.text and os.strerror(errno.ENOSPC) in caplog.text
    path.unlink()
    log.write({"step": 2, "ce": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_metrics_cut_short_by_a_full_disk_do_not_stop_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLogger(tmp_path, LogConfig(tensorboard=False), resume_at=2)
    log.write({"step": 3, "ce": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
