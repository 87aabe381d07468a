"""Typed configuration: the keys of ``avsr.config.schema``, composed from YAML files by ``avsr.config.composing``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from avsr.config.rules import check_config
from avsr.config.schema import (
    TASKS,
    ActConfig,
    AugmentConfig,
    CompressionConfig,
    Config,
    DataConfig,
    DecodeConfig,
    DeepSpeedConfig,
    DelimiterConfig,
    EncoderConfig,
    LLMConfig,
    LogConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    ProjectorConfig,
    PromptConfig,
    StreamConfig,
    TrainingConfig,
    parts_of,
)
from avsr.errors import UserError

__all__ = [
    "TASKS",
    "ActConfig",
    "AugmentConfig",
    "CompressionConfig",
    "Config",
    "DataConfig",
    "DecodeConfig",
    "DeepSpeedConfig",
    "DelimiterConfig",
    "EncoderConfig",
    "LLMConfig",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "NoiseConfig",
    "ProjectorConfig",
    "PromptConfig",
    "StreamConfig",
    "TrainingConfig",
    "load_config",
    "parts_of",
    "read_run_config",
    "to_yaml",
]


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe, applies ``key=value`` overrides and checks every key and value.

    Args:
        name: a YAML file, or the name of one below ``configs/`` or ``configs/recipe/`` without its suffix; several
            joined by "+", of which later ones win ("asr_16+data/lrs2+llm/llama_3_2_1b").
        overrides: such as ``training.steps=50``.

    Raises:
        UserError: missing or broken file, unknown key (with the nearest valid one), bad value.
    """
    from avsr.config.composing import compose  # needs OmegaConf, which a trained model does without

    config = compose(name, overrides, Config)
    training = config.training
    training.gradient_checkpointing = (
        training.gradient_checkpointing.lower()
    )  # YAML's booleans arrive as True and False
    check_config(config, name)
    return config


def read_run_config(run: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run folder, with overrides.

    Raises:
        UserError: it is missing, damaged, or ends within a line: half a YAML file may well be read, and gives defaults.
    """
    path = Path(run) / "config.yaml"
    if not os.path.isfile(path):
        raise UserError(f"{run} is not a run: {path} is missing (train one with 'avsr train CONFIG')")
    config = load_config(str(path), overrides)
    if not path.read_bytes().endswith(b"\n"):
        raise UserError(f"{path} ends within a line: restore it, or if it is whole end that line")
    config.run = str(run)
    return config


def to_yaml(config: Config) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
