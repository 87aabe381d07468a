"""Subjects of the analysis: a trained run over utterances, or a language model by name over plain text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

import flashsink
from avsr.config import TASKS, Config, LLMConfig
from avsr.data.batches import collate, make_batches
from avsr.errors import UserError
from avsr.models.llm import LoadedLLM, convert_gguf, load_llm
from avsr.models.rows import Assembled
from avsr.models.sources import locate, read_config
from avsr.models.speech_llm import SpeechLLM
from avsr.tools.analysis.groups import BOS
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.walk import Tap, measure
from avsr.tools.corpora.synth.sentences import open_sentences

if TYPE_CHECKING:
    from avsr.data.dataset import SpeechDataset

SENTENCES, SEED = 100, 0  # of the text that is read by default
ROWS = 16  # rows in a batch, at most
TOKENS = 2048  # tokens of plain text in a batch, padding counted


def speech_subject(model: SpeechLLM, dataset: SpeechDataset, config: Config) -> Subject:
    """A run's model over utterances with their reference texts."""

    def batches() -> Iterator[Assembled]:
        for indices in make_batches(dataset.sizes, max(config.training.frames, max(dataset.sizes)), ROWS):
            batch = collate([dataset[i] for i in indices])
            with torch.no_grad():
                rows = model.assemble(batch, with_text=True, names=True)
            yield rows

    opener = f"<{TASKS[dataset.reading.task][0]}>" if model.delimiters is not None else ""
    return Subject(model.llm, len(dataset), batches, opener)


def text_subject(loaded: LoadedLLM, texts: Sequence[str]) -> Subject:
    """A language model over plain texts, each after BOS; only BOS counts as prompt (spans are 1)."""
    ids = sorted(([loaded.bos, *loaded.tokenize(text)] for text in texts), key=len)
    embed = loaded.model.get_input_embeddings()

    def batches() -> Iterator[Assembled]:
        first = 0
        while first < len(ids):
            count = max(1, min(ROWS, TOKENS // len(ids[min(first + ROWS, len(ids)) - 1])))
            yield _embedded(ids[first : first + count])
            first += count

    def _embedded(part: list[list[int]]) -> Assembled:
        lengths = torch.tensor([len(row) for row in part], device=embed.weight.device)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True)
        mask = torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
        names = [[BOS, *(loaded.tokenizer.decode([index]) for index in row[1:])] for row in part]
        embeddings = embed(padded.to(lengths.device)) * mask[..., None]
        return Assembled(embeddings.detach(), mask.long(), torch.ones_like(lengths), names)

    return Subject(loaded.model, len(ids), batches)


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
        UserError: an unknown key (with the nearest one) or a limit that is not a whole number above 0.
    """
    options = ModelOptions()
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown option {key!r}: did you mean {near!r}? A model takes {', '.join(_KEYS)}")
        setattr(options, _KEYS[key], parse_limit(value) if key == "limit" else value)
    return options


def parse_limit(value: str) -> int:
    """The value of ``limit``.

    Raises:
        UserError: it is not a whole number above 0.
    """
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"limit: expected a whole number above 0, got {value!r}")
    return int(value)


def read_texts(path: str | None, limit: int | None) -> list[str]:
    """The lines of a text file that are not blank, at most ``limit``; without a file 100 fixed sentences.

    Raises:
        UserError: the file cannot be read or has no text.
    """
    if path is None:
        return open_sentences(limit or SENTENCES, SEED)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
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
        options: the anchor and end tokens, where the tokenizer has none.
        device: to run on, in float32 on a CPU and in bfloat16 elsewhere.

    Raises:
        UserError: it is missing, no Llama-style causal decoder, has no anchor token, or a text is too long.
    """
    source = locate(name)
    if isinstance(source, Path) and source.suffix == ".gguf":
        source = convert_gguf(source)
    _check_decoder(name, source)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    loaded = load_llm(LLMConfig(str(source), options.bos_token, options.eos_token), dtype)
    _check_lengths(name, loaded, texts)
    loaded.model.to(device)
    subject = text_subject(loaded, texts)
    check_attention(name, subject)
    return subject


def _check_decoder(name: str, source: Path | str) -> None:
    """Refuses an encoder, or a decoder of another architecture, before any weight is read."""
    try:
        config = read_config(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no model that transformers knows: {str(error).splitlines()[0]}") from error
    kind = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {kind} is an encoder with a decoder; analyze takes only causal decoders")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        flashsink.attach(model, attention=False).detach()
        if not hasattr(model.model, "layers"):
            raise ValueError("the layers are elsewhere")
    except (AttributeError, ValueError) as error:
        raise UserError(
            f"{name}: {kind} is no causal decoder with Llama's layers (an encoder, or another architecture)"
        ) from error


def check_attention(name: str, subject: Subject) -> None:
    """Refuses a decoder whose attention flashsink cannot compute, by its shortest texts: before all measuring."""
    seen: set[int] = set()
    tap = Tap("qkv", lambda layer, _: seen.add(layer))
    try:
        measure(subject, next(iter(subject.batches())), tap, decorrelation=False, activations=False)
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
        has = f"text {number} ({text[:40]!r}...) has {tokens} tokens with BOS, but"
        if limit is not None and tokens > limit:
            raise UserError(f"{has} {name} takes {limit} (max_position_embeddings)")
        if window and tokens > window:  # 0 is off as well as None
            raise UserError(
                f"{has} the attention of {name} slides over {window} (sliding_window), which is not supported"
            )
