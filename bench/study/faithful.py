"""Habits of Llama-AVSR's training that this product does not have, each harmless by itself.

Everything in bf16 (weights, LoRA, both Adam moments), non-zero initialization of both LoRA factors, and padding of
shorter utterances counted as speech (sources: the code of arXiv 2510.22603, huggingface/transformers#17370).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from avsr.data.batches import Batch
from avsr.models.speech_llm import SpeechLLM

LORA_STD = 0.02  # transformers' initializer_range


def make_faithful(model: SpeechLLM) -> None:
    """Changes ``model`` and every optimizer of this process."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=LORA_STD)
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    register_optimizer_step_post_hook(_round)
    plain, lengths = model.assemble, model.prompt_lengths
    model.assemble = lambda batch, **options: plain(_padded(model, batch), **options)  # type: ignore[method-assign]
    model.prompt_lengths = lambda batch: lengths(_padded(model, batch))  # type: ignore[method-assign]


def _padded(model: SpeechLLM, batch: Batch) -> Batch:
    """In training, every utterance counts as long as the longest of its batch; it ends in silence (zeros)."""
    if not model.training:
        return batch
    return replace(batch, lengths={name: torch.full_like(n, int(n.max())) for name, n in batch.lengths.items()})


def _round(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Rounds weights and moments to bf16, the dtype in which the reference keeps them."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.copy_(parameter.bfloat16())
                for value in optimizer.state[parameter].values():
                    if torch.is_tensor(value) and value.is_floating_point() and value.dim():
                        value.copy_(value.bfloat16())
