"""Text of configs arrives letter by letter, whatever YAML would make of it, and YAML that multiplies is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from avsr.cli import _parser
from avsr.config import Config, load_config, read_run_config, to_yaml
from avsr.config.composing import compose
from avsr.errors import UserError
from avsr.runtime.folders import cache_folder
from avsr.tools.corpora.prepare.options import parse_options
from avsr.tools.lipreader.pretrain import PretrainConfig

LITERAL = [
    "007",
    "1e-4",
    "0x10",
    "1_000",
    "12:30:45",
    "2020-01-01",
    "no",
    "True",
    "null",
    "/data/my #1 run",
    "a: b",
    "'quoted'",
    '"x',
    "[a, b]",
    "{a: b}",
    "&a",
    "*a",
    "!x",
    "|",
    "- a",
    "%x",
    " two  spaces ",
    "ünï",
    "a\tb",
    "a\nb\n\nc\n",
    "=",
    "<<",
    "?",
    "\\n",
    "\u00a0\u2028",
]


@pytest.mark.parametrize("text", LITERAL)
def test_text_in_an_override_is_taken_literally(recipe: Callable[..., str], tmp_path: Path, text: str) -> None:
    given = [f"{key}={text}" for key in ("run", "model.prompts.audio", "data.test.a", "data.test.b")]
    config = load_config(recipe(), [*given, *([f"log.wandb={text}"] if text != "null" else [])])
    assert config.run == config.model.prompts.audio == text
    assert config.data.test == {"a": text, "b": text}
    assert config.log.wandb == (text if text != "null" else None)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = read_run_config(tmp_path)
    assert again.model == config.model and again.data == config.data and again.log == config.log


def test_null_stays_null_where_a_key_may_be_null(recipe: Callable[..., str]) -> None:
    path = recipe("log: {wandb: x}\n")
    for text in ("null", ""):
        config = load_config(path, [f"log.wandb={text}", f"data.cache={text}", f"model.audio.encoder.normalise={text}"])
        assert config.log.wandb is config.data.cache is config.model.audio.encoder.normalise is None
    assert load_config(recipe("log: {wandb: ~}\n")).log.wandb is None


@pytest.mark.parametrize("text", ["007", "no", "1e-4", "2020-01-01", "0x10", "12:30:45", "Off"])
def test_unquoted_text_in_a_file_stays_text(recipe: Callable[..., str], text: str) -> None:
    more = f"log: {{wandb: {text}}}\nnoise: {{file: {text}}}\n"
    path = recipe(more)
    config = load_config(path, [f"data.test={{{text}: {text}, other: {text}}}", f"model.lora.targets=[{text}, b]"])
    assert config.log.wandb == config.noise.file == text
    assert config.data.test == {text: text, "other": text}
    assert config.model.lora.targets == [text, "b"]


def test_values_that_are_no_text_are_still_yaml(recipe: Callable[..., str]) -> None:
    path = recipe("training: {steps: 0x10, warmup: 7, learning_rate: 1e-4}\nresume: yes\n")
    config = load_config(path, ["noise.snr=[0, .inf]", "training.tasks={audio: 1}", "data.verify=no"])
    assert (config.training.steps, config.training.learning_rate, config.resume) == (16, 1e-4, True)
    assert config.noise.snr == [0, float("inf")] and config.training.tasks == {"audio": 1} and not config.data.verify


def test_merged_and_repeated_values_are_text_too(tmp_path: Path, complete: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{complete}log: {{<<: {{wandb: 007}}, tensorboard: no}}\nnoise: {{file: &f 08, babble: *f}}\n")
    config = load_config(str(path))
    assert config.log.wandb == "007" and config.log.tensorboard is False
    assert config.noise.file == config.noise.babble == "08"


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "\x7f", "\x9b2J", "a\0b", "\udcff"])
def test_control_characters_are_no_text(recipe: Callable[..., str], text: str) -> None:
    with pytest.raises(UserError, match="characters that are not text") as caught:
        load_config(recipe(), [f"run={text}"])
    assert all(c.isprintable() for c in str(caught.value))


# Aliases


def doubling(times: int) -> str:
    lines = ["a0: &a0 [x, x]", *(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(times))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        doubling(28),
        "noise: {snr: &a [0]}\nx: [" + ", ".join(["*a"] * 20_000) + "]\n",
        "x: &a [[1]]\n" + "".join(f"x{n}: &a [*a]\n" for n in range(5_000)),
        "x: &a {b: *a}\n",
        "x: *nothing\n",
    ],
    ids=["doubling", "many", "deep", "itself", "nothing"],
)
def test_aliases_that_multiply_are_refused_at_once(recipe: Callable[..., str], text: str) -> None:
    path = recipe(text)
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)
    assert time.perf_counter() - began < 3
    assert any(part in str(caught.value) for part in ("more than 10000 values", "nested more than", "refers to"))
    with pytest.raises(UserError):
        load_config(recipe(), [f"noise.snr={{{text.splitlines()[-1]}}}"])


def test_an_alias_within_reason_is_read(recipe: Callable[..., str]) -> None:
    assert yaml.safe_load(doubling(3))["a3"]  # the generator is right
    config = load_config(recipe("noise: {snr: &levels [0, 5]}\naugment: {snr: *levels}\n"))
    assert config.augment.snr == config.noise.snr == [0, 5]


# Paths


def paths_of(config: Any) -> list[str]:
    data, noise, model = config.data, config.noise, config.model
    encoders = [stream.encoder.name for stream in (model.audio, model.video, model.fused)]
    return [
        *(config.run, data.train, data.validation, *data.test.values(), data.cache, noise.file, noise.babble),
        *(config.training.initial_weights, config.deepspeed.config, config.act.heads, model.llm.name, *encoders),
    ]


PATHS = [
    *("run", "data.train", "data.validation", "data.test.a", "data.test.b", "data.cache", "noise.file", "noise.babble"),
    *("training.initial_weights", "deepspeed.config", "act.heads", "model.llm.name"),
    *(f"model.{stream}.encoder.name" for stream in ("audio", "video", "fused")),
]


def test_the_home_folder_is_put_in_for_every_path(
    recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(recipe(), [f"{key}=~/{key}" for key in PATHS])
    assert sorted(paths_of(config)) == sorted(f"{tmp_path}/{key}" for key in PATHS)
    in_file = load_config(recipe("log: {wandb: ~/x}\nnoise: {file: ~/noise.wav}\n"))
    assert in_file.noise.file == f"{tmp_path}/noise.wav" and in_file.log.wandb == "~/x"
    overrides = ["run=~/r", "train=~/t", "validation=~/v", "test.a=~/a"]
    other = compose("demo_visual", overrides, PretrainConfig)
    assert [other.run, other.train, other.validation, other.test["a"]] == [f"{tmp_path}/{x}" for x in "rtva"]
    assert parse_options("videos", ["landmarks=~/l"]).landmarks == f"{tmp_path}/l"
    monkeypatch.setenv("AVSR_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("train ~/p", "config"),
        ("evaluate ~/p", "run"),
        ("transcribe ~/p ~/p", "run files"),
        ("analyze ~/p --text=~/p --out=~/p --audio=~/p --image=~/p", "targets text out audio image"),
        ("average ~/p", "run"),
        ("import ~/p --config=~/p --out=~/p", "checkpoint config out"),
        ("synth ~/p", "out"),
        ("prepare lrs3 ~/p", "targets"),
    ],
)
def test_the_home_folder_in_arguments(
    command: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = _parser().parse_args(command.split())
    for name in names.split():
        value = getattr(arguments, name)
        assert value in (f"{tmp_path}/p", [f"{tmp_path}/p"])


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path, complete: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + complete.strip().encode())
    assert isinstance(load_config(str(path)), Config) and load_config(str(path)).run == "runs/x"
