"""A language model by name, with plain text to read, as a subject of the analysis."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import flashsink
from avsr.config import LLMConfig
from avsr.errors import UserError
from avsr.models.llm import LoadedLLM, convert_gguf, load_llm
from avsr.models.sources import locate
from avsr.tools.analysis.observe import forward_watched
from avsr.tools.analysis.subject import Subject, text_subject
from avsr.tools.corpora.synth.sentences import open_sentences

SENTENCES, SEED = 100, 0  # of the text that is read by default


@dataclass
class ModelOptions:
    """``key=value`` options of a model."""

    bos_token: str | None = None  # model.llm.bos_token
    eos_token: str | None = None  # model.llm.eos_token
    limit: int | None = None  # number of texts


_KEYS = {"model.llm.bos_token": "bos_token", "model.llm.eos_token": "eos_token", "limit": "limit"}


def parse_model_options(overrides: Sequence[str]) -> ModelOptions:
    """Options from ``key=value`` strings.

    Raises:
        UserError: an unknown key (with the nearest one) or a limit that is no whole number above 0.
    """
    options = ModelOptions()
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown option {key!r}: did you mean {near!r}? A model takes {', '.join(_KEYS)}")
        if key != "limit":
            setattr(options, _KEYS[key], value)
        elif value.isdecimal() and int(value) > 0:
            options.limit = int(value)
        else:
            raise UserError(f"limit: expected a whole number above 0, got {value!r}")
    return options


def read_texts(path: str | None, limit: int | None) -> list[str]:
    """The lines of a text file that are not blank, at most ``limit``; without a file 100 fixed sentences.

    Raises:
        UserError: the file cannot be read or has no text.
    """
    if path is None:
        return open_sentences(limit or SENTENCES, SEED)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot read it: {error}") from error
    texts = [line.strip() for line in lines if line.strip()][:limit]
    if not texts:
        raise UserError(f"--text {path}: no line with text")
    return texts


def load_text_subject(name: str, texts: Sequence[str], options: ModelOptions, device: torch.device) -> Subject:
    """A causal language model over texts.

    Args:
        name: hub id, folder, .gguf file or ``package:NAME/path``.
        texts: one row each.
        options: the anchor's and the end's token, where the tokenizer has none.
        device: to run on, in float32 on a CPU and in bfloat16 elsewhere.

    Raises:
        UserError: it is missing, no Llama-style causal decoder, has no anchor token, or a text is too long.
    """
    source = locate(name)
    if isinstance(source, Path) and source.suffix == ".gguf":
        source = convert_gguf(source)
    _check_decoder(name, str(source))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    loaded = load_llm(LLMConfig(str(source), options.bos_token, options.eos_token), dtype)
    _check_lengths(name, loaded, texts)
    loaded.model.to(device)
    subject = text_subject(loaded, texts)
    check_attention(name, subject)
    return subject


def _check_decoder(name: str, source: str) -> None:
    """Refuses an encoder, or a decoder of another build, before any weight is read."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no model that transformers knows: {str(error).splitlines()[0]}") from error
    kind = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {kind} is an encoder with a decoder; analyze takes causal decoders alone")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        flashsink.attach(model, attention=False).detach()
        if not hasattr(model.model, "layers"):
            raise ValueError("the layers lie elsewhere")
    except (AttributeError, ValueError) as error:
        raise UserError(
            f"{name}: {kind} is no causal decoder with Llama's layers (an encoder, or another build)"
        ) from error


def check_attention(name: str, subject: Subject) -> None:
    """Refuses a decoder whose attention flashsink cannot compute, by its shortest texts: before all measuring."""
    seen: set[int] = set()
    rows = next(iter(subject.batches()))
    try:
        options = {"decorrelation": False, "activations": False}
        forward_watched(subject, rows, lambda layer, q, k, v, scale: seen.add(layer), **options)
    except ValueError as error:
        raise UserError(f"{name}: its attention cannot be observed: {error}") from error
    if len(seen) < subject.layers:
        raise UserError(f"{name}: the attention of {subject.layers - len(seen)} layers cannot be observed")


def _check_lengths(name: str, loaded: LoadedLLM, texts: Sequence[str]) -> None:
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    window = getattr(loaded.model.config, "sliding_window", None)
    for number, text in enumerate(texts, 1):
        tokens = 1 + len(loaded.tokenize(text))
        if tokens == 1:
            raise UserError(f"text {number} ({text[:40]!r}): the tokenizer of {name} makes no token of it")
        if limit is not None and tokens > limit:
            raise UserError(
                f"text {number} ({text[:40]!r}...) has {tokens} tokens with BOS, but {name} takes "
                f"{limit} (max_position_embeddings)"
            )
        if window and tokens > window:  # 0 is off as well as None
            raise UserError(
                f"text {number} ({text[:40]!r}...) has {tokens} tokens with BOS, but the attention of {name} slides "
                f"over {window} (sliding_window), which is not supported"
            )
