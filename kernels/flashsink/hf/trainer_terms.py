"""What a Trainer needs of a batch and of a probe: how many tokens are the prompt, and the statistics to log.

Dimensions: B rows, S tokens, N sequences (N = B, or the packed ones of a single row), L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink.hf.probe import Probe

logger = logging.getLogger("flashsink")

EPS, MIN_QUERIES = 0.3, 8  # of the sink rates: a sink's mean attention, and the fewest queries that may see a key
NAMES = ("bos", "bos_count", "others", "others_count", "others_max", "largest", "layer", "token", "feature")

Spans = str | Callable[[Mapping[str, Any]], Tensor]


class Sequences(NamedTuple):
    """The sequences of a batch.

    Attributes:
        lengths: (N,) int64.
        number: (B, S) int64, which sequence a token belongs to; padding has any.
        offset: (B, S) int64, position in its sequence, 0 = BOS; outside 0..length-1 at padding.
    """

    lengths: Tensor
    number: Tensor
    offset: Tensor


def sequences(batch: Mapping[str, Any]) -> Sequences:
    """The sequences of a collated batch: rows with a padding mask (B, S), or those that restarting ``position_ids``
    mark in a single row without a mask, as transformers packs them.

    Raises:
        ValueError: neither ``input_ids`` nor ``inputs_embeds``, or a mask that is not (B, S).
    """
    inputs = batch.get("input_ids") if batch.get("input_ids") is not None else batch.get("inputs_embeds")
    if inputs is None:
        raise ValueError(f"batch: expected input_ids or inputs_embeds, got {', '.join(sorted(batch))}")
    (rows, tokens), device = inputs.shape[:2], inputs.device
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    position = torch.arange(tokens, device=device).expand(rows, tokens)
    row = torch.arange(rows, device=device)[:, None].expand(rows, tokens)
    if mask is not None:
        if mask.shape != (rows, tokens):
            raise ValueError(f"attention_mask: expected a padding mask ({rows}, {tokens}), got {tuple(mask.shape)}")
        keep = mask.bool()
        starts = keep.int().argmax(dim=1, keepdim=True)
        return Sequences(keep.sum(dim=1), row, position - starts)
    if positions is not None and positions.shape == (1, tokens) and rows == 1:
        restarts = torch.nn.functional.pad(positions.diff(dim=1) != 1, (1, 0))
        index = restarts.cumsum(dim=1)
        lengths = torch.bincount(index[0])
        return Sequences(lengths, index, position - (lengths.cumsum(0) - lengths)[index])
    return Sequences(torch.full((rows,), tokens, device=device), row, position)


def prompt_lengths(batch: Mapping[str, Any], sizes: Sequences) -> Tensor:
    """(N,) int64: tokens before the first label that is not -100.

    All of a sequence where it has no such label; also where its first or second token has one, since that is a loss
    over the whole sequence: nothing predicts the first token, and collators that pack set its label to -100.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return sizes.lengths
    if labels.shape != sizes.number.shape:
        raise ValueError(f"labels: expected {tuple(sizes.number.shape)} as input_ids has, got {tuple(labels.shape)}")
    lengths, index, offset = (size.to(labels.device) for size in sizes)
    own = lengths[index]
    first = torch.where((labels != -100) & (offset >= 0) & (offset < own), offset, own)
    prompt = lengths.scatter_reduce(0, index.flatten(), first.flatten(), "amin")
    return torch.where(prompt <= 1, lengths, prompt)


def span_lengths(batch: Mapping[str, Any], spans: Spans) -> Tensor:
    """(N,) integers: how many leading tokens of every sequence of the batch the loss counts, BOS with them.

    Raises:
        ValueError: a function that gives no integers of this shape, or a batch without known sequences.
    """
    sizes = sequences(batch)
    if spans == "all":
        return sizes.lengths
    if spans == "prompt":
        return prompt_lengths(batch, sizes)
    assert callable(spans)
    given = spans(batch)
    if not isinstance(given, Tensor) or given.is_floating_point() or given.shape != sizes.lengths.shape:
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"spans: expected a function that gives ({len(sizes.lengths)},) integers, got {got}")
    return given


def counted(spans: Tensor) -> Tensor:
    """int64 scalar: tokens that the loss is a mean over, those of the spans after BOS."""
    return (spans - 1).clamp(min=0).sum()


def statistics(probe: Probe) -> Tensor:
    """What the last full forward of this process gives to the log, as float32 in the order of :data:`NAMES`; what was
    not recorded has counts of 0 and a largest activation of -1. Lazy statistics are computed here."""
    sinks, activations = _recorded(probe, "sinks"), _recorded(probe, "activations")
    if not sinks and activations is None:
        return torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0])
    if sinks:
        device = sinks[0].queries.device
        queries = torch.stack([stats.queries.to(device) for stats in sinks]).amax(dim=0)
    else:  # of rows alone, which is what there is without attention
        valid = activations.feature[0] >= 0
        queries = valid.flip(1).cumsum(dim=1).flip(1) * valid
    # a causal sequence's last token is seen by itself alone, and padding by nobody
    bos = (queries > 0) & (torch.nn.functional.pad(queries, (1, 0))[:, :-1] <= 1)
    values = queries.new_zeros(len(NAMES), dtype=torch.float32)
    values[5] = -1.0
    if sinks:
        rates = torch.stack([stats.sink_rate(EPS, MIN_QUERIES).to(device) for stats in sinks]).mean(dim=0)
        known = queries >= MIN_QUERIES
        others = rates * (known & ~bos)
        values[0], values[1] = (rates * (known & bos)).sum(), (known & bos).sum()
        values[2], values[3], values[4] = others.sum(), (known & ~bos).sum(), others.max()
    if activations is not None:
        place = activations.max_abs.argmax()  # NaN counts as the largest
        tokens = activations.max_abs[0].numel()
        position = torch.arange(bos.shape[1], device=bos.device)
        offset = position - torch.where(bos, position, 0).cummax(dim=1).values
        values[5] = activations.max_abs.flatten()[place]
        values[6] = place // tokens
        values[7] = offset.flatten()[(place % tokens).to(bos.device)]
        values[8] = activations.feature.flatten()[place]
    return values


def combined(ranks: Tensor) -> dict[str, float | int]:
    """The log entries of the :func:`statistics` of all ranks (W, 9)."""
    rows = [dict(zip(NAMES, row, strict=True)) for row in ranks.tolist()]
    total = {name: sum(row[name] for row in rows) for name in NAMES[:4]}
    logs: dict[str, float | int] = {}
    if total["bos_count"]:
        logs["bos_sink_rate"] = total["bos"] / total["bos_count"]
    if total["others_count"]:
        logs["intermediate_sink_rate_mean"] = total["others"] / total["others_count"]
        logs["intermediate_sink_rate_max"] = max(row["others_max"] for row in rows)
    largest = max(rows, key=lambda row: float("inf") if row["largest"] != row["largest"] else row["largest"])
    if not largest["largest"] < 0:
        logs["largest_activation"] = largest["largest"]
        logs.update({f"largest_activation_{name}": int(largest[name]) for name in ("layer", "token", "feature")})
    return logs


def decorrelation(probe: Probe) -> Tensor:
    """(2,) float32: the loss of the last full forward as a sum over its tokens, and their number; 0 without."""
    loss = _recorded(probe, "decorrelation_loss")
    if loss is None:
        return torch.zeros(2)
    number = probe.decorrelation_count.float()
    return torch.stack([loss.detach() * number, number])


def _recorded(probe: Probe, name: str) -> Any:
    """What the probe has of this kind, or None with a warning that says why not."""
    try:
        return getattr(probe, name)
    except RuntimeError as error:  # not attached, skipped, or without softmax attention
        if str(error) not in _said:
            _said.add(str(error))
            logger.warning("not logged: %s", error)
        return None


_said: set[str] = set()
