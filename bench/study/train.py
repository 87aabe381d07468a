"""One training of the study, in this process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from avsr.config import Config, load_config
from avsr.data.features import FeatureStore
from avsr.models.build import build_model, build_store, pick_device
from avsr.models.speech_llm import SpeechLLM
from avsr.models.weights import find_checkpoint, load_some_weights, load_weights
from avsr.training.checkpoint import STATE
from avsr.training.losses import attach
from avsr.training.run import train_and_leave
from avsr.training.warm_start import warm_projector
from bench.study import corpus, settled
from bench.study.faithful import make_faithful
from bench.study.grid import NO_LAYERNORM, STEPS, Arm
from bench.study.penalty import attach_penalty
from bench.study.sink_logits import add_sink_logits

FOLDER = Path("runs/study")


SHORT_RECIPE = (
    *corpus.OVERRIDES,
    "training.validate_every=50",
    "training.save_every=100000",
    "training.gradient_norms_every=25",
    "decode.base_tokens=4",
    "decode.tokens_per_second=6",  # the longest reference has 5
)


def config_of(arm: Arm, folder: Path = FOLDER) -> Config:
    """The config of ``arm``'s run."""
    recipe, steps = (settled.RECIPE, settled.STEPS) if arm.settled else (SHORT_RECIPE, STEPS[arm.rate])
    return load_config(
        "demo",
        [
            f"run={folder / arm.key.replace(' ', '-')}",
            f"model.audio.compression.rate={arm.rate}",
            f"loss.decorrelation={arm.weight}",
            f"loss.margin={arm.margin}",
            f"loss.anchor={arm.anchor}",
            f"training.seed={arm.seed}",
            f"training.steps={arm.steps or steps}",
            "training.frames=4000",
            "decode.batch=50",
            "log.tensorboard=false",
            *recipe,
            *arm.overrides,
        ],
    )


def projector_file(rate: int, folder: Path = FOLDER, *, layernorm: bool = True) -> Path:
    """The pretrained projector of a rate; trained if it is missing."""
    overrides = [
        *corpus.OVERRIDES,
        f"data.train={corpus.warm(rate)}",
        f"model.audio.compression.rate={rate}",
        "training.seed=0",
        *([] if layernorm else [NO_LAYERNORM]),
    ]
    config = load_config("demo", ["run=none", *overrides])
    return warm_projector(config, folder / f"projector-{rate}{'' if layernorm else '-plain'}.safetensors")


def change(model: SpeechLLM, arm: Arm, folder: Path = FOLDER) -> None:
    """Turns the untrained ``model`` into the one that ``arm`` starts with."""
    if not arm.cold:
        load_some_weights(model, projector_file(arm.rate, folder, layernorm=arm.layernorm))
    if arm.sink_logits:
        add_sink_logits(model)


def train_arm(arm: Arm, folder: Path = FOLDER) -> Path:
    """Trains ``arm``, or goes on with what is there of it, and returns its run folder."""
    config = config_of(arm, folder)
    if Path(config.run).exists():
        # what a killed process left before its first checkpoint is of no use
        if (Path(config.run) / "checkpoints" / "last" / STATE).is_file():
            config.resume = True
        else:
            shutil.rmtree(config.run)

    def prepare(model: SpeechLLM, config: Config) -> None:
        change(model, arm, folder)
        if arm.faithful:
            make_faithful(model)
        if arm.penalty is not None:
            attach_penalty(model, config, arm.penalty)
        elif not arm.sink_logits:  # which brings its own attention
            attach(model, config)

    return train_and_leave(config, prepare)


def load_arm(
    arm: Arm, folder: Path = FOLDER, *overrides: str, trained: bool = True
) -> tuple[Config, SpeechLLM, FeatureStore]:
    """The model of ``arm``, trained or as training starts."""
    arm = replace(arm, overrides=(*arm.overrides, *overrides))
    config = config_of(arm, folder)
    store = build_store(config, pick_device())
    model, _ = build_model(config, store, pick_device())
    change(model, arm, folder)
    if trained:
        load_weights(model, find_checkpoint(config.run, "last"))
    return config, model.eval(), store
