"""Trains and measures arms in a folder of :mod:`bench.study.export`, which ships this file and starts it as ``run.py``.

Needs torch, triton, numpy, transformers and peft. Model, losses, order of the data, steps, validation and decoding are
the code of ``avsr train`` and ``avsr evaluate``; the corpus is read from pooled features, and the engine is
:class:`Engine` in place of DeepSpeed's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
import sys
import time
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from avsr.config import Config
from avsr.data.batches import Example
from avsr.data.manifest import Utterance
from avsr.errors import UserError, guarded
from avsr.evaluation.decode import transcribe
from avsr.models.speech_llm import SpeechLLM, Terms, make_model
from avsr.models.weights import load_some_weights
from avsr.runtime.machine import settled_precision
from avsr.runtime.progress import ProgressBar
from avsr.runtime.rows import append_row, read_rows
from avsr.runtime.tensors import read_file, save_file
from avsr.training import options
from avsr.training.checkpoint import Progress
from avsr.training.engine import learning_rate_factor, make_optimizer
from avsr.training.losses import attach
from avsr.training.trainer import Trainer, seed_everything
from bench.study.grid import Arm
from bench.study.penalty import Penalty, attach_penalty
from bench.study.side_effects import perplexity
from bench.study.summary import ANALYSED, curves, plain_arm, sinks

ARMS, SETS, FEATURES, PROJECTOR, PLAIN = (
    *("arms.json", "sets.json", "features.safetensors", "projector.safetensors", "plain.txt"),
)
STREAM = "audio"


class _Reading(NamedTuple):
    task: str = STREAM


@dataclass
class PooledSet:
    """What :class:`avsr.data.dataset.SpeechDataset` is to training and scoring, of pooled features.

    Attributes:
        utterances: without files.
        sizes: (N,) int64 encoder frames before pooling, by which batches are made as in ``avsr train``.
        features: (T, D) float32 of every utterance, T = frames // rate.
        tokenize: text to token ids.
        reading: names the task.
    """

    utterances: list[Utterance]
    sizes: np.ndarray[Any, Any]
    features: Sequence[Tensor]
    tokenize: Any
    reading: _Reading = _Reading()

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, key: int | tuple[int, int]) -> Example:
        """Of an index, or of an index and an epoch as the trainer's schedule has them."""
        index = key[0] if isinstance(key, tuple) else key
        utterance = self.utterances[index]
        return Example(utterance, {STREAM: self.features[index]}, self.tokenize(utterance.text), STREAM)

    def first(self, count: int) -> PooledSet:
        return PooledSet(self.utterances[:count], self.sizes[:count], self.features[:count], self.tokenize)


class Engine:
    """AdamW on float32 masters in one process, as DeepSpeed's with ZeRO-1: the same operations in the same order.

    It has what :class:`~avsr.training.trainer.Trainer` uses of an engine.
    """

    def __init__(self, model: SpeechLLM, config: Config) -> None:
        training = config.training
        self.module = model.bfloat16() if settled_precision(training.precision) == "bf16" else model
        self._clip, self._norm, self._applied = training.clip, 0.0, True
        self._names = list(model.trainable())
        self._parameters = list(model.trainable().values())
        self._masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in self._parameters]
        self.optimizer = make_optimizer(self._masters, training)
        self.lr_scheduler = LambdaLR(
            self.optimizer,
            lambda step: learning_rate_factor(step, training.steps, training.warmup, training.decay),
        )

    def __call__(self, batch: Any) -> Terms:
        terms: Terms = self.module(batch)
        return terms

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def zero_optimization_stage(self) -> int:
        return 1

    @torch.no_grad()
    def step(self) -> None:
        """One update; none, with an infinite norm, if a gradient is not finite."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        norms = torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients])
        norm = torch.linalg.vector_norm(norms)
        self._norm = float(norm)
        self._applied = bool(norm.isfinite())
        if self._applied:
            scale = ((norm + 1e-6) / self._clip).clamp(min=1.0) if self._clip else torch.ones(())
            for master, gradient in zip(self._masters, gradients, strict=True):
                master.grad = gradient.float() * (1.0 / scale)
            self.optimizer.step()
            self.lr_scheduler.step()
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.copy_(master)
        for parameter in self._parameters:
            parameter.grad = None

    def was_step_applied(self) -> bool:
        return self._applied

    def get_global_grad_norm(self) -> float:
        return self._norm

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds, on CPU: trained ones from their masters."""
        masters = dict(zip(self._names, self._masters, strict=True))
        own = self.module.own_state()
        return {name: masters.get(name, p).detach().float().cpu().contiguous() for name, p in own.items()}


def config_from(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass of dataclasses from what ``dataclasses.asdict`` made of it, with JSON in between."""
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            name: config_from(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


class Export:
    """A folder of :func:`bench.study.export.write_export`.

    Raises:
        UserError: it is none, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        lacking = [name for name in (ARMS, SETS, FEATURES, PROJECTOR, PLAIN) if not (folder / name).is_file()]
        if lacking:
            raise UserError(f"{folder} is no export: it lacks {lacking[0]}; python -m bench.study --export makes one")
        held = json.loads((folder / ARMS).read_text(encoding="utf-8"))
        self.folder, self.commit, self.rate = folder, held["commit"], held["rate"]
        self.arms: dict[str, Any] = held["arms"]
        self.plain = (folder / PLAIN).read_text(encoding="utf-8")
        self._sets = json.loads((folder / SETS).read_text(encoding="utf-8"))
        self._features = read_file(folder / FEATURES)

    def key(self, name: str, seed: int) -> str:
        """Of an arm by its name.

        Raises:
            UserError: there is no such arm.
        """
        named = {(held["arm"]["name"], held["config"]["training"]["seed"]): key for key, held in self.arms.items()}
        if (name, seed) not in named:
            there = ", ".join(f"{known} {number}" for known, number in named)
            raise UserError(f"there is no arm {name!r} with seed {seed}; there are: {there}")
        return named[name, seed]

    def arm(self, key: str) -> tuple[Arm, Config]:
        held = self.arms[key]["arm"]
        penalty = None if held.get("penalty") is None else Penalty(**held["penalty"])
        return Arm(**{**held, "penalty": penalty}), config_from(Config, self.arms[key]["config"])

    def tests(self) -> list[str]:
        return [name for name in self._sets if name not in ("train", "validation")]

    def load(self, name: str, tokenize: Any) -> PooledSet:
        rows = self._sets[name]
        utterances = [Utterance(r["id"], None, r["text"], r["duration"], r["speaker"], where=r["id"]) for r in rows]
        frames = np.array([row["frames"] for row in rows], dtype=np.int64)
        features = self._features[name].split((frames // self.rate).tolist())
        return PooledSet(utterances, frames, features, tokenize)

    def model(self, config: Config, device: torch.device, *, training: bool) -> SpeechLLM:
        """The untrained model with the taught projector."""
        width = next(iter(self._features.values())).shape[1]
        model, _ = make_model(config, {STREAM: width}, device, training=training)
        load_some_weights(model, self.folder / PROJECTOR)
        return model


def train(export: Export, key: str, config: Config, device: torch.device) -> tuple[dict[str, Tensor], list[Any]]:
    """Trains an arm. Returns its weights, as a checkpoint holds them, and its metrics."""
    arm, _ = export.arm(key)
    settings = config.training
    if settings.accumulation != 1:
        raise UserError(f"{key}: training.accumulation = {settings.accumulation}, expected 1")
    seed_everything(settings.seed)
    model = export.model(config, device, training=True)
    options.apply(model, config)
    if arm.penalty is None:
        attach(model, config)
    else:
        attach_penalty(model, config, arm.penalty)
    engine = Engine(model, config)
    torch.manual_seed(settings.seed)
    train_set, validation = (export.load(name, model.tokenize) for name in ("train", "validation"))
    trainer = Trainer(engine, config, cast(Any, train_set), cast(Any, validation), Progress())
    rows = []
    with ProgressBar(key, settings.steps) as bar:
        for data in trainer.steps():
            started = time.perf_counter()
            row = trainer.row(trainer.step(data))
            row["seconds"] = time.perf_counter() - started
            last = row["step"] == settings.steps
            if last or row["step"] % settings.validate_every == 0:
                row.update(trainer.validate())
            rows.append(row)
            bar.advance(1, f"ce {row['ce']:.3f}")
            if last:
                break
    return engine.weights(), rows


def measure(
    export: Export, key: str, config: Config, device: torch.device, weights: dict[str, Tensor]
) -> dict[str, Any]:
    """What :func:`bench.study.measure.measure_settled` adds to a row, but transcripts in place of scores."""
    model = export.model(config, device, training=False).eval()
    own = model.own_state()
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    sets = {name: export.load(name, model.tokenize) for name in export.tests()}
    few: Any = next(iter(sets.values())).first(ANALYSED)
    row: dict[str, Any] = {"sinks": sinks(model, few, config), "transcripts": {}}
    for name, found in sets.items():
        seconds = [utterance.duration for utterance in found.utterances]
        with ProgressBar(f"{key}: {name}", len(found)) as bar:
            texts = {}
            for index, best in transcribe(model, found.__getitem__, seconds, config.decode):
                texts[index] = best[0].text
                bar.advance()
        row["transcripts"][name] = [[u.text, texts[index]] for index, u in enumerate(found.utterances)]
    row["perplexity"], row["plain_text_tokens"] = perplexity(model, export.plain)
    return row


def run_arm(export: Export, key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of an arm."""
    arm, config = export.arm(key)
    device = torch.device(arguments.device)
    config.model.llm.name = str(Path(arguments.llm).resolve())
    config.training.steps = arguments.steps or config.training.steps
    config.training.precision = settled_precision(config.training.precision)
    config.run = str(export.folder / "runs" / key.replace(" ", "-"))
    Path(config.run).mkdir(parents=True, exist_ok=True)
    config.data.workers = 0
    weights, rows = train(export, key, config, device)
    if arguments.weights:
        Path(arguments.weights).mkdir(parents=True, exist_ok=True)
        save_file(weights, Path(arguments.weights) / f"{key.replace(' ', '-')}.safetensors")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    machine = f"{export.commit}, {name}, {config.training.precision}"
    row = {"arm": plain_arm(arm), "key": key, "machine": machine, "steps": config.training.steps}
    return {**row, **curves(rows), **measure(export, key, config, device, weights), "metrics": rows}


def main(folder: Path) -> None:
    """The command line of ``run.py`` in ``folder``."""
    parser = argparse.ArgumentParser(prog="run.py", description="Trains and measures arms of the settled study.")
    parser.add_argument("arm", nargs="?", help="name of an arm")
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--all", action="store_true", help="every arm that has no row yet")
    parser.add_argument("--llm", required=True, metavar="FOLDER", help="the language model, converted to safetensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=0, help="in place of the plan's; such a row cannot be imported")
    parser.add_argument("--out", type=Path, default=Path("rows.jsonl"), help="gets the rows (default: rows.jsonl)")
    parser.add_argument("--weights", metavar="FOLDER", help="gets the trained weights of every arm")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with guarded():
        export = Export(folder)
        if not arguments.all and (arguments.arm is None or arguments.seed is None):
            raise UserError("name an arm and its seed, or --all")
        if not Path(arguments.llm).is_dir():
            raise UserError(f"--llm {arguments.llm}: there is no such folder; it needs the language model's files")
        keys = list(export.arms) if arguments.all else [export.key(arguments.arm, arguments.seed)]
        done = {row["key"] for row in read_rows(arguments.out, lambda row: row["key"])}
        store = dist.HashStore()  # the trainer asks for its rank
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            for key in keys:
                if key not in done:
                    append_row(arguments.out, run_arm(export, key, arguments))
        finally:
            dist.destroy_process_group()
