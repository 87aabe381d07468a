"""Rules that relate several keys, or that a key's own bounds cannot express."""

from __future__ import annotations

import math
import os

from avsr.config.keys import check
from avsr.config.schema import Config, DeepSpeedConfig, TrainingConfig, parts_of
from avsr.errors import UserError


def check_config(config: Config, name: str) -> None:
    """Checks every key by itself and all of them together.

    Args:
        config: complete.
        name: of the config, for messages.

    Raises:
        UserError: names the key, the value and what is expected.
    """
    if config.training.precision == "fp16":
        raise UserError(
            "training.precision: expected one of fp32, bf16, auto, got 'fp16': massive activations of 26,000 and a "
            "large lambda leave no room below fp16's 65,504"
        )
    check(config)
    _check_streams(config, name)
    _check_tasks(config)
    _check_data(config)
    _check_training(config)
    _check_gradient_norms(config)
    _check_offload(config.deepspeed)
    if config.decode.nbest > config.decode.beams:
        raise UserError(
            f"decode.nbest: expected at most decode.beams = {config.decode.beams}, got {config.decode.nbest}"
        )


def _check_streams(config: Config, name: str) -> None:
    model = config.model
    missing = [f"model.{stream}.encoder.name" for stream, part in model.streams.items() if not part.encoder.name]
    if missing:
        raise UserError(f"{name}: no value for {', '.join(missing)}, which model.task = {model.task} needs")
    if model.delimiters.init == "none" and model.delimiters.train:
        raise UserError("model.delimiters.train: there is nothing to train with model.delimiters.init = none")
    for stream, part in model.streams.items():
        if part.encoder.lora.rank and part.encoder.kind != "avhubert":
            raise UserError(f"model.{stream}.encoder.lora: not available for {part.encoder.kind}; set its rank to 0")
        if part.encoder.lora.rank and part.encoder.precision != "fp32":
            raise UserError(f"model.{stream}.encoder.precision: with LoRA, training.precision decides; set it to fp32")


def _check_tasks(config: Config) -> None:
    parts = parts_of(config.model.task)
    for key, tasks in (("training.tasks", config.training.tasks), ("decode.tasks", config.decode.tasks)):
        for task in tasks:
            if task not in parts:
                raise UserError(f"{key}: model.task = {config.model.task} knows {', '.join(parts)}, got {task!r}")
    weights = config.training.tasks.values()
    if weights and not (min(weights) >= 0 and sum(weights) > 0):
        raise UserError(f"training.tasks: expected weights of at least 0 and one above, got {config.training.tasks}")


def _check_data(config: Config) -> None:
    for key, levels in (("noise.snr", config.noise.snr), ("augment.snr", config.augment.snr)):
        for level in levels:
            if not level > -math.inf:  # NaN too
                raise UserError(f"{key}: expected levels in dB, or inf for clean, got {level}")
    if config.augment.active and config.data.cache and not config.augment.views:
        raise UserError(
            "augment.views: a cache holds a fixed number of versions of every clip: give that number, or set "
            "data.cache=null"
        )
    for key, path in config.data.test.items():
        if not isinstance(path, str):
            raise UserError(f"data.test.{key}: expected the path of a manifest, got {path!r}")
    if os.path.abspath(config.data.validation) in map(os.path.abspath, config.data.test.values()):
        raise UserError("data.validation: the best checkpoint must not be chosen on a test manifest")


def _check_training(config: Config) -> None:
    training = config.training
    if len(training.betas) != 2 or not all(0 <= beta < 1 for beta in training.betas):
        raise UserError(f"training.betas: expected two numbers in [0, 1), got {training.betas}")
    if config.log.attention and config.model.llm.attention != "flashsink":
        raise UserError("log.attention: needs model.llm.attention=flashsink, which measures it")
    if training.packed and config.model.llm.attention != "flashsink":
        raise UserError("training.packed: needs model.llm.attention=flashsink, which keeps packed utterances apart")
    _check_compile(training)


def _check_compile(training: TrainingConfig) -> None:
    """A compiled MLP does not expose the products that selective checkpointing keeps."""
    if training.compile and training.gradient_checkpointing == "selective":
        raise UserError(
            "training.compile: not with training.gradient_checkpointing=selective; set that to true or false"
        )
    if training.compile and training.kernels == "liger":
        raise UserError("training.compile: training.kernels=liger replaces everything that it compiles; choose one")


def _check_gradient_norms(config: Config) -> None:
    """The norms of each term need a second backward pass through the same forward pass."""
    if not config.training.gradient_norms_every:
        return
    for refused, reason in (
        (config.deepspeed.stage == 3, "not available under ZeRO stage 3"),
        (config.training.gradient_checkpointing == "selective", "not with training.gradient_checkpointing=selective"),
        (config.loss.cross_entropy == "liger", "not with loss.cross_entropy=liger"),
    ):
        if refused:
            raise UserError(f"training.gradient_norms_every: {reason}; set it to 0")


def _check_offload(deepspeed: DeepSpeedConfig) -> None:
    for key, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
        if getattr(deepspeed, key) and deepspeed.stage < least:
            raise UserError(f"deepspeed.{key}: needs deepspeed.stage of at least {least}, got {deepspeed.stage}")
