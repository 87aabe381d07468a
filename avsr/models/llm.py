"""The language model: a hub id, a folder or a GGUF file, with LoRA adapters by PEFT."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from avsr.config import LLMConfig, LoraConfig
from avsr.errors import UserError
from avsr.models.lora_targets import adapted_layers
from avsr.models.sources import convert_once, locate, read_config
from avsr.runtime.folders import cache_folder
from avsr.runtime.packages import verify
from avsr.runtime.tensors import refuse_nonfinite

_PARALLEL = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class LoadedLLM:
    """A frozen causal LM with its tokenizer and the ids of its BOS and EOS tokens, whose embeddings it has."""

    model: Any
    tokenizer: Any
    bos: int
    eos: int

    @property
    def tokenize(self) -> TextTokens:
        return TextTokens(self.tokenizer, self.model)


@dataclass(frozen=True)
class TextTokens:
    """Tokenises texts for a model."""

    tokenizer: Any
    model: Any

    def __call__(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens.

        Raises:
            UserError: the model has no embedding for one of them.
        """
        ids: list[int] = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        refuse_beyond(ids, self.tokenizer, self.model)
        return ids

    def counts(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each of many texts, by several threads."""
        before = os.environ.get(_PARALLEL)
        os.environ[_PARALLEL] = before or "true"
        try:
            found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        finally:
            os.environ[_PARALLEL] = before or "false"  # or tokenizers warns in every loader process
        refuse_beyond([max(ids) for ids in found if ids], self.tokenizer, self.model)
        return [len(ids) for ids in found]

    @cached_property
    def identity(self) -> str:
        """Names everything that the ids depend on; "" where that is not known."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return "" if backend is None else f"{type(self.tokenizer).__name__} {backend.to_str()}"


def load_llm(
    config: LLMConfig,
    dtype: torch.dtype = torch.float32,
    around: AbstractContextManager[None] = nullcontext(),  # noqa: B008
) -> LoadedLLM:
    """Loads model and tokenizer, frozen, in eval mode, with an empty generation config (so that
    no sampling setting of the model leaks into decoding). The weights are read inside ``around``.

    Raises:
        UserError: missing model, a tokenizer without BOS or EOS (with the key that names one).
    """
    disable_progress_bar()
    source = locate(config.name, "model.llm.name")
    if isinstance(source, Path) and source.suffix == ".gguf":
        source = convert_gguf(source)
    # flashsink is attached later and replaces any attention
    attention = "sdpa" if config.attention == "flashsink" else config.attention
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        read_config(source)
        with around:
            model = whole_model(str(source), dtype=dtype, attn_implementation=attention)
    except ImportError as error:
        raise UserError(f"model.llm.attention: {str(error).splitlines()[0]}") from error
    except Exception as error:  # transformers raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.llm.name: cannot load {config.name!r}: {reason}") from error
    model.generation_config = GenerationConfig()
    bos, eos = specials(tokenizer, config)
    refuse_beyond([bos, eos], tokenizer, model)
    return LoadedLLM(model.eval().requires_grad_(False), tokenizer, bos, eos)


def refuse_beyond(ids: list[int], tokenizer: Any, model: Any) -> None:
    """Raises a ``UserError`` if an id is beyond the embedding table: the tokenizer is that of another model, or has
    tokens that this one was never given."""
    rows = int(model.config.get_text_config().vocab_size)
    if ids and max(ids) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise UserError(
            f"model.llm.name: the tokenizer's token {token!r} has the id {max(ids)}, the model's embedding table has "
            f"{rows} rows: they do not belong together"
        )


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """``model`` wrapped by PEFT with trainable float32 adapters; unchanged if the rank is 0.

    Raises:
        UserError: a target means no linear layer, or only the head, whose weight the losses read without calling it.
    """
    if config.rank == 0:
        return model
    head = [name for name, part in model.named_modules() if part is model.get_output_embeddings()]  # type: ignore[operator]
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=adapted_layers(model, config.targets, "model.lora.targets", "language model", head),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT still uses an old name of transformers
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, peft_config)  # type: ignore[arg-type]


def lora_from_reduction(hidden: int, reduction: int, alpha: float) -> LoraConfig:
    """Llama-AVSR's ``--reduction_lora R`` and alpha in PEFT's terms.

    There the rank is round(hidden / R) and the scale alpha / R; PEFT scales by alpha / rank. So for
    Llama-3.2-3B (hidden 3072) R = 32 and alpha = 4 are rank 96 and alpha 12, a scale of 0.125.
    """
    rank = round(hidden / reduction)
    return LoraConfig(rank=rank, alpha=alpha / reduction * rank)


def convert_gguf(path: Path) -> Path:
    """Converts a GGUF file to a safetensors folder in the cache (about 20 s; later calls 1 s)."""
    target = cache_folder() / "models" / f"{path.stem}-{_fingerprint(path)}"

    def write(folder: Path) -> None:
        verify(path)
        read_config(path)
        model = whole_model(str(path.parent), gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        # transformers refuses to save a model from a quantized file even after dequantizing it
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "done").write_text(json.dumps({"source": path.name, "bytes": path.stat().st_size}))

    return convert_once(path, target, "done", write)


def whole_model(source: str, **options: Any) -> Any:
    """A causal LM all of whose weights are in its files; transformers would draw the others at random.

    Raises:
        ValueError: a weight is missing or has another shape than the config says.
        UserError: a weight is not finite.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, trust_remote_code=False, **options
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} weights ({missing[0]} ...)")
    if wrong := sorted(report["mismatched_keys"]):
        raise ValueError(f"{len(wrong)} weights have other shapes than its config says ({wrong[0][0]} ...)")
    refuse_nonfinite(model.named_parameters(), "its files")
    return model


def _fingerprint(path: Path) -> str:
    """Hash of the size and 16 pieces spread over the file: another model of the same name differs in all of them."""
    try:
        size, piece = path.stat().st_size, 2**16
        found = hashlib.sha256(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for n in range(16):
                file.seek(max(0, size - piece) * n // 15)
                found.update(file.read(piece))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return found.hexdigest()[:12]


def specials(tokenizer: Any, config: LLMConfig) -> tuple[int, int]:
    """The ids of BOS and EOS.

    Raises:
        UserError: the tokenizer has none, or lacks the token that the config names.
    """
    return (
        _special(tokenizer, config.bos_token, tokenizer.bos_token_id, "model.llm.bos_token"),
        _special(tokenizer, config.eos_token, tokenizer.eos_token_id, "model.llm.eos_token"),
    )


def _special(tokenizer: Any, named: str | None, own: int | None, key: str) -> int:
    if named is not None:
        index = tokenizer.get_vocab().get(named)  # may be the unknown token itself, as Qwen2's <|endoftext|>
        if index is None:
            raise UserError(f"{key}: the tokenizer has no token {named!r}")
        return int(index)
    if own is None:
        raise UserError(f"{key}: the tokenizer has no such token of its own; name one of its tokens")
    return int(own)
