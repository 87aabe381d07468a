"""Builds the parts of a run from its config, and loads trained runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from avsr.config import TASKS, Config, ModelConfig, read_run_config
from avsr.config.composing import leaves
from avsr.data.features import FeatureStore
from avsr.data.foreign import resolve
from avsr.data.noise import CLEAN, make_babble
from avsr.data.transforms import Transforms
from avsr.errors import UserError
from avsr.models.encoder import SpeechEncoder
from avsr.models.encoders import build_encoder
from avsr.models.llm import LoadedLLM
from avsr.models.sources import inside_run
from avsr.models.speech_llm import SpeechLLM, make_model
from avsr.models.weights import WEIGHTS, checkpoint_shapes, find_checkpoint, load_weights
from avsr.runtime import folders

logger = logging.getLogger("avsr")


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    # transformers imports DeepSpeed while loading a model, which would print to stdout that it found no device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def build_store(
    config: Config,
    device: torch.device,
    tasks: Sequence[str] = (),
    levels: Sequence[float] = (),
    widths: Mapping[str, int] | None = None,
) -> FeatureStore:
    """The encoders of the streams, with noise and augmentation.

    Args:
        config: the run's.
        device: of the encoders.
        tasks: determine which streams are read; default: the model's own task.
        levels: signal-to-noise ratios (dB) that will be requested. Noise is loaded only if a stream has sound.
        widths: known feature sizes by stream. A stream that has one needs no encoder unless it is read or its encoder
            has weights in the checkpoint.
    """
    read = {name for task in tasks or [config.model.task] for name in TASKS[task]}
    encoders = {}
    for name, part in config.model.streams.items():
        if name not in read and not part.encoder.lora.rank and name in (widths or {}):
            continue
        torch.manual_seed(config.training.seed)  # for its adapters
        settings = replace(part.encoder, name=inside_run(str(part.encoder.name), config.run))
        encoders[name] = build_encoder(settings, name, device)
    trained = [name for name in encoders if config.model.streams[name].encoder.lora.rank]
    hears = any("audio" in encoders[name].needs for name in encoders if name in read)
    levels = levels if hears else []
    source = config.data.train, config.data.allow_absolute
    if not (config.noise.file or config.noise.babble or all(level == CLEAN for level in levels)):
        source = resolve(config.data.train, config.data)
    babble = make_babble(config.noise, levels, *source)
    transforms = Transforms(config.augment, babble, config.training.seed)
    return FeatureStore(encoders, config.data, transforms, trained, [name for name in encoders if name in read])


def build_model(
    config: Config,
    store: FeatureStore,
    device: torch.device,
    widths: Mapping[str, int] | None = None,
    around: AbstractContextManager[None] = nullcontext(),  # noqa: B008
    *,
    training: bool = False,
) -> tuple[SpeechLLM, LoadedLLM]:
    """The untrained model; its new parameters depend on ``training.seed`` alone.

    Args:
        config: the run's.
        store: of :func:`build_store`.
        device: of the model.
        widths: feature sizes of streams that the store has no encoder of.
        around: the LLM's weights are read inside this context.
        training: the forward packs rows and computes the cross entropy as ``config`` says, else plainly.
    """
    encoders = {name: encoder for name, encoder in speech_encoders(store).items() if name in store.inside}
    return make_model(config, {**(widths or {}), **store.widths}, device, encoders, around, training=training)


def speech_encoders(store: FeatureStore) -> dict[str, SpeechEncoder]:
    """The encoders that :func:`build_store` made."""
    return cast(dict[str, SpeechEncoder], store.encoders)


def load_run(
    run: str | Path, overrides: list[str], device: torch.device, which: str = "best", *, single: bool = False
) -> tuple[Config, SpeechLLM, FeatureStore]:
    """A trained run, ready for decoding, with ``key=value`` overrides of its config.

    It can decode all of ``decode.tasks`` and ``noise.snr``, or if ``single`` only the first task, without noise. Every
    ``model.*`` that is not as in training is said: the weights may fit, and the results still be others.
    """
    config = read_run_config(run, overrides)
    folder = find_checkpoint(run, which)
    if problem := folders.damage(folder, WEIGHTS):
        raise UserError(problem)
    tasks, levels = (config.decode.tasks[:1], []) if single else (config.decode.tasks, config.noise.snr)
    widths = _projected_widths(config.model, folder)
    store = build_store(config, device, tasks, levels, widths)
    model, _ = build_model(config, store, device, widths)
    load_weights(model, folder)
    _say_differences(config, folder)
    return config, model.eval(), store


def _projected_widths(model: ModelConfig, folder: Path) -> dict[str, int]:
    """The width of the features that each projector of a checkpoint reads."""
    shapes = checkpoint_shapes(folder)
    widths = {}
    for name, part in model.streams.items():
        shape = shapes.get(f"projectors.{name}.0.weight")
        if shape is not None and len(shape) == 2:
            widths[name] = shape[1] // (part.compression.rate if part.compression.kind == "stack" else 1)
    return widths


def _say_differences(config: Config, folder: Path) -> None:
    """``folder`` is the checkpoint's; a run's own config may have been edited since."""
    trained = read_run_config(folder if (folder / "config.yaml").is_file() else config.run)
    for (name, ours), (_, theirs) in zip(leaves(config.model), leaves(trained.model), strict=True):
        if ours != theirs:
            logger.warning("model.%s: trained with %r, evaluated with %r", name, theirs, ours)
