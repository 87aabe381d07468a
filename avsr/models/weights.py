"""The weights of a checkpoint: where they are, and how they get into a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from avsr.config import ModelConfig, read_run_config
from avsr.errors import UserError
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.tensors import read_file

WEIGHTS = "model.safetensors"


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


def _config_differences(ours: ModelConfig, folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return ""
    from avsr.config.composing import differences  # needs OmegaConf

    lines = differences(ours, read_run_config(folder).model, "model.")
    return "; config here != checkpoint: " + ", ".join(lines) if lines else ""
