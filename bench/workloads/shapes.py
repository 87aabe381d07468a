"""Model shapes and utterance lengths like those of Llama-AVSR."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.runner import rehearsal


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama-style decoder."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int

    def arguments(self, layers: int) -> dict[str, Any]:
        """Arguments of ``transformers.LlamaConfig`` for the model cut to ``layers``."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }


_TINY = Model("tiny", 2, 1, 16, 32, 2, 48, 50)
MODELS = {
    model.name: _TINY if rehearsal.ON else model
    for model in (
        Model("llama-3.2-1b", 32, 8, 64, 2048, 16, 8192, 128256),
        Model("llama-3.2-3b", 24, 8, 128, 3072, 28, 8192, 128256),
        Model("llama-3.1-8b", 32, 8, 128, 4096, 32, 14336, 128256),
        Model("smollm2-135m", 9, 3, 64, 576, 30, 1536, 49152),
    )
}

HEADLINE_TOKENS = rehearsal.cut(16384, 32)
SHORTEST, LONGEST = (
    rehearsal.cut(48, 5),
    rehearsal.cut(400, 17),
)  # tokens of an utterance in Llama-AVSR, speech and text


def utterances(tokens: int, seed: int = 0, low: int = SHORTEST, high: int = LONGEST) -> list[int]:
    """Random lengths in low..high whose sum is exactly ``tokens``."""
    if tokens < low:
        raise ValueError(f"tokens: expected at least {low}, got {tokens}")
    draw, lengths, left = random.Random(seed), [], tokens
    while left > high + low:
        lengths.append(draw.randint(low, high))
        left -= lengths[-1]
    # low..high + low tokens are left: one utterance, or two where one would be too long
    return [*lengths, left] if left <= high else [*lengths, left // 2, left - left // 2]


def random_llm(setting: Any, extend: Callable[[Any], None] = lambda model: None, **options: Any) -> Any:
    """A frozen ``LlamaForCausalLM`` of random weights; ``extend`` adds parameters on the same device and in its dtype.

    Args:
        setting: with ``model``, ``layers``, ``device`` and ``dtype``.
        options: more arguments of ``LlamaConfig``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**setting.model.arguments(setting.layers), **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with setting.device:
            llm: Any = LlamaForCausalLM(config)
            extend(llm.requires_grad_(False))
    finally:
        torch.set_default_dtype(before)
    return llm
