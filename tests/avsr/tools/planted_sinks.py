"""A Llama in which massive activations and sinks are planted, so that their origin is known.

Hidden size 48, 6 layers, 4 heads of width 12 over 2 key heads; float64. Marked tokens (BOS and ``<audio>``) have a
large embedding at ``MARK``, all others at ``PLAIN``. Unit ``UNIT`` of the MLP of layer ``LAYER`` fires on ``MARK``, is
shut by ``PLAIN`` and writes to ``FEATURE``. Behind it, keys read ``FEATURE`` and queries ``PLAIN``, in the slowest
turning pair of every head: the marked tokens become sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from avsr.models.rows import Assembled
from avsr.tools.analysis.subject import Subject

MARK, PLAIN, FEATURE, UNIT, LAYER, LAYERS, HIDDEN = 7, 9, 11, 5, 3, 6, 48
OTHER_FEATURE, OTHER_UNIT, OTHER_MARK = 13, 20, 17
BOS, AUDIO, PROMPT, STRAY = 0, 1, 20, 21  # token ids; STRAY is massive at OTHER_FEATURE in a model with ``stray``


def planted_model(family: str = "llama", dtype: torch.dtype = torch.float64, stray: bool = False) -> Any:
    """The model; with ``stray`` a second unit makes the STRAY token massive at another feature."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model_class(
            config_class(
                vocab_size=32,
                hidden_size=HIDDEN,
                intermediate_size=64,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=12,
                max_position_embeddings=256,
                initializer_range=0.02,
            )
        ).to(dtype)
    layers = model.model.layers
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, PLAIN] = 2.0
        _mark(table, [BOS, AUDIO], MARK)
        _plant(layers[LAYER - 1].mlp, UNIT, MARK, FEATURE)
        if stray:
            _mark(table, [STRAY], OTHER_MARK)
            _plant(layers[LAYER - 1].mlp, OTHER_UNIT, OTHER_MARK, OTHER_FEATURE)
        for layer in layers[LAYER:] if family == "llama" else []:
            for head in range(4):
                layer.self_attn.q_proj.weight[12 * head + 5, PLAIN] = 1.0
            for head in range(2):
                layer.self_attn.k_proj.weight[12 * head + 5, FEATURE] = 1.0
    return model.eval().requires_grad_(False)


def _mark(table: torch.Tensor, tokens: list[int], mark: int) -> None:
    table[tokens, PLAIN] = 0.0
    table[tokens, mark] = 10.0


def _plant(mlp: Any, unit: int, mark: int, feature: int) -> None:
    mlp.gate_proj.weight[unit, mark] = 3.0
    mlp.gate_proj.weight[unit, PLAIN] = -3.0
    mlp.up_proj.weight[unit, mark] = 3.0
    mlp.down_proj.weight[feature, unit] = 20.0


def planted_subject(lm: Any, stray: bool = False) -> Subject:
    """Two batches of three rows each of unlike lengths: BOS, <audio>, speech, prompt, text (with a STRAY token)."""
    decoder = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    embed = decoder.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    rows, names, spans = [], [], []
    for length in (17, 24, 20, 26, 18, 23):
        content = torch.randint(2, 20, (length - 3,), generator=generator).tolist()
        ids = [BOS, AUDIO, *content[:6], PROMPT, *content[6:]]
        if stray:
            ids[11] = STRAY
        rows.append(torch.tensor(ids))
        names.append(["BOS", "<audio>", *(f"a{i}" for i in range(6)), " to", *(f" w{i}" for i in ids[9:])])
        spans.append(9)

    def batches() -> Iterator[Assembled]:
        for first in (0, 3):
            part = slice(first, first + 3)
            lengths = torch.tensor([len(row) for row in rows[part]])
            ids = torch.nn.utils.rnn.pad_sequence(rows[part], batch_first=True)
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            embeddings = (embed(ids) * mask[..., None]).detach()
            yield Assembled(embeddings, mask.long(), torch.tensor(spans[part]), names[part])

    return Subject(lm, len(rows), batches, "<audio>")


def plant(stray: bool = False) -> Subject:
    return planted_subject(planted_model(stray=stray), stray=stray)


@torch.no_grad()
def states_of(subject: Subject, rows: Assembled, embeddings: torch.Tensor | None = None) -> torch.Tensor:
    """(L + 1, B, S, C) by transformers: embeddings and outputs of the layers, the last one normed."""
    given = rows.embeddings if embeddings is None else embeddings
    options = {"use_cache": False, "output_hidden_states": True}
    return torch.stack(subject.decoder(inputs_embeds=given, attention_mask=rows.mask, **options).hidden_states)


def hooks_of(lm: Any) -> int:
    """Number of forward hooks in a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.modules())
