"""How much a training step has to compute, whatever way it is computed: the numerator of MFU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from avsr.models.speech_llm import SpeechLLM

FORMULA = (
    "MFU = model FLOPs / (seconds x peak FLOP/s); model FLOPs = 4 x frozen + 6 x trained matrix entries a token, "
    "12 x heads x head dim x sum of S^2 / 2 a layer for causal attention (forward 4, backward 8), and 4 x hidden x "
    "vocabulary a label; what activation checkpointing repeats, frozen encoders and element-wise work count nothing"
)


@dataclass(frozen=True)
class Rows:
    """What a step had to work on."""

    lengths: Sequence[int]  # tokens of every utterance, prompt and text
    speech: int  # tokens out of the projectors
    labels: int


def step_flops(model: SpeechLLM, rows: Rows) -> float:
    """Model FLOPs of one step (Narayanan et al. 2021, for frozen weights): a frozen matrix costs 2 FLOPs an entry and
    token in the forward and 2 in the backward, a trained one 2 more."""
    decoder = model.decoder
    config = decoder.config
    frozen, trained = _entries(decoder.model.layers)
    tokens = sum(rows.lengths)
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    total = tokens * (4.0 * frozen + 6.0 * trained)
    total += 12.0 * int(config.num_hidden_layers) * width * sum(n * n for n in rows.lengths) / 2
    total += 4.0 * rows.labels * int(config.hidden_size) * int(config.vocab_size)
    return total + 6.0 * rows.speech * _entries(model.projectors)[1]


def _entries(module: nn.Module) -> tuple[int, int]:
    """Entries of frozen and of trained matrices, whole ones under ZeRO-3 too."""
    counts = [0, 0]
    for parameter in module.parameters():
        whole: Any = parameter
        shape = getattr(whole, "ds_shape", parameter.shape)
        if len(shape) == 2:
            counts[parameter.requires_grad] += int(getattr(whole, "ds_numel", parameter.numel()))
    return counts[0], counts[1]
