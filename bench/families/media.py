"""Images and audio inside a text: what a multimodal class takes for them, and for how many placeholders they stand."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.families import inputs
from bench.families.build import quiet
from bench.families.inputs import Arguments, Takes

BEFORE, AFTER, MOST = 5, 13, 100  # tokens of text around, and placeholders in between at most
_FEATURES = {
    "image": ("get_image_features", ("image_token_id", "image_token_index")),
    "audio": ("get_audio_features", ("audio_token_id", "audio_token_index")),
}
_TYPES = ("token_type_ids", "mm_token_type_ids")


def block(model: Any, form: Takes, kind: str) -> Arguments | None:
    """A call of two rows, each with one image (or audio) in its text, that ``model`` runs and that depends on it; None
    if none is found. ``kind``: "image" or "audio"."""
    function, names = _FEATURES[kind]
    token = _from_configs(model.config, names)
    method = next((getattr(m, function) for m in model.modules() if hasattr(m, function)), None)
    if token is None or form.text != "input_ids":
        return None
    for media in _images(model, form) if kind == "image" else _audio(model, form):
        counts = range(1, MOST) if method is None else [_placeholders(method, media)]
        for count in counts:
            if not 0 < count <= MOST:
                continue
            given = _text(form, token, count) | media
            for name in _TYPES:
                if name in form.names:
                    given[name] = (given["input_ids"] == token).long() * (2 if kind == "audio" else 1)
            if not inputs.failure(model, given) and _depends(model, given, next(iter(media))):
                return given
    return None


def left_padded(given: Arguments) -> Arguments:
    """The second row of ``given`` three tokens later, behind padding; its last ones give way."""
    made = dict(given)
    mask = torch.ones_like(given["input_ids"])
    for name, value in {"attention_mask": mask, **given}.items():
        if name in ("attention_mask", "input_ids", *_TYPES):
            made[name] = value.clone()
            made[name][1] = torch.cat([value.new_zeros(3), value[1, :-3]])
    return made


def _from_configs(config: Any, names: tuple[str, ...]) -> int | None:
    """An attribute of a config or of one inside it."""
    for part in _parts(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int):
                return value
    return None


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _parts(value)


def _text(form: Takes, token: int, count: int) -> Arguments:
    ids = inputs.ids(2, BEFORE + count + AFTER)
    ids[:, BEFORE : BEFORE + count] = token
    return {"input_ids": ids}


def _images(model: Any, form: Takes) -> Iterator[Arguments]:
    """By convention of the model's processor: whole images, one more dimension for images of a row, flat patches."""
    generator = torch.Generator().manual_seed(4)
    for pixels in inputs.images(model.config):
        height = pixels.shape[-1]
        sizes: Arguments = {"image_sizes": torch.full((2, 2), height)} if "image_sizes" in form.names else {}
        for given in ({}, sizes) if sizes else ({},):
            yield {"pixel_values": pixels} | given
            yield {"pixel_values": pixels[:, None]} | given
            yield {"pixel_values": torch.stack([pixels] * 5, 1)} | given
    if "image_grid_thw" in form.names:
        vision = next((part for part in _parts(model.config) if hasattr(part, "patch_size")), None)
        patch, time = getattr(vision, "patch_size", 14), getattr(vision, "temporal_patch_size", 1)
        for size in dict.fromkeys((3 * time * patch**2, 3 * patch**2)):
            patches = torch.randn(2 * 16, size, generator=generator)
            yield {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        patches = torch.randn(2 * 16, 3, patch, patch, generator=generator)
        yield {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def _audio(model: Any, form: Takes) -> Iterator[Arguments]:
    masks = [name for name in form.names if name.endswith("mask") and ("feature" in name or "audio" in name)]
    for name, shapes in inputs.audio(model.config).items():
        if name not in form.names:
            continue
        for value in shapes:
            for frames in dict.fromkeys(value.shape[1:]):
                whole = torch.ones(2, frames, dtype=torch.long)
                yield {name: value} | {mask: whole for mask in masks}
                yield {name: value} | {mask: whole.bool() for mask in masks}


def _placeholders(method: Any, media: Arguments) -> int:
    """Of one row; 0 if the features cannot be made."""
    accepted = inspect.signature(method).parameters
    try:
        given = {name: value for name, value in media.items() if name in accepted or "args" in accepted}
        with torch.no_grad(), quiet():
            output = method(**given)
    except Exception:
        return 0
    features = output if isinstance(output, (Tensor, list, tuple)) else getattr(output, "pooler_output", None)
    if features is None:
        features = output.last_hidden_state
    parts = [features] if isinstance(features, Tensor) else list(features)
    if not all(isinstance(part, Tensor) for part in parts):
        return 0
    return sum(part.numel() // part.shape[-1] for part in parts) // 2


def _depends(model: Any, given: Arguments, name: str) -> bool:
    from bench.families.cells import main_output

    with torch.no_grad(), quiet():
        one, two = (main_output(model(**given | {name: given[name] * sign})) for sign in (1, -1))
    return one is not None and two is not None and not torch.equal(one, two)
