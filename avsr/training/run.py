"""Training. One process: ``avsr train CONFIG [key=value ...]``; many, on one or more nodes:
``deepspeed [--hostfile H] --module avsr.train CONFIG [key=value ...]``.

The run folder gets config.yaml, frames.json (the utterances and their lengths), metrics.jsonl, checkpoints/ and
tensorboard/, if needed rejected.jsonl, lost.jsonl and nonfinite.jsonl, and during training .lock.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from avsr.config import Config, load_config
from avsr.data.dataset import REJECTED, Reading, Sizes, SpeechDataset, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.overlap import judges, overlaps
from avsr.data.transforms import PLAIN
from avsr.errors import UserError, guarded
from avsr.models.build import build_model, build_store, pick_device
from avsr.models.speech_llm import SpeechLLM
from avsr.models.weights import load_some_weights
from avsr.runtime import locks
from avsr.runtime.machine import settled_precision
from avsr.training import options, resume
from avsr.training.checkpoint import Progress, agree
from avsr.training.engine import make_engine, partitioned_loading, start_distributed
from avsr.training.frames import read_frames, write_frames
from avsr.training.losses import attach
from avsr.training.trainer import Trainer, seed_everything
from avsr.training.watchdog import Watchdog

logger = logging.getLogger("avsr")


_GONE = ("closed by peer", "reset by peer", "Broken pipe")  # what gloo says of a rank that has ended
Prepare = Callable[[SpeechLLM, Config], None]


def train(config: Config, prepare: Prepare | None = None) -> Path:
    """Trains ``config`` to the end and returns the run folder.

    Args:
        config: what to train.
        prepare: called once with the model before the engine takes its parameters, instead of :func:`attach`.

    Raises:
        UserError: bad input.
        avsr.errors.Interrupted: a signal stopped it; the run can be resumed.
    """
    with ExitStack() as held:
        trainer = make_trainer(config, prepare, held)
        trainer.fit()
    trainer.model.detach()
    return Path(config.run)


def make_trainer(config: Config, prepare: Prepare | None = None, held: ExitStack | None = None) -> Trainer:
    """Does everything up to the first step; makes the run folder, or with ``resume`` reads it.

    Args:
        config: what to train.
        prepare: as in :func:`train`.
        held: receives what must last as long as training: the watchdog, without which a rank that fails leaves the
            others waiting, and rank 0's lock on the run folder. Without it there is neither.
    """
    watchdog = Watchdog(config.training.timeout)
    if held is not None:
        held.enter_context(watchdog)
    rank, world = start_distributed(watchdog)
    config.training.precision = settled_precision(config.training.precision)  # once, for the saved config too
    device = pick_device()
    options.check(config, device)
    watchdog.enter("run folder", 0)
    checkpoint, began = _begin(config, rank, world, held)
    seed_everything(config.training.seed)
    watchdog.enter("model", 0)
    store = build_store(config, device, levels=config.augment.snr)
    model, loaded = build_model(config, store, device, around=partitioned_loading(config), training=True)
    if config.training.initial_weights and not checkpoint:
        load_some_weights(model, Path(config.training.initial_weights))
    watchdog.enter("manifests", 0)
    train_set, validation = _load_splits(config, store, model, loaded.tokenize, began)
    if not began:
        _keep_frames(Path(config.run), rank, train_set, validation)
    watchdog.enter("engine", 0)
    options.apply(model, config)
    (prepare or attach)(model, config)
    if config.training.compile:
        options.compile_parts(model)
    start = resume.load_start(config, checkpoint, model)
    engine = make_engine(model, config)
    if rank == 0:
        count = sum(getattr(p, "ds_numel", p.numel()) for p in model.trainable().values())
        logger.info("%s: %d utterances, %d trained parameters", config.run, len(train_set), count)
    torch.manual_seed(config.training.seed + rank)
    if start is not None:
        resume.load_engine(engine, start)
    return Trainer(engine, config, train_set, validation, start.progress if start else Progress(), watchdog)


def _begin(config: Config, rank: int, world: int, held: ExitStack | None) -> tuple[str, dict[str, Sizes]]:
    """Locks and makes the run folder, on rank 0. Returns the name of the checkpoint to resume from, or "", and what
    :func:`~avsr.training.frames.read_frames` found."""
    found: list[Any] = ["", "", {}]
    if rank == 0:
        try:
            if held is not None:
                held.enter_context(locks.hold(Path(config.run), key="run"))
            found[1:] = resume.prepare_run(config, world), read_frames(Path(config.run))
        except UserError as error:
            found[0] = str(error)
    dist.broadcast_object_list(found, src=0)
    failure, checkpoint, began = found
    if failure:
        raise UserError(failure)
    return checkpoint, began


def _keep_frames(run: Path, rank: int, train: SpeechDataset, validation: SpeechDataset) -> None:
    failure = ""
    if rank == 0:
        try:
            write_frames(run, {"train": train.frames, "validation": validation.frames})
        except UserError as error:
            failure = str(error)
    if failure := agree(failure):
        raise UserError(failure)


def _load_splits(
    config: Config,
    store: FeatureStore,
    model: SpeechLLM,
    tokenize: Callable[[str], list[int]],
    began: Mapping[str, Sizes],
) -> tuple[SpeechDataset, SpeechDataset]:
    """The training and the validation set; ``began`` holds the frames of both when the run began, if it did."""
    settings = config.training

    def refuse(frames: dict[str, int], tokens: int) -> str:
        count = sum(frames.values())
        if count > settings.frames:
            return f"has {count} frames and does not fit training.frames = {settings.frames}"
        return model.layout.unusable(frames, tokens)

    def load(name: str, manifest: str, reading: Reading) -> SpeechDataset:
        title = f"read {name}"
        return load_dataset(
            manifest,
            config.data,
            store,
            tokenize,
            title=title,
            reading=reading,
            refuse=refuse,
            began=began.get(name),
            rejected=Path(config.run) / REJECTED,
        )

    task, augment, lossy = config.model.task, config.augment, config.data.on_bad == "skip"
    reading = Reading(task, PLAIN, settings.tasks, augment.views, augment.active, settings.seed, lossy)
    plain = Reading(task, lossy=lossy)
    train, validation = load("train", config.data.train, reading), load("validation", config.data.validation, plain)
    if dist.get_rank() == 0:
        for line in overlaps(train.utterances, {"data.validation": validation.utterances, **judges(config.data)}):
            logger.warning(line)
    return train, validation


def train_and_leave(config: Config, prepare: Prepare | None = None) -> Path:
    """:func:`train`, then destroys the process group that it started: its threads would abort the exit."""
    with process_group():
        return train(config, prepare)


@contextmanager
def process_group() -> Iterator[None]:
    """Destroys the process group that is started inside this context.

    Raises:
        UserError: another rank has ended without a word, as killed ones do.
    """
    own = not dist.is_initialized()
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _GONE):
            raise
        rank = os.environ.get("RANK", "0")
        lost = f"rank {rank} lost its connection to another rank, which has ended"
        raise UserError(f"{lost}: its messages, or its host's log, say why") from error
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    """Entry point for the ``deepspeed`` launcher."""
    parser = argparse.ArgumentParser(prog="avsr.train")
    parser.add_argument("config", type=os.path.expanduser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    arguments = parser.parse_args()
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    with guarded():
        train_and_leave(load_config(arguments.config, arguments.overrides))


if __name__ == "__main__":
    main()
