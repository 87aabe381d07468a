"""Batched greedy and beam decoding: deterministic, with a token budget from the clip's duration, and n-best lists.

The score of a hypothesis of n text tokens is that of transformers' beam search: the sum of the log-probabilities of its
tokens and of the end token after them, divided by ``(n + 1) ** length_penalty``. A text that is cut by its budget gets
the end token for free (log-probability 0), which still counts in n + 1.

``repetition_penalty`` and ``no_repeat_ngram`` are transformers' and see only the new tokens, neither the prompt nor the
end. They change which texts are found and in which order, not the scores: those stay the model's own log-probabilities,
so the best by the search need not have the highest score. Greedy decoding applies the penalty to logits (Keskar et al.
2019), beam search to log-probabilities, where it does little against a token that the model is sure of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from avsr.config import DecodeConfig
from avsr.data.batches import Batch, Example, collate
from avsr.errors import UserError
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.machine import enough_memory

BUDGET, POSITIONS = "budget", "positions"  # what cuts a text


class Hypothesis(NamedTuple):
    """A decoded text, its score in nats (see the module), and what cut it: its ``BUDGET``, the ``POSITIONS`` of the
    language model, or "" where it ended by itself."""

    text: str
    score: float
    cut: str


def token_budget(config: DecodeConfig, seconds: float) -> int:
    """Maximum number of new tokens for a clip: base_tokens + tokens_per_second x seconds."""
    return config.base_tokens + math.ceil(config.tokens_per_second * seconds)


@torch.no_grad()
def transcribe_batch(model: SpeechLLM, batch: Batch, config: DecodeConfig) -> list[list[Hypothesis]]:
    """The ``config.nbest`` best hypotheses of every utterance of ``batch``, best first.

    Rows are padded on the left, so a hypothesis does not depend on the others of its batch; each is cut at its
    own budget. Hypotheses differ in their tokens; two may still spell the same text.
    """
    model.eval()
    rows = model.assemble(batch, with_text=False, left=True)
    wanted = [token_budget(config, utterance.duration) for utterance in batch.utterances]
    room = (model.max_positions - rows.mask.sum(dim=1) - 1).tolist()
    budgets = [max(1, min(pair)) for pair in zip(wanted, room, strict=True)]
    pad = model.tokenizer.pad_token_id
    generation = GenerationConfig(
        do_sample=False,
        num_beams=config.beams,
        num_return_sequences=config.nbest,
        length_penalty=config.length_penalty,
        max_new_tokens=max(budgets) + 1,
        eos_token_id=model.eos,
        pad_token_id=model.eos if pad is None else pad,
        bos_token_id=model.bos,
        use_cache=True,
    )
    trace = _Trace(config.beams, model.eos)
    with _contiguous_states(model):
        ids = model.llm.generate(
            inputs_embeds=rows.embeddings,
            attention_mask=rows.mask,
            generation_config=generation,
            logits_processor=LogitsProcessorList(
                [trace, *_penalties(config), _OwnBudget(budgets, config.beams, model.eos)]
            ),
        )
    found: list[list[Hypothesis]] = [[] for _ in budgets]
    for place, row in enumerate(ids.tolist()):
        utterance = place // config.nbest
        tokens = row[: budgets[utterance]]
        cut = "" if model.eos in tokens else BUDGET if wanted[utterance] <= room[utterance] else POSITIONS
        tokens = _until(tokens, model.eos)
        text = str(model.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        total = trace.log_probability(utterance, tokens, ended=not cut)
        found[utterance].append(Hypothesis(text, total / (len(tokens) + 1) ** config.length_penalty, cut))
    return found


def _penalties(config: DecodeConfig) -> list[LogitsProcessor]:
    """Not by ``GenerationConfig``, which would spare as many new tokens as the prompt has padding."""
    found: list[LogitsProcessor] = []
    if config.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram))
    return found


@contextmanager
def _contiguous_states(model: SpeechLLM) -> Iterator[None]:
    """Makes the states that enter the language model's head contiguous inside this context.

    transformers slices the last position out of the prompt's states, and torch multiplies such a slice by copying the
    whole matrix for every row (7 of 15 s for 50 rows of SmolLM2 on one CPU thread, and 2.8 GB).
    """
    hook = model.decoder.lm_head.register_forward_pre_hook(lambda head, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


class _OwnBudget(LogitsProcessor):
    """Ends every row at its own budget, so that its beams are the same as if it were decoded alone."""

    def __init__(self, budgets: Sequence[int], beams: int, eos: int) -> None:
        self._budgets = torch.tensor(budgets).repeat_interleave(beams)
        self._eos = eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` has only the new tokens, since the prompt was given as embeddings."""
        over = (self._budgets <= input_ids.shape[1]).to(scores.device)
        scores = scores.masked_fill(over[:, None], -torch.inf)
        scores[over, self._eos] = 0.0
        return scores


class _Trace(LogitsProcessor):
    """Observes the model's logits in a search to give the log-probability of every text that it considered.

    transformers returns scores only together with the logits of all steps, gigabytes for 15 beams of a vocabulary of
    128,000. Here every step keeps three small tensors: the rows' tokens so far (R, t), their log-probability (R,) and
    that of an end token after them (R,).
    """

    def __init__(self, beams: int, eos: int) -> None:
        self._beams, self._eos = beams, eos
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self._last = torch.empty(0)  # (R, vocabulary) log-probabilities of the latest step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = scores.float().log_softmax(dim=-1)
        if bool(log_probs.isnan().any()):
            raise UserError(
                "the language model's logits are NaN, so no text can be found: look at what changes its values (LoRA's "
                "alpha, the weights), and try training.precision=fp32"
            )
        if self._steps:
            before, totals, _ = self._steps[-1]
            parents = self._rows(input_ids[:, :-1], before)
            totals = totals[parents] + self._last[parents, input_ids[:, -1]]
        else:
            totals = log_probs.new_zeros(len(log_probs))
        self._steps.append((input_ids.clone(), totals, log_probs[:, self._eos]))
        self._last = log_probs
        return scores

    def log_probability(self, utterance: int, tokens: list[int], *, ended: bool) -> float:
        """The log-probability of ``tokens`` (and the end token when ``ended``), considered for this utterance."""
        ids, totals, ends = self._steps[len(tokens)]
        own = slice(utterance * self._beams, (utterance + 1) * self._beams)
        same = (ids[own] == torch.tensor(tokens, dtype=ids.dtype, device=ids.device)).all(dim=-1)
        row = own.start + int(same.nonzero()[0])
        return float(totals[row] + ends[row]) if ended else float(totals[row])

    def _rows(self, prefixes: Tensor, ids: Tensor) -> Tensor:
        """(R,) row of ``ids`` (R, t) that holds each prefix (R, t), among the beams of the same utterance.

        Rows may hold the same tokens (initially all do), and then have the same sums.
        """
        shape = (len(ids) // self._beams, self._beams, ids.shape[1])
        same = (prefixes.reshape(shape)[:, :, None] == ids.reshape(shape)[:, None]).all(dim=-1)
        first = torch.arange(0, len(ids), self._beams, device=ids.device)
        return (same.long().argmax(dim=-1) + first[:, None]).flatten()


def groups(seconds: Sequence[float], size: int) -> list[list[int]]:
    """The indices of ``seconds`` in batches of at most ``size``, from the shortest to the longest."""
    order = sorted(range(len(seconds)), key=lambda i: (seconds[i], i))
    return [order[first : first + size] for first in range(0, len(order), size)]


def transcribe(
    model: SpeechLLM,
    load: Callable[[int], Example],
    seconds: Sequence[float],
    config: DecodeConfig,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Yields (index, hypotheses, best first) batch by batch, utterances of similar length together.

    ``load`` returns the example of an index when its batch is due, so a test set need not fit into memory; utterances
    are grouped by ``seconds``. With ``share`` = (rank, ranks) it is every ranks-th batch of those that one process
    decodes: all ranks together find the same, to the last digit of a score.

    Raises:
        UserError: a batch does not fit into memory, or logits are NaN.
    """
    rank, ranks = share
    for part in groups(seconds, config.batch)[rank::ranks]:
        doing = f"decoding {len(part)} utterances of up to {max(seconds[i] for i in part):.1f} s"
        advice = f"lower decode.batch = {config.batch} or decode.beams = {config.beams}"
        batch = collate([load(i) for i in part])
        with enough_memory(doing, advice):
            found = transcribe_batch(model, batch, config)
        yield from zip(part, found, strict=True)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
