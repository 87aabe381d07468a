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

from avsr.data.batches import Batch
from avsr.models.speech_llm import Terms


@dataclass(frozen=True)
class Counts:
    """Denominators of one optimizer step over all its micro-batches and ranks."""

    labels: int  # text and end tokens; 0 where every clip of the step was lost
    span: int  # prompt tokens behind BOS
    parts: int  # ranks x accumulation steps
    lost: int = 0  # utterances whose clips could not be read


def local_span(spans: Sequence[int]) -> int:
    return sum(max(span - 1, 0) for span in spans)


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """The sum over ranks of every value."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def all_max(value: float, device: torch.device) -> float:
    """The largest over ranks."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def count_step(batches: Sequence[Batch], spans: Sequence[Sequence[int]], device: torch.device) -> Counts:
    """All-reduced counts of one step's micro-batches of this rank."""
    own = [sum(b.label_tokens for b in batches), sum(local_span(s) for s in spans), sum(len(b.lost) for b in batches)]
    labels, span, lost = map(int, all_sum(own, device))
    world = dist.get_world_size() if dist.is_initialized() else 1
    return Counts(labels, span, world * len(batches), lost)


def scaled(terms: Terms, spans: Sequence[int], counts: Counts) -> tuple[Tensor, Tensor | None]:
    """(cross entropy, decorrelation) of one micro-batch, scaled so that DeepSpeed's averages are global ones. An
    average over no label at all is NaN, so that such a step is skipped like any that is not finite."""
    cross_entropy = terms.cross_entropy * (counts.parts / (counts.labels or math.nan))
    if terms.decorrelation is None:
        return cross_entropy, None
    share = local_span(spans) * counts.parts / max(counts.span, 1)
    return cross_entropy, terms.decorrelation * share
