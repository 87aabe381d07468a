"""Batched greedy and beam decoding: deterministic, with a token budget from the audio's length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from avsr.config import DecodeConfig
from avsr.data.batches import Batch, Example, collate
from avsr.models.speech_llm import SpeechLLM


def token_budget(config: DecodeConfig, seconds: float) -> int:
    """Most new tokens for a clip: base_tokens + tokens_per_second x seconds."""
    return config.base_tokens + math.ceil(config.tokens_per_second * seconds)


@torch.no_grad()
def transcribe_batch(model: SpeechLLM, batch: Batch, config: DecodeConfig) -> list[str]:
    """The text of every utterance of ``batch``.

    Rows are padded on the left, so a hypothesis does not depend on the others of its batch; each is cut at its
    own budget.
    """
    model.eval()
    rows = model.assemble(batch, with_text=False, left=True)
    budgets = [token_budget(config, utterance.duration) for utterance in batch.utterances]
    room = (model.max_positions - rows.mask.sum(dim=1) - 1).tolist()
    budgets = [max(1, min(pair)) for pair in zip(budgets, room, strict=True)]
    pad = model.tokenizer.pad_token_id
    generation = GenerationConfig(
        do_sample=False,
        num_beams=config.beams,
        length_penalty=config.length_penalty,
        max_new_tokens=max(budgets) + 1,
        eos_token_id=model.eos,
        pad_token_id=model.eos if pad is None else pad,
        bos_token_id=model.bos,
        use_cache=True,
    )
    ids = model.llm.generate(
        inputs_embeds=rows.embeddings,
        attention_mask=rows.mask,
        generation_config=generation,
        logits_processor=LogitsProcessorList([_OwnBudget(budgets, config.beams, model.eos)]),
    )
    return [_text(model, row[:budget]) for row, budget in zip(ids.tolist(), budgets, strict=True)]


class _OwnBudget(LogitsProcessor):
    """Ends every row at its own budget, so that beams are chosen as if it were decoded alone."""

    def __init__(self, budgets: Sequence[int], beams: int, eos: int) -> None:
        self._budgets = torch.tensor(budgets).repeat_interleave(beams)
        self._eos = eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` holds the new tokens alone, since the prompt came as embeddings."""
        over = (self._budgets <= input_ids.shape[1]).to(scores.device)
        scores = scores.masked_fill(over[:, None], -torch.inf)
        scores[over, self._eos] = 0.0
        return scores


def transcribe(model: SpeechLLM, examples: Sequence[Example], config: DecodeConfig) -> Iterator[tuple[int, str]]:
    """Yields (index, text) batch by batch, utterances of like length together."""
    order = sorted(range(len(examples)), key=lambda i: (examples[i].utterance.duration, i))
    for first in range(0, len(order), config.batch):
        part = order[first : first + config.batch]
        texts = transcribe_batch(model, collate([examples[i] for i in part]), config)
        yield from zip(part, texts, strict=True)


def _text(model: SpeechLLM, ids: list[int]) -> str:
    if model.eos in ids:
        ids = ids[: ids.index(model.eos)]
    return str(model.tokenizer.decode(ids, skip_special_tokens=True)).strip()
