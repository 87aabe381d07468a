"""Reads pre-trained AV-HuBERT weights, mainly the official fairseq ``.pt`` files, without fairseq.

A ``.pt`` file is a pickle. It is read by torch's restricted unpickler, which knows tensors and plain containers;
the one foreign class in a pre-trained file (its dictionary of cluster names) is replaced by an inert object, and any
other class is refused by name. The weights are then converted once to safetensors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from avsr.errors import UserError
from avsr.models.avhubert_network import HEAD, AVHubert, AVHubertConfig
from avsr.models.formats.torch_file import load_torch_file
from avsr.models.sources import convert_once, loading, resolve
from avsr.runtime.folders import cache_folder
from avsr.runtime.tensors import save_file

WEIGHTS = "model.safetensors"
LICENCE = "AV-HuBERT's weights are for non-commercial research only (Meta's AV-HuBERT licence agreement)"
_DICTIONARY = "fairseq.data.dictionary.Dictionary"
TRAINING_ONLY = re.compile(r"label_embs_concat|final_proj\.|target_glu\.|num_updates")  # not part of the encoder
_FINE_TUNED = re.compile(r"(encoder\.)?w2v_(model|encoder)\.|decoder\.")
_MOST_LAYERS = 48  # LARGE has 24
_log = logging.getLogger(__name__)


class _Inert:
    """Replaces fairseq's dictionary: it holds the data of the file and has no behavior."""


def load_avhubert(name: str) -> AVHubert:
    """A pre-trained AV-HuBERT in float32, frozen, in eval mode.

    Args:
        name: an official ``.pt`` file, the folder or ``.safetensors`` file made of one, or ``package:NAME``.

    Raises:
        UserError: a missing, damaged or foreign file, a fine-tuned model, or one that is not an AV-HuBERT; the
            message names the file and the first key that differs.
    """
    source = resolve(name)
    if isinstance(source, str):
        raise UserError(
            f"{name}: AV-HuBERT is not read from a hub; name the official file (such as large_vox_iter5.pt) or a "
            "folder converted from it"
        )
    path = source / WEIGHTS if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"{source}: the folder holds no {WEIGHTS}")
    if path.suffix != ".safetensors":
        path = convert_fairseq(path) / WEIGHTS
    with loading(f"{path}: not a readable safetensors file"):
        state = load_file(path)
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    config = check_state(state, path)
    with torch.device("meta"):
        model = AVHubert(config)
    model.load_state_dict(state, assign=True)
    _say_licence()
    return model.eval().requires_grad_(False)


def convert_fairseq(path: Path) -> Path:
    """The weights of a fairseq file as a folder in the cache (``model.safetensors`` and ``config.json``)."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_folder() / "models" / f"{path.stem}-{key}"

    def write(folder: Path) -> None:
        config, state = read_fairseq(path)
        save_file(state, str(folder / WEIGHTS))
        about = {"model": "avhubert", **asdict(config), "source": path.name, "licence": LICENCE}
        (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    return convert_once(path, target, "config.json", write)


def read_fairseq(path: Path) -> tuple[AVHubertConfig, dict[str, Tensor]]:
    """The encoder's sizes and tensors from a fairseq checkpoint, floats as float32, without those that only
    pre-training needs.

    Raises:
        UserError: see :func:`load_avhubert`.
    """
    checkpoint = load_torch_file(path, {_DICTIONARY: _Inert}, _tokenizer_hint)
    model = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    if not isinstance(model, Mapping):
        found = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, Mapping) else type(checkpoint)
        raise UserError(f"{path}: not a fairseq checkpoint: it has no 'model' entry (it has {found or 'nothing'})")
    state = {}
    for key, tensor in model.items():
        if isinstance(key, str) and _FINE_TUNED.match(key):
            raise UserError(f"{path}: {_fine_tuned(f'it has the key {key!r}')}")
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: the model's entry {key!r} is not a tensor but {type(tensor).__name__}")
        if not TRAINING_ONLY.match(key):
            tensor = tensor.detach()
            state[key] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().clone()
    config = check_state(state, path)
    _check_options(checkpoint.get("cfg"), config, path)
    return config, state


def check_state(state: Mapping[str, Tensor], where: Path | str) -> AVHubertConfig:
    """The sizes of an AV-HuBERT with these weights.

    Raises:
        UserError: naming the first key that is missing, of another shape, or unknown.
    """
    config = _sizes(state, where)
    with torch.device("meta"):
        expected = AVHubert(config).state_dict()
    for key, tensor in expected.items():
        if _shape(state, key, where) != tuple(tensor.shape):
            raise UserError(f"{where}: {key} has shape {list(state[key].shape)}, expected {list(tensor.shape)}")
    for key in state:
        if key not in expected:
            raise UserError(f"{where}: AV-HuBERT has no {key!r}")
    return config


def _sizes(state: Mapping[str, Tensor], where: Path | str) -> AVHubertConfig:
    def size(key: str, axis: int, rank: int) -> int:
        shape = _shape(state, key, where)
        if len(shape) != rank or 0 in shape:
            raise UserError(f"{where}: {key} has shape {list(shape)}, expected {rank} axes")
        return shape[axis]

    width = size("post_extract_proj.weight", 0, 2)
    if width % HEAD:
        raise UserError(f"{where}: post_extract_proj.weight: the width {width} is no multiple of {HEAD}")
    numbers = {match[1] for key in state if (match := re.match(r"encoder\.layers\.(\d+)\.", key))}
    if width % (inside := size("encoder.pos_conv.0.weight_v", 1, 3)):
        raise UserError(f"{where}: encoder.pos_conv.0.weight_v: the width {width} is no multiple of {inside} channels")
    if len(numbers) > _MOST_LAYERS:
        raise UserError(f"{where}: {len(numbers)} layers, AV-HuBERT has at most {_MOST_LAYERS}")
    return AVHubertConfig(
        width=width,
        ffn=size("encoder.layers.0.fc1.weight", 0, 2),
        layers=len(numbers),
        audio=size("feature_extractor_audio.proj.weight", 1, 2),
        channels=size("feature_extractor_video.resnet.frontend3D.0.weight", 0, 5),
        kernel=size("encoder.pos_conv.0.weight_v", 2, 3),
        groups=width // inside,
    )


def _shape(state: Mapping[str, Tensor], key: str, where: Path | str) -> tuple[int, ...]:
    if key not in state:
        raise UserError(f"{where}: no AV-HuBERT weights: {key} is missing")
    return tuple(state[key].shape)


def _check_options(cfg: Any, config: AVHubertConfig, path: Path) -> None:
    """Refuses variants of the architecture that cannot be told apart by shapes."""
    options = cfg.get("model") if isinstance(cfg, Mapping) else None
    if not isinstance(options, Mapping):
        return
    expected = {
        "layer_norm_first": True,
        "modality_fuse": "concat",
        "sub_encoder_layers": 0,
        "encoder_attention_heads": config.width // HEAD,
    }
    for key, value in expected.items():
        if key in options and options[key] != value:
            raise UserError(f"{path}: its cfg.model.{key} is {options[key]!r}; only {value!r} is supported")


def _tokenizer_hint(name: str) -> str:
    if re.match(r"sentencepiece\b|fairseq\.data\.encoders\b", name):
        return f". {_fine_tuned('this class is its text tokenizer')}"
    return ""


def _fine_tuned(reason: str) -> str:
    return f"this is a fine-tuned model ({reason}), where a pre-trained one is meant, such as large_vox_iter5.pt"


@functools.cache
def _say_licence() -> None:
    _log.warning(LICENCE)
