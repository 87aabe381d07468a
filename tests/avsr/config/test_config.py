"""Config files that compose, overrides, and the errors a user meets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from avsr.config import Config, ModelConfig, load_config, read_run_config, to_yaml
from avsr.config import composing as composing_module
from avsr.config.composing import compose, configs_folder, differences, leaves
from avsr.errors import UserError
from avsr.tools.lipreader.pretrain import PretrainConfig

FILES = sorted(path for path in configs_folder().glob("*/*.yaml") if path.stem != "demo_visual")
FILL = [
    "run=r",
    *(f"model.{stream}.encoder.name=e" for stream in ("audio", "video", "fused")),
    "model.llm.name=l",
    "data.train=t",
    "data.validation=v",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own configs folder; files are written with ``write``."""
    root = tmp_path / "configs"
    monkeypatch.setattr(composing_module, "configs_folder", lambda: root)
    root.mkdir()
    return root


def write(root: Path, name: str, text: str) -> str:
    path = root / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(name, overrides)
    return str(caught.value)


# What is shipped


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_loads(path: Path) -> None:
    recipe = path.parent.name == "recipe"
    config = load_config(path.stem if recipe else str(path), () if recipe else FILL)
    assert isinstance(config, Config)
    again = load_config(f"{path.parent.name}/{path.stem}", () if recipe else FILL)
    assert again == config


def test_the_pretraining_recipe_is_of_its_own_kind() -> None:
    config = compose("demo_visual", ["steps=5"], PretrainConfig)
    assert isinstance(config, PretrainConfig) and config.steps == 5
    with pytest.raises(UserError, match="unknown key 'stepps'; did you mean 'steps'"):
        compose("demo_visual", ["stepps=5"], PretrainConfig)
    with pytest.raises(UserError, match="unknown key 'train'"):
        load_config("demo_visual")


# Composition


def test_later_defaults_win_then_the_file_then_the_overrides(folder: Path, complete: str) -> None:
    write(folder, "a", "training: {steps: 1, warmup: 1, seed: 1, clip: 1.0}")
    write(folder, "b", "training: {warmup: 2, seed: 2, clip: 2.0}")
    path = write(folder, "recipe/r", f"defaults: [a, b]\n{complete}\ntraining: {{seed: 3, clip: 3.0}}")
    config = load_config(path, ["training.clip=4"])
    training = config.training
    assert (training.steps, training.warmup, training.seed, training.clip) == (1, 2, 3, 4.0)


def test_defaults_of_defaults_and_the_same_part_twice(folder: Path, complete: str) -> None:
    write(folder, "base", "training: {steps: 5}\nloss: {margin: 0.1}")
    write(folder, "left", "defaults: [base]\nloss: {margin: 0.2}")
    write(folder, "right", "defaults: [base]\ntraining: {seed: 7}")
    path = write(folder, "recipe/r", f"defaults: [left, right]\n{complete}")
    config = load_config(path)
    assert config.training.steps == 5 and config.training.seed == 7
    assert config.loss.margin == 0.1  # right brings base along, and is later


def test_a_later_table_stands_alone_and_an_override_changes_one_name(folder: Path, complete: str) -> None:
    write(folder, "data/one", "data: {train: a, test: {x: x.jsonl, y: y.jsonl}}\ntraining: {tasks: {audio: 1}}")
    write(folder, "data/two", "data: {test: {z: z.jsonl}}\ntraining: {steps: 7}")
    name = write(
        folder, "recipe/mine", "defaults: [data/one, data/two]\n" + complete.replace(", test: {a: a.jsonl}", "")
    )
    assert load_config(name).data.test == {"z": "z.jsonl"}
    assert load_config(name).training.tasks == {"audio": 1.0} and load_config(name).data.train == "t.jsonl"
    both = load_config("mine+data/one", ["data.test.y=other.jsonl", "data.test.n=n.jsonl"])
    assert both.data.test == {"x": "x.jsonl", "y": "other.jsonl", "n": "n.jsonl"}
    assert load_config("mine+data/one", ["data.test={q: q.jsonl}"]).data.test == {"q": "q.jsonl"}
    assert load_config("mine", ["data.test={}"]).data.test == {}


def test_missing_defaults_name_both_files(folder: Path, complete: str) -> None:
    path = write(folder, "recipe/r", "defaults: [model/nothere]\n" + complete)
    message = refusal(path)
    assert path in message and "model/nothere.yaml" in message


def test_circular_defaults_are_refused(folder: Path, complete: str) -> None:
    write(folder, "a", "defaults: [b]")
    write(folder, "b", "defaults: [a]")
    path = write(folder, "recipe/r", "defaults: [a]\n" + complete)
    assert "back to itself" in refusal(path)
    own = write(folder, "recipe/self", "defaults: [recipe/self]\n" + complete)
    assert "back to itself" in refusal(own) and own in refusal(own)


@pytest.mark.parametrize("defaults", ["model/tiny", "null", "3", "{a: b}", "[3]", "[null]"])
def test_defaults_that_are_no_list_of_names(folder: Path, complete: str, defaults: str) -> None:
    path = write(folder, "recipe/r", f"defaults: {defaults}\n{complete}")
    if defaults == "null":  # as good as none
        assert load_config(path).run == "runs/x"
        return
    message = refusal(path)
    assert "defaults" in message and path in message


# Names of files


def test_a_typo_in_a_recipe_suggests_the_nearest() -> None:
    message = refusal("demo_decorelation")
    assert "demo_decorelation" in message and "did you mean 'demo_decorrelation'" in message


def test_a_strange_recipe_lists_the_known_ones() -> None:
    message = refusal("zzzzzzzz")
    assert "zzzzzzzz" in message and "demo" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in refusal(str(tmp_path / "no.yaml"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("run: [a\nb: c: d", "line"),
        ("run: a\n\tloss: 1", "line"),
        ("- a\n- b", "keys and values"),
        ("just words", "just words"),
    ],
)
def test_broken_yaml_names_the_file(tmp_path: Path, text: str, hint: str) -> None:
    path = write(tmp_path, "broken", text)
    message = refusal(path)
    assert path in message and hint in message and "\n" not in message


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert str(path) in refusal(str(path))


def test_an_empty_file_says_what_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path, "empty", "")
    message = refusal(path)
    for key in ("run", "model.llm.name", "data.train", "data.validation"):
        assert key in message
    assert "training.steps" not in message


@pytest.mark.parametrize("task", ["audio", "video", "audiovisual", "fused"])
def test_the_streams_of_the_task_need_an_encoder(tmp_path: Path, task: str) -> None:
    needed = {"audiovisual": ["audio", "video"]}.get(task, [task])
    path = write(
        tmp_path, "mine", f"{{run: r, model: {{task: {task}, llm: {{name: l}}}}, data: {{train: t, validation: v}}}}"
    )
    message = refusal(path)
    for stream in ("audio", "video", "fused"):
        assert (f"model.{stream}.encoder.name" in message) == (stream in needed)


# Keys


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        ("trainig: {steps: 3}", "'trainig'", "'training"),
        ("training: {step: 3}", "'training.step'", "'training.steps'"),
        ("training: {lr: 3}", "'training.lr'", "'training.learning_rate'"),
        ("training: {learning_rat: 3}", "'training.learning_rat'", "'training.learning_rate'"),
        ("loss: {decorelation: 3}", "'loss.decorelation'", "'loss.decorrelation'"),
        ("model: {lora: {rnk: 3}}", "'model.lora.rnk'", "'model.lora.rank'"),
        (
            "model: {audio: {compression: {rates: 3}}}",
            "'model.audio.compression.rates'",
            "'model.audio.compression.rate'",
        ),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, text: str, wrong: str, right: str) -> None:
    path = write(tmp_path, "mine", text)
    message = refusal(path)
    assert path in message and f"unknown key {wrong}" in message and f"did you mean {right}" in message


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("training.stepps=3", "'training.steps'"),
        ("model.lora.rnk=3", "'model.lora.rank'"),
        ("lora.rank=3", "'model.lora.rank'"),
        ("decode.beam=3", "'decode.beams'"),
        ("zzzzz=3", "known here: run"),
    ],
)
def test_an_unknown_key_in_an_override_names_the_nearest(recipe: Callable[..., str], override: str, right: str) -> None:
    message = refusal(recipe(), override)
    assert override in message and "unknown key" in message and right in message


def test_a_key_that_is_no_text_is_refused(recipe: Callable[..., str]) -> None:
    assert "unknown key '3'" in refusal(recipe("3: x\n"))


def test_an_unknown_key_in_a_default_names_that_file(folder: Path, complete: str) -> None:
    part = write(folder, "part", "training: {stepz: 1}")
    path = write(folder, "recipe/r", "defaults: [part]\n" + complete)
    message = refusal(path)
    assert part in message and "training.steps" in message


# What is saved


def test_the_resolved_config_round_trips(recipe: Callable[..., str], tmp_path: Path) -> None:
    config = load_config(recipe(), ["training.betas=[0.5, 0.6]", "model.llm.bos_token=<x>", "data.limit=3"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = read_run_config(tmp_path / "run")
    assert again.run == str(tmp_path / "run")
    assert differences(config, again) == [f"run: 'runs/x' != {str(tmp_path / 'run')!r}"]


def test_a_run_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run.*config.yaml"):
        read_run_config(tmp_path)


def test_differences_name_every_leaf() -> None:
    ours, theirs = ModelConfig(), ModelConfig()
    theirs.lora.rank = 3
    theirs.prompts.audio = "other"
    assert differences(ours, theirs, "model.") == [
        f"model.prompts.audio: {ours.prompts.audio!r} != 'other'",
        f"model.lora.rank: {ours.lora.rank} != 3",
    ]


# Keys of earlier versions

OLD = """
run: old
model:
  encoder: {name: e, pad_to_30s: true}
  compression: {kind: stack, rate: 3}
  prompt: Say it.
  llm: {name: l}
data: {train: t, validation: v}
"""


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text(OLD)
    config = read_run_config(tmp_path, ["model.encoder.batch=3"])
    audio = config.model.audio
    assert (audio.encoder.name, audio.encoder.pad_to_30s, audio.encoder.batch) == ("e", True, 3)
    assert (audio.compression.kind, audio.compression.rate) == ("stack", 3)
    assert config.model.prompts.audio == "Say it."
    for old, new in Config.moved.items():
        assert f"{old} is now called {new}" in caplog.text
    assert "model.encoder.batch=3: this key is now called model.audio.encoder.batch" in caplog.text


def test_a_key_under_both_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "both", f"{OLD}\nmodel.x: 1".replace("  llm:", "  prompts: {audio: x}\n  llm:"))
    assert "model.prompt is now called model.prompts.audio, which the file has as well" in refusal(path)
    assert "which the file has as well" in refusal(write(tmp_path, "odd", "model: {prompt: a, prompts: 3}"))


def test_every_new_name_is_a_key_or_a_group_and_no_old_one_is() -> None:
    names = {name for name, _ in leaves(Config())}
    groups = {name.rpartition(".")[0] for name in names} | names
    assert set(Config.moved.values()) <= groups and not set(Config.moved) & groups
