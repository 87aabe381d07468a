"""A folder with everything that the commands read, and the server that runs them."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf

from avsr.data.manifest import write_manifest
from avsr.data.video_writer import encode_video, write_video

sys.path.insert(0, str(Path(__file__).parent))

import process

_FIXTURES = runpy.run_path(str(Path(__file__).parents[1] / "avsr" / "conftest.py"))
tiny_llm, tiny_whisper, make_corpus, tiny_recipe, draw_face, parts, plain_llm = (
    _FIXTURES[name]
    for name in ("tiny_llm", "tiny_whisper", "make_corpus", "tiny_recipe", "draw_face", "parts", "plain_llm")
)
_TINY_DEBS = runpy.run_path(str(Path(__file__).parents[1] / "avsr/tools/tiny_debs.py"))
_PRETRAIN = {
    "run": "pretrained",
    "train": "timed/train.jsonl",
    "validation": "timed/train.jsonl",
    "model": {"pool": 8, "channels": [8, 8, 8], "width": 24, "hidden": 12, "layers": 1, "dropout": 0.0},
    "steps": 6,
    "batch": 4,
    "warmup": 2,
}


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[process.Commands]:
    with process.serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def template(
    tmp_path_factory: pytest.TempPathFactory,
    commands: process.Commands,
    tiny_llm: Path,
    tiny_whisper: Path,
    plain_llm: Path,
    tiny_recipe: Callable[..., Path],
    draw_face: Callable[..., Any],
    parts: Any,
) -> Path:
    """All paths in its files are relative to it, so that copies of it work."""
    root = tmp_path_factory.mktemp("template")
    for name, folder in (("llm", tiny_llm), ("whisper", tiny_whisper), ("plain_llm", plain_llm)):
        shutil.copytree(folder, root / name)
    official = parts.audio_checkpoint(plain_llm, tiny_whisper)
    official.write(root / "official.pth")
    lora = {"rank": 8, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}
    settings = {"model.llm.name": str(root / "llm"), "model.audio.encoder.name": str(root / "whisper")}
    changes = {"training.keep_last": 2, "data.on_bad": "skip"}
    official_changes = {**settings, "model.llm.name": str(root / "plain_llm"), "model.lora": lora}
    for name, change in (("official.yaml", official_changes), ("recipe.yaml", {**settings, **changes})):
        path = tiny_recipe(root, **change)
        (root / name).write_text(path.read_text(encoding="utf-8").replace(f"{root}/", ""), encoding="utf-8")
    for name, pitch in (("a", 300), ("b", 500)):
        soundfile.write(str(root / f"{name}.wav"), _tone(0.8, pitch), 16_000)
    lasting = {"long_a": 1.1, "long_b": 1.4}  # as encoders are analyzed
    for name, seconds in lasting.items():
        soundfile.write(str(root / f"{name}.wav"), _tone(seconds, 400), 16_000)
    rows = [{"id": n, "audio": f"{n}.wav", "text": n, "duration": seconds} for n, seconds in lasting.items()]
    write_manifest(root / "long.jsonl", rows)
    _videos(root, draw_face)
    known = _TINY_DEBS["write_debs"](root / "debs")
    (root / "debs/known.json").write_text(json.dumps(known), encoding="utf-8")
    _timed(root)
    OmegaConf.save(OmegaConf.create(_PRETRAIN), root / "pretrain.yaml")
    trained = commands.run(root, ["train", "recipe.yaml", "run=trained", "data.cache=null"])
    assert trained.status == 0, trained.shown
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy of the template."""
    return Path(shutil.copytree(template, tmp_path / "root"))


def _tone(seconds: float, pitch: float) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * 16_000)) / 16_000)).astype(np.float32)


def _videos(root: Path, draw_face: Callable[..., Any]) -> None:
    """Two transcribed videos of talking faces and their landmarks."""
    frames, points = draw_face(np.zeros(25), 28, 75, 50)
    for folder in ("videos", "landmarks"):
        (root / folder).mkdir()
    for name, pitch in (("a", 300), ("b", 500)):
        (root / f"videos/{name}.mp4").write_bytes(encode_video(frames, sound=_tone(1.0, pitch)))
        (root / f"videos/{name}.txt").write_text(f"text of {name}")
        np.save(root / f"landmarks/{name}.npy", points)


def _timed(root: Path) -> None:
    """Clips of a bar that is at another place for each of two words."""
    (root / "timed").mkdir()
    rows = []
    for index in range(4):
        frames = np.random.default_rng(index).normal(90, 4, (12, 96, 96))
        spans: dict[str, list[Any]] = {"words": [], "phonemes": []}
        for number, (word, sound, place) in enumerate((("bin", "b", 16), ("lay", "l", 48))):
            start = 2 + 4 * ((number + index) % 2)
            frames[start : start + 4, place : place + 12, 20:76] += 100
            spans["words"].append([word, start / 25, start / 25 + 0.16])
            spans["phonemes"].append([sound, start / 25, start / 25 + 0.16])
        spans = {kind: sorted(found, key=lambda span: span[1]) for kind, found in spans.items()}
        write_video(root / f"timed/{index}.mp4", frames.clip(0, 255).astype(np.uint8))
        (root / f"timed/{index}.json").write_text(json.dumps(spans))
        text = " ".join(span[0] for span in spans["words"])
        row = {"id": str(index), "video": f"{index}.mp4", "times": f"{index}.json", "text": text, "duration": 0.48}
        rows.append(row)
    write_manifest(root / "timed/train.jsonl", rows)
