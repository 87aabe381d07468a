"""Builds the parts of a run from its config, and loads trained runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from avsr.config import TASKS, Config, ModelConfig, read_run_config
from avsr.config.composing import differences, leaves
from avsr.data.features import FeatureStore
from avsr.data.foreign import resolve
from avsr.data.noise import CLEAN, make_babble
from avsr.data.transforms import Transforms
from avsr.errors import UserError
from avsr.models.encoder import SpeechEncoder
from avsr.models.encoders import build_encoder
from avsr.models.llm import LoadedLLM, load_llm
from avsr.models.sources import inside_run
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime import folders
from avsr.runtime.machine import settled_precision
from avsr.runtime.tensors import read_file

WEIGHTS = "model.safetensors"
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
    dtype = torch.bfloat16 if settled_precision(config.training.precision) == "bf16" else torch.float32
    loaded = load_llm(config.model.llm, dtype, around)
    torch.manual_seed(config.training.seed)
    encoders = {name: encoder for name, encoder in speech_encoders(store).items() if name in store.inside}
    ways: Any = {"packed": config.training.packed, "cross_entropy": config.loss.cross_entropy} if training else {}
    model = SpeechLLM(config.model, loaded, {**(widths or {}), **store.widths}, encoders, **ways)
    return model.to(device), loaded


def speech_encoders(store: FeatureStore) -> dict[str, SpeechEncoder]:
    """The encoders that :func:`build_store` made."""
    return cast(dict[str, SpeechEncoder], store.encoders)


def find_checkpoint(run: str | Path, which: str = "best") -> Path:
    """The folder of a run's checkpoint. ``which`` is best (last if there is none), last, average or step-NNNNNN.

    Raises:
        UserError: the run has none, or none of this name; the message lists those it has.
    """
    checkpoints = Path(run) / "checkpoints"
    there = sorted(path.parent.name for path in checkpoints.glob(f"*/{WEIGHTS}") if not path.parent.suffix)
    if which == "best" and which not in there and (checkpoints / which).is_dir():
        raise UserError(f"{checkpoints / which} has no {WEIGHTS}: restore it, or name another one with --checkpoint")
    for name in (which, "last") if which == "best" else (which,):
        if name in there:
            return checkpoints / name
    if there:
        raise UserError(f"{run} has no checkpoint {which!r}; there are: {', '.join(there)}")
    raise UserError(f"{run} has no checkpoint in {checkpoints}; train it first")


def step_checkpoints(run: str | Path) -> list[Path]:
    """The folders ``checkpoints/step-NNNNNN`` of a run, oldest first."""
    found = {}
    for path in (Path(run) / "checkpoints").glob(f"step-*/{WEIGHTS}"):
        number = path.parent.name.removeprefix("step-")
        if number.isdecimal():
            found[int(number)] = path.parent
    return [found[step] for step in sorted(found)]


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, without reading these.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable checkpoint: {error}") from error


def load_weights(model: SpeechLLM, folder: Path) -> None:
    """Loads adapter, projector and delimiter tokens.

    Raises:
        UserError: the file is damaged, or a tensor is missing, unknown, of another shape or not finite; the message
            names the first such tensor and, where it does not fit, keys in which the checkpoint's config differs.
    """
    path = folder / WEIGHTS
    shapes = checkpoint_shapes(folder)
    own = model.own_state()
    problem = ""
    for name in sorted(own.keys() | shapes.keys()):
        if name not in shapes:
            problem = f"{name} is missing from the checkpoint"
        elif name not in own:
            problem = f"{name} of the checkpoint has no place in the model"
        elif shapes[name] != tuple(own[name].shape):
            problem = f"{name} has shape {shapes[name]} in the checkpoint and {tuple(own[name].shape)} in the model"
        if problem:
            differing = _config_differences(model.config, folder)
            raise UserError(f"{path} does not fit the config: {problem}{differing}")
    with torch.no_grad():
        for name, tensor in read_file(path).items():
            own[name].copy_(tensor.to(own[name]))


def load_some_weights(model: SpeechLLM, path: Path) -> None:
    """Loads initial weights: a safetensors file with any of the tensors of a checkpoint.

    Raises:
        UserError: the file is missing or damaged, or one of its tensors is not finite, has no place in the model or
            another shape.
    """
    own = model.own_state()
    given = read_file(path, "training.initial_weights")
    for name, tensor in given.items():
        place = own.get(name)
        if place is None or place.shape != tensor.shape:
            expected = "no such tensor" if place is None else f"shape {tuple(place.shape)}"
            raise UserError(
                f"training.initial_weights: {path}: {name} {tuple(tensor.shape)} does not fit, the model has {expected}"
            )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor.to(own[name]))


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


def _config_differences(ours: ModelConfig, folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return ""
    lines = differences(ours, read_run_config(folder).model, "model.")
    return "; config here != checkpoint: " + ", ".join(lines) if lines else ""
