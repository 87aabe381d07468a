"""Reads the Whisper encoder from a CTranslate2 ``model.bin`` (format version 6).

Layout, little-endian: version u32, spec name, revision u32, number of variables u32; then for every variable
its name, rank u8, dimensions u32 each, dtype u8, number of bytes u32 and the data. A name is a u16 length with
the terminating zero counted, then the bytes.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avsr.errors import UserError
from avsr.runtime.packages import verify

_DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_LAYER = {
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/linear_0/weight": "fc1.weight",
    "ffn/linear_0/bias": "fc1.bias",
    "ffn/linear_1/weight": "fc2.weight",
    "ffn/linear_1/bias": "fc2.bias",
}
_TOP = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}


def load_whisper_encoder(path: Path) -> WhisperEncoder:
    """The encoder of ``path`` in float32.

    Raises:
        UserError: the file is of another format, truncated, or quantised to integers.
    """
    try:
        verify(path)
        with path.open("rb") as file:
            variables = _read(file, path)
        config, state = _encoder(variables)
        with torch.device(
            "meta"
        ):  # the sizes are untrusted; tensors are checked against them before memory is allocated
            empty = WhisperEncoder(config)
        empty.load_state_dict(state, assign=True)
    except (OSError, struct.error, KeyError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable CTranslate2 model ({type(error).__name__}: {reason})") from error
    return empty


def _encoder(variables: dict[str, Tensor]) -> tuple[WhisperConfig, dict[str, Tensor]]:
    """Sizes and tensors. Every layer up to the highest number in a name must be present."""
    width, mels, _ = variables["conv1/weight"].shape
    found = [match[1] for name in variables if (match := re.match(r"layer_([0-9]{1,4})/", name))]
    layers = 1 + max(map(int, found))
    state = _rename(variables, layers, width)
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=layers,
        encoder_attention_heads=int(variables["num_heads"]),
        encoder_ffn_dim=variables["layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["position_encodings/encodings"].shape[0],
    )
    return config, state


def _read(file: BinaryIO, path: Path) -> dict[str, Tensor]:
    end = os.fstat(file.fileno()).st_size
    version, spec = _unpack(file, "<I"), _name(file)
    if version != 6 or spec != "WhisperSpec":
        raise UserError(f"{path}: expected a Whisper model in CTranslate2 format 6, got {spec!r} in {version}")
    _unpack(file, "<I")  # revision
    variables = {}
    for _ in range(_unpack(file, "<I")):
        name = _name(file)
        shape = struct.unpack(f"<{(rank := _unpack(file, '<B'))}I", file.read(4 * rank))
        dtype, size = _unpack(file, "<B"), _unpack(file, "<I")
        if size > end - file.tell():  # otherwise as much memory would be allocated as it claims
            raise ValueError(f"{name} extends past the end of the file")
        if not name.startswith("encoder/"):
            file.seek(size, 1)
            continue
        array = np.frombuffer(file.read(size), dtype=_DTYPES[dtype]).reshape(shape)
        if dtype == 1:
            raise UserError(f"{path}: {name} is quantised to int8; use a float16 or float32 conversion")
        variables[name.removeprefix("encoder/")] = torch.from_numpy(array.astype(np.float32))
    return variables


def _rename(variables: dict[str, Tensor], layers: int, width: int) -> dict[str, Tensor]:
    state = {target: variables[source] for source, target in _TOP.items()}
    for i in range(layers):
        for source, target in _LAYER.items():
            state[f"layers.{i}.{target}"] = variables[f"layer_{i}/{source}"]
        weight = variables[f"layer_{i}/self_attention/linear_0/weight"].split(width)
        bias = variables[f"layer_{i}/self_attention/linear_0/bias"].split(width)
        for part, w, b in zip("qkv", weight, bias, strict=True):
            state[f"layers.{i}.self_attn.{part}_proj.weight"] = w
            if part != "k":  # Whisper's keys have no bias; CTranslate2 stores zeros
                state[f"layers.{i}.self_attn.{part}_proj.bias"] = b
    return state


def _unpack(file: BinaryIO, code: str) -> int:
    return int(struct.unpack(code, file.read(struct.calcsize(code)))[0])


def _name(file: BinaryIO) -> str:
    return file.read(_unpack(file, "<H"))[:-1].decode()
