"""Commands over hostile files end with status 2 and a line on stderr; the fixture ``refuse`` looks for a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from avsr.runtime import folders

pytestmark = pytest.mark.integration

DEEP = "[" * 100_000
Refuse = Callable[..., str]


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("config.yaml", "run: " + "[" * 5_000, "config.yaml"),
        ("config.yaml", "model: !!int abc", "config.yaml"),
        ("config.yaml", "\xff\xfe", "config.yaml"),
        ("checkpoints/best/model.safetensors", "\x08\0\0\0\0\0\0\0{}      ", "model.safetensors"),
        ("checkpoints/best/model.safetensors", "\xff" * 8, "model.safetensors"),
        ("checkpoints/best/SHA256SUMS", "0  \0\n", "SHA256SUMS"),
        ("act_heads.json", DEEP, "act_heads.json"),
        ("act_heads.json", '{"layers": 1e999}', "act_heads.json"),
    ],
)
def test_evaluate(file: str, content: str, part: str, run_folder: Path, refuse: Refuse) -> None:
    (run_folder / file).write_bytes(content.encode("latin1"))
    message = refuse("evaluate", run_folder, "act.beta=0.4")
    assert part in message and "\n" not in message


@pytest.mark.parametrize("line", [DEEP, '{"id": "\\ud800"}', '{"id": 1e999}', '{"id": "a", "audio": "\\u0000"}', "\0"])
def test_a_manifest(line: str, run_folder: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "m.jsonl").write_text(line + "\n")
    assert "m.jsonl" in refuse("evaluate", run_folder, f"data.test.sentences={tmp_path / 'm.jsonl'}")


def test_analyze(run_folder: Path, refuse: Refuse) -> None:
    """Lines of metrics.jsonl that are none are left out, see test_metrics.py."""
    (run_folder / "metrics.json").write_text(DEEP + "\n")
    message = refuse("analyze", run_folder)
    assert "metrics.json" in message and "\n" not in message


@pytest.mark.parametrize(
    ("file", "content"), [("a.wav", b"RIFF"), ("a.raw", b"\0" * 64), ("a.mp4", b"#EXTM3U\n"), ("a.flac", b"")]
)
def test_transcribe(file: str, content: bytes, run_folder: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / file).write_bytes(content)
    assert file in refuse("transcribe", run_folder, tmp_path / file)


def test_resume(tiny_recipe: Callable[..., Path], run_folder: Path, tmp_path: Path, refuse: Refuse) -> None:
    """A folder that is whole by its sums, with a record that makes no sense."""
    last = run_folder / "checkpoints" / "last"
    shutil.copy(run_folder / "config.yaml", tmp_path / "same.yaml")
    record = {key: 0 for key in ("step", "epoch", "step_in_epoch", "clipped", "skipped", "accumulation")}
    for ranks in (-1, "x", 10**400, None, 1.5):
        rest = {"best": None, "validation": None, "optimizer": {}, "scheduler": {}, "random": [3, [], None]}
        (last / "state.json").write_text(json.dumps({**record, "ranks": ranks, **rest}))
        folders.seal(last)
        assert "state.json" in refuse("train", tmp_path / "same.yaml", "resume=true")


def test_prepare(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "train.tsv").write_text("/\n\0\t\0\t\0\t\0\t\0\n")
    (tmp_path / "train.en").write_text("hello\n")
    assert "cannot be a path" in refuse("prepare", "muavic", tmp_path, tmp_path / "out")
    (tmp_path / "out" / "prepare.json").write_text(DEEP)
    assert "prepare.json" in refuse("prepare", "muavic", tmp_path, tmp_path / "out")
