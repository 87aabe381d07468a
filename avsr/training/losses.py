"""The training loss of one optimizer step: global averages over unequal micro-batches and ranks.

DeepSpeed averages gradients over ranks and accumulation steps. So that n micro-batches on w ranks give the gradient
of one big batch, every local sum is divided by the global count and multiplied by w * n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from avsr.config import Config
from avsr.data.batches import Batch
from avsr.models.speech_llm import SpeechLLM, Terms
from avsr.runtime.transfer import Later, on_device


def attach(model: SpeechLLM, config: Config) -> None:
    """Attaches flashsink for training: the decorrelation loss if it has a weight, sinks if flashsink computes the
    attention."""
    constant = config.loss.decorrelation > 0 and config.loss.anchor == "base"
    model.attach(
        anchors=model.base_states() if constant else None,
        attention=config.model.llm.attention == "flashsink",
        decorrelation=config.loss.decorrelation > 0,
        activations=False,
        margin=config.loss.margin,
        segment_mass=config.log.attention,
    )


@dataclass(frozen=True)
class Counts:
    """Denominators of one optimizer step over all its micro-batches and ranks."""

    labels: int  # text and end tokens; 0 if every clip of the step was lost
    decorrelated: int  # prompt tokens after BOS, which the decorrelation loss is a mean over
    parts: int  # ranks x accumulation steps
    lost: int = 0  # utterances whose clips could not be read


def decorrelated_tokens(prompt_lengths: Sequence[int]) -> int:
    """Tokens of one micro-batch that the decorrelation loss is a mean over: its prompts without BOS."""
    return sum(max(length - 1, 0) for length in prompt_lengths)


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Every value summed over ranks."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def all_max(value: float, device: torch.device) -> float:
    """The maximum over ranks."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def own_counts(batches: Sequence[Batch], prompt_lengths: Sequence[Sequence[int]]) -> list[int]:
    """Labels, decorrelated tokens and lost utterances of this rank's micro-batches, from the prompt lengths in each."""
    labels = sum(batch.label_tokens for batch in batches)
    return [labels, sum(map(decorrelated_tokens, prompt_lengths)), sum(len(batch.lost) for batch in batches)]


def all_counts(summed: Sequence[float], micro_batches: int) -> Counts:
    """From the sum of :func:`own_counts` over ranks, and the micro-batches of each."""
    labels, decorrelated, lost = map(int, summed)
    world = dist.get_world_size() if dist.is_initialized() else 1
    return Counts(labels, decorrelated, world * micro_batches, lost)


class Sums:
    """What the micro-batches of a step add up to, on the device.

    Attributes:
        own: (3,) float64 of this rank: cross entropy summed over labels, decorrelation summed over tokens, and correct
            predictions.
    """

    def __init__(self, device: torch.device) -> None:
        self.own = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, terms: Terms, prompt_lengths: Sequence[int]) -> None:
        """Adds what a model returned for a micro-batch with these prompt lengths."""
        ce, decorrelation, correct = self.own
        ce.add_(terms.cross_entropy.detach())
        if terms.decorrelation is not None:
            decorrelation.add_(terms.decorrelation.detach(), alpha=decorrelated_tokens(prompt_lengths))
        correct.add_(terms.correct)

    def send(self, values: Sequence[float]) -> Later:
        """Collective, and launched only: the sums, then the host's own ``values``, all added over ranks."""
        total = torch.cat((self.own, on_device(values, self.own.device, torch.float64)))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        return Later(total)


def scaled(
    cross_entropy: Tensor, decorrelation: Tensor | None, prompt_lengths: Sequence[int], counts: Counts
) -> tuple[Tensor, Tensor | None]:
    """Both terms of one micro-batch, scaled so that DeepSpeed's averages are global ones.

    An average over no label at all is NaN, so that such a step is skipped like any other that is not finite.

    Args:
        cross_entropy: scalar, the sum over the micro-batch's labels.
        decorrelation: scalar, the mean over its prompt tokens after BOS, or None.
        prompt_lengths: of its rows.
        counts: of the step.
    """
    cross_entropy = cross_entropy * (counts.parts / (counts.labels or math.nan))
    if decorrelation is None:
        return cross_entropy, None
    share = decorrelated_tokens(prompt_lengths) * counts.parts / max(counts.decorrelated, 1)
    return cross_entropy, decorrelation * share
