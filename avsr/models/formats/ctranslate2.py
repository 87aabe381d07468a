"""Reads Whisper, or its encoder alone, from a CTranslate2 ``model.bin`` (format version 6).

Layout, little-endian: version u32, spec name, revision u32, number of variables u32; then for every variable
its name, rank u8, dimensions u32 each, dtype u8, number of bytes u32 and the data. A name is a u16 length with
the terminating zero counted, then the bytes.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avsr.errors import UserError
from avsr.runtime.packages import verify

_Made = tuple[type[nn.Module], WhisperConfig, dict[str, Tensor]]

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
_CROSS = {
    "attention/layer_norm/gamma": "encoder_attn_layer_norm.weight",
    "attention/layer_norm/beta": "encoder_attn_layer_norm.bias",
    "attention/linear_0/weight": "encoder_attn.q_proj.weight",
    "attention/linear_0/bias": "encoder_attn.q_proj.bias",
    "attention/linear_2/weight": "encoder_attn.out_proj.weight",
    "attention/linear_2/bias": "encoder_attn.out_proj.bias",
}
_ENDS = {
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
_TOP = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    **_ENDS,
}
_ENCODER, _DECODER = "encoder/", "decoder/"


def load_whisper_encoder(path: Path) -> WhisperEncoder:
    """The encoder of ``path`` in float32.

    Raises:
        UserError: the file is of another format, truncated, or quantised to integers.
    """

    def make(variables: dict[str, Tensor]) -> tuple[type[nn.Module], WhisperConfig, dict[str, Tensor]]:
        own = _below(_ENCODER, variables)
        return WhisperEncoder, WhisperConfig(**_sizes(own)), _encoder(own)

    return _load(path, (_ENCODER,), make)  # type: ignore[return-value]


def load_whisper(path: Path) -> WhisperForConditionalGeneration:
    """Encoder and decoder of ``path`` in float32.

    Raises:
        UserError: as of :func:`load_whisper_encoder`.
    """

    def make(variables: dict[str, Tensor]) -> tuple[type[nn.Module], WhisperConfig, dict[str, Tensor]]:
        encoder, decoder = _below(_ENCODER, variables), _below(_DECODER, variables)
        embeddings, padding = decoder["embeddings/weight"], WhisperConfig().pad_token_id
        config = WhisperConfig(
            **_sizes(encoder),
            vocab_size=embeddings.shape[0],
            pad_token_id=padding if padding < embeddings.shape[0] else None,  # the file does not say
            decoder_layers=_layers(decoder),
            decoder_attention_heads=int(decoder["num_heads"]),
            decoder_ffn_dim=decoder["layer_0/ffn/linear_0/weight"].shape[0],
            max_target_positions=decoder["position_encodings/encodings"].shape[0],
        )
        state = {f"model.encoder.{name}": value for name, value in _encoder(encoder).items()}
        state |= {f"model.decoder.{name}": value for name, value in _decoder(decoder).items()}
        return WhisperForConditionalGeneration, config, {**state, "proj_out.weight": embeddings}

    model: WhisperForConditionalGeneration = _load(path, (_ENCODER, _DECODER), make)  # type: ignore[assignment]
    model.tie_weights()
    return model


def _load(path: Path, parts: tuple[str, ...], make: Callable[[dict[str, Tensor]], _Made]) -> nn.Module:
    try:
        verify(path)
        with path.open("rb") as file:
            variables = _read(file, path, parts)
        kind, config, state = make(variables)
        with torch.device(
            "meta"
        ):  # the sizes are untrusted; tensors are checked against them before memory is allocated
            empty = kind(config)
        empty.load_state_dict(state, assign=True)
    except (OSError, struct.error, KeyError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable CTranslate2 model ({type(error).__name__}: {reason})") from error
    return empty


def _below(part: str, variables: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(part): value for name, value in variables.items() if name.startswith(part)}


def _layers(variables: dict[str, Tensor]) -> int:
    """Every layer up to the highest number in a name must be present."""
    return 1 + max(int(match[1]) for name in variables if (match := re.match(r"layer_([0-9]{1,4})/", name)))


def _sizes(encoder: dict[str, Tensor]) -> dict[str, int]:
    width, mels, _ = encoder["conv1/weight"].shape
    return {
        "d_model": width,
        "num_mel_bins": mels,
        "encoder_layers": _layers(encoder),
        "encoder_attention_heads": int(encoder["num_heads"]),
        "encoder_ffn_dim": encoder["layer_0/ffn/linear_0/weight"].shape[0],
        "max_source_positions": encoder["position_encodings/encodings"].shape[0],
    }


def _read(file: BinaryIO, path: Path, parts: tuple[str, ...]) -> dict[str, Tensor]:
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
        if not name.startswith(parts):
            file.seek(size, 1)
            continue
        array = np.frombuffer(file.read(size), dtype=_DTYPES[dtype]).reshape(shape)
        if dtype == 1 and array.ndim > 1:
            raise UserError(f"{path}: {name} is quantised to int8; use a float16 or float32 conversion")
        variables[name] = torch.from_numpy(array.astype(np.float32))
    return variables


def _encoder(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {target: variables[source] for source, target in _TOP.items()}
    for i in range(_layers(variables)):
        state |= _layer(variables, i, _LAYER)
    return state


def _decoder(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {target: variables[source] for source, target in _ENDS.items()}
    state["embed_tokens.weight"] = variables["embeddings/weight"]
    for i in range(_layers(variables)):
        state |= _layer(variables, i, _LAYER | _CROSS)
        state |= _split(variables, f"layer_{i}/attention/linear_1", f"layers.{i}.encoder_attn", "kv")
    return state


def _layer(variables: dict[str, Tensor], i: int, names: dict[str, str]) -> dict[str, Tensor]:
    state = {f"layers.{i}.{target}": variables[f"layer_{i}/{source}"] for source, target in names.items()}
    return state | _split(variables, f"layer_{i}/self_attention/linear_0", f"layers.{i}.self_attn", "qkv")


def _split(variables: dict[str, Tensor], source: str, target: str, parts: str) -> dict[str, Tensor]:
    """The projections that CTranslate2 keeps as one."""
    weights = variables[f"{source}/weight"].chunk(len(parts))
    biases = variables[f"{source}/bias"].chunk(len(parts))
    state = {}
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        state[f"{target}.{part}_proj.weight"] = weight
        if part != "k":  # Whisper's keys have no bias; CTranslate2 stores zeros
            state[f"{target}.{part}_proj.bias"] = bias
    return state


def _unpack(file: BinaryIO, code: str) -> int:
    return int(struct.unpack(code, file.read(struct.calcsize(code)))[0])


def _name(file: BinaryIO) -> str:
    return file.read(_unpack(file, "<H"))[:-1].decode()
