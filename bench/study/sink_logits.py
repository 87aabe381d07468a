"""One learnable sink per head, as in gpt-oss: its logit joins the softmax, and its value is zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from avsr.models.speech_llm import SpeechLLM

NAME = "study_sink_logits"
SCALE = 100.0  # logits are SCALE x the parameter; otherwise they would hardly move at a learning rate of 1e-3


def add_sink_logits(model: SpeechLLM) -> None:
    """Trains an (L, H) parameter of ``model``; its logits start at 0."""
    config = model.decoder.config
    model.sink_weights = nn.Parameter(torch.zeros(config.num_hidden_layers, config.num_attention_heads))
    for index, layer in enumerate(model.decoder.model.layers):
        object.__setattr__(layer.self_attn, "study_sinks", (model, index))
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.decoder.model.set_attn_implementation(NAME)


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """q (B, H, S, D), k and v (B, Hk, T, D), additive mask (B, 1, S, T); returns (B, S, H, D)."""
    model, index = module.study_sinks
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    k, v = (nn.functional.pad(x.repeat_interleave(groups, dim=1), (0, 0, 1, 0)) for x in (k, v))
    mask = q.new_zeros(len(q), 1, q.shape[2], k.shape[2] - 1) if attention_mask is None else attention_mask
    logits = (SCALE * model.sink_weights[index]).to(q.dtype)
    column = logits[None, :, None, None].expand(len(q), heads, q.shape[2], 1)
    bias = torch.cat([column, mask[..., : k.shape[2] - 1].to(q.dtype).expand(-1, heads, -1, -1)], dim=-1)
    # the sink's key and value are zero, so its score is the bias alone
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None
