"""Training. One process: ``avsr train CONFIG [key=value ...]``; many, on one or more nodes:
``deepspeed [--hostfile H] --module avsr.train CONFIG [key=value ...]``.

The run folder then holds config.yaml, metrics.jsonl, checkpoints/ and tensorboard/.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from avsr.build import build_model, build_store, pick_device, settle_precision
from avsr.config import Config, load_config
from avsr.data.dataset import Reading, load_dataset
from avsr.data.transforms import PLAIN
from avsr.errors import UserError, guarded
from avsr.models.speech_llm import SpeechLLM
from avsr.training import resume
from avsr.training.checkpoint import Progress, agree
from avsr.training.engine import make_engine, partitioned_loading, start_distributed
from avsr.training.trainer import Trainer, seed_everything

logger = logging.getLogger("avsr")


def train(config: Config, prepare: Callable[[SpeechLLM, Config], None] | None = None) -> Path:
    """Trains ``config`` to the end and returns the run folder.

    Args:
        config: what to train.
        prepare: called once with the model before the engine takes its parameters, in place of :func:`attach`.

    Raises:
        UserError: bad input.
        avsr.errors.Interrupted: a signal stopped it; the run can be resumed.
    """
    rank, world = start_distributed()
    settle_precision(config)
    failure, name = "", ""
    if rank == 0:
        try:
            name = resume.prepare_run(config, world)
        except UserError as error:
            failure = str(error)
    if failure := agree(failure):
        raise UserError(failure)
    name = agree(name)
    seed_everything(config.training.seed)
    device = pick_device()
    store = build_store(config, device, levels=config.augment.snr)
    model, loaded = build_model(config, store, device, around=partitioned_loading(config))

    def refuse(frames: dict[str, int], tokens: int) -> str:
        count = sum(frames.values())
        if count > config.training.frames:
            return f"has {count} frames and does not fit training.frames = {config.training.frames}"
        return model.refuse(frames, tokens)

    settings = config.training
    reading = Reading(
        config.model.task, PLAIN, settings.tasks, config.augment.views, config.augment.active, settings.seed
    )
    splits = [
        load_dataset(manifest, config.data, store, loaded.tokenize, title=f"read {name}", reading=how, refuse=refuse)
        for name, manifest, how in (
            ("train", config.data.train, reading),
            ("validation", config.data.validation, Reading(config.model.task)),
        )
    ]
    if config.training.gradient_checkpointing:
        model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    (prepare or attach)(model, config)
    start = resume.load_start(config, name, model)
    engine = make_engine(model, config)
    if rank == 0:
        count = sum(getattr(p, "ds_numel", p.numel()) for p in model.trainable().values())
        logger.info("%s: %d utterances, %d trained parameters", config.run, len(splits[0]), count)
    torch.manual_seed(config.training.seed + rank)
    if start is not None:
        resume.load_engine(engine, start)
    Trainer(engine, config, splits[0], splits[1], start.progress if start else Progress()).fit()
    model.detach()
    return Path(config.run)


def attach(model: SpeechLLM, config: Config) -> None:
    """flashsink for training: the decorrelation loss only when it counts, sinks only through its own attention."""
    model.attach(
        attention=config.model.llm.attention == "flashsink",
        decorrelation=config.loss.decorrelation > 0,
        activations=False,
        margin=config.loss.margin,
    )
    model.packed = config.training.packed


def train_and_leave(config: Config, prepare: Callable[[SpeechLLM, Config], None] | None = None) -> Path:
    """:func:`train`, then stops the threads of the process group that it started, or the exit would abort."""
    own = not dist.is_initialized()
    try:
        return train(config, prepare)
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    """Entry point under the ``deepspeed`` launcher."""
    parser = argparse.ArgumentParser(prog="avsr.train")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    arguments = parser.parse_args()
    with guarded():
        train_and_leave(load_config(arguments.config, arguments.overrides))


if __name__ == "__main__":
    main()
