"""A folder from which the settled study can be trained and measured where only torch, transformers and peft are.

It has pooled features and texts of all sets, the taught projector, the arms, and the sources; not the language model.
``run.py`` in it is :mod:`bench.study.standalone`. Its rows come back by :func:`import_rows`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avsr.config import Config
from avsr.data.dataset import Reading, SpeechDataset, load_dataset
from avsr.errors import UserError
from avsr.models.build import build_model, build_store, pick_device
from avsr.models.compression import compress
from avsr.runtime.folders import part_of
from avsr.runtime.rows import append_row, read_rows
from avsr.runtime.tensors import save_file
from bench.study import corpus, human, settled
from bench.study import standalone as names
from bench.study.grid import Arm
from bench.study.measure import commit, scored
from bench.study.rows import ROWS
from bench.study.rows import read_rows as read_study
from bench.study.side_effects import plain_text
from bench.study.train import config_of, projector_file

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"avsr": ROOT / "avsr", "flashsink": ROOT / "kernels" / "flashsink", "bench/study": ROOT / "bench" / "study"}
MOST = 60_000_000  # bytes
RUN = '''"""python run.py ARM SEED --llm FOLDER, or --all; --help has the rest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench.study.standalone import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
'''


def export(target: Path, rate: int) -> None:
    """Writes the folder of the settled study's arms of a rate, those without a LayerNorm in the projector excepted.

    Raises:
        UserError: no arm has that rate; and as of :func:`write_export`.
    """
    arms = {key: held for key, held in settled_arms().items() if held[0].rate == rate and held[0].layernorm}
    if not arms:
        rates = sorted({arm.rate for arm in settled.ARMS.values()})
        raise UserError(f"--rate {rate}: no arm of the settled study has it; there are: {rates}")
    corpus.make_corpus()
    human.make_corpus()
    write_export(target, arms, projector_file(rate))


def write_export(target: Path, arms: Mapping[str, tuple[Arm, Config]], projector: Path) -> None:
    """Writes the folder of ``arms``, by key, which share corpus and rate.

    Raises:
        UserError: there is something at ``target``, an utterance cannot be used, the arms pool in another way than by
            average, or the folder would have 60 MB or more.
    """
    if target.exists():
        raise UserError(f"--export {target}: it exists; name a folder that does not")
    config = next(iter(arms.values()))[1]
    pooling = config.model.streams[names.STREAM].compression
    if pooling.kind != "average" or config.model.task != names.STREAM:
        raise UserError(f"--export: expected sound pooled by average, got {config.model.task} by {pooling.kind}")
    part = part_of(target)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write_sets(part, config)
        _write_arms(part, arms, pooling.rate)
        shutil.copy(projector, part / names.PROJECTOR)
        (part / names.PLAIN).write_text(plain_text(), encoding="utf-8")
        _copy_sources(part)
        size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        if size >= MOST:
            raise UserError(f"--export {target}: it would have {size / 1e6:.0f} MB, allowed are {MOST / 1e6:.0f}")
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_sets(folder: Path, config: Config) -> None:
    device = pick_device()
    store = build_store(config, device)
    model, loaded = build_model(config, store, device)
    rate = config.model.streams[names.STREAM].compression.rate
    manifests = {"train": config.data.train, "validation": config.data.validation, **config.data.test}
    sets, features = {}, {}
    for name, manifest in manifests.items():
        dataset = load_dataset(
            manifest,
            config.data,
            store,
            loaded.tokenize,
            title=f"read {name}",
            reading=Reading(names.STREAM),
            refuse=model.layout.unusable,
        )
        features[name] = torch.cat([_pooled(dataset, index, rate) for index in range(len(dataset))])
        sets[name] = [
            {"id": u.id, "text": u.text, "speaker": u.speaker, "duration": u.duration, "frames": int(frames)}
            for u, frames in zip(dataset.utterances, dataset.sizes, strict=True)
        ]
    save_file(features, folder / names.FEATURES)
    _write_json(folder / names.SETS, sets)


def _pooled(dataset: SpeechDataset, index: int, rate: int) -> Tensor:
    """(T, D) float32: in float16 a step's loss would differ by 1e-4 of itself."""
    return compress(dataset[index].features[names.STREAM].float()[None], "average", rate)[0]


def _write_arms(folder: Path, arms: Mapping[str, tuple[Arm, Config]], rate: int) -> None:
    held = {}
    for key, (arm, config) in arms.items():
        plain: dict[str, Any] = asdict(config)
        plain["model"][names.STREAM]["compression"]["rate"] = 1  # its features are pooled
        plain["run"] = plain["model"]["llm"]["name"] = ""  # run.py names them
        held[key] = {"arm": asdict(arm), "config": plain}
    _write_json(folder / names.ARMS, {"commit": commit(), "rate": rate, "arms": held})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _copy_sources(folder: Path) -> None:
    for place, source in SOURCES.items():
        for path in source.rglob("*.py"):
            copy = folder / place / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    (folder / "bench" / "__init__.py").touch()
    (folder / "run.py").write_text(RUN, encoding="utf-8")


def import_rows(path: Path, arms: Mapping[str, tuple[Arm, Config]], into: Path = ROWS) -> int:
    """Scores the rows of ``run.py`` in ``path`` and adds those of ``arms`` that ``into`` lacks. Returns their number.

    Raises:
        UserError: the file is missing or has no row, or a row is of no arm or of another number of steps.
    """
    rows = read_rows(path, lambda row: (row["key"], row["steps"], row["transcripts"]))
    if not rows:
        raise UserError(f"--import {path}: there is no row of run.py in it")
    for row in rows:
        if row["key"] not in arms:
            raise UserError(f"--import {path}: {row['key']!r} is no arm of the settled study")
        steps = arms[row["key"]][1].training.steps
        if row["steps"] != steps:
            raise UserError(f"--import {path}: {row['key']} has {row['steps']} steps, the plan {steps}; train it again")
    there = read_study(into)
    added = {row["key"]: row for row in rows if row["key"] not in there}
    for row in added.values():
        scores = {name: scored(*zip(*pairs, strict=True)) for name, pairs in row["transcripts"].items()}
        kept = {name: value for name, value in row.items() if name not in ("transcripts", "steps", "metrics")}
        append_row(into, {**kept, "scores": scores})
    return len(added)


def settled_arms() -> dict[str, tuple[Arm, Config]]:
    return {key: (arm, config_of(arm)) for key, arm in settled.ARMS.items()}
