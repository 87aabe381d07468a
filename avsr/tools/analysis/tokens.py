"""Which tokens stand out: the sinks and the tokens with massive activations, by name.

B rows, S tokens, L layers. Layers count from 1; a token is judged by layers 1..L-1, the last one prepares the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import flashsink
from avsr.models.speech_llm import Assembled
from avsr.tools.analysis.collect import EPS, MASSIVE_RATIO, MASSIVE_SIZE, MIN_QUERIES
from avsr.tools.analysis.subject import Subject

SINK_RATE = 0.1  # a token is a sink when it is one in at least this share of all (layer, head) pairs
HALF_WAY = 2.0  # times the usual: some tokens start out like sinks and get stuck
OTHERS = 3  # of the tokens that are neither BOS, delimiter nor prompt only the strongest are named


@dataclass
class Seen:
    """What one batch's tokens did; tensors on the CPU.

    Attributes:
        labels: a label for every token of every row, see :func:`label`.
        valid: (B, S) bool, no padding.
        size: (L, B, S) float32, max |h| of the layers' outputs, and feature: (L, B, S) int64, where it is.
        median: (L, B) float32, median of |h| over the row.
        rate: (L, B, S) float32, share of heads in which the token is a sink.
    """

    labels: list[list[str]]
    valid: Tensor
    size: Tensor
    feature: Tensor
    median: Tensor
    rate: Tensor

    @property
    def inner(self) -> int:
        """Number of layers that count."""
        return max(len(self.size) - 1, 1)

    @cached_property
    def massive(self) -> Tensor:
        """(B, S) bool: a massive activation in some layer."""
        return is_massive(self.size, self.median[..., None])[: self.inner].any(dim=0) & self.valid

    @cached_property
    def sinks(self) -> Tensor:
        """(B, S) bool."""
        return (self.rate[: self.inner].mean(dim=0) >= SINK_RATE) & self.valid

    @cached_property
    def outstanding(self) -> Tensor:
        """(B, S) bool: a sink or massive."""
        return self.massive | self.sinks

    @cached_property
    def ordinary(self) -> Tensor:
        """(B, S) bool: neither that nor BOS, nor half-way: in no layer more than twice as large, by the ratio to the
        median |h|, as the row's tokens that do not stand out commonly are at their largest."""
        first = torch.arange(self.valid.shape[1]) == 0
        rest = self.valid & ~self.outstanding & ~first
        ratio = (self.size / self.median[..., None].clamp(min=1e-12))[: self.inner].amax(dim=0)
        usual = torch.where(rest, ratio, torch.nan).nanmedian(dim=1, keepdim=True).values
        return rest & (ratio <= HALF_WAY * usual)

    def where(self, name: str, *, outstanding: bool) -> tuple[Tensor, Tensor]:
        """(n,) rows and (n,) positions of the tokens with a label, of all or only of those that stand out."""
        places = [(b, s) for b, row in enumerate(self.labels) for s, other in enumerate(row) if other == name]
        index = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
        rows, positions = index[:, 0], index[:, 1]
        keep = self.outstanding[rows, positions] | (not outstanding)
        return rows[keep], positions[keep]


def is_massive(size: Tensor, median: Tensor) -> Tensor:
    """|h| >= 1000 times the median |h| of its utterance and layer, and above 100 (Sun et al.)."""
    return (size >= MASSIVE_RATIO * median) & (size > MASSIVE_SIZE)


def label(name: str, position: int, span: int) -> str:
    """A token's name in the tables: BOS, delimiters and speech tokens as they are, "prompt ..." and "text ..."."""
    if position == 0:
        return "BOS"
    if position < span and (name.startswith("<") or (name[:1] in ("a", "v", "f") and name[1:].isdigit())):
        return name
    return f"{'prompt' if position < span else 'text'} {name.strip() or repr(name)}"


def look(subject: Subject) -> list[Seen]:
    """Sizes and sink rates of all tokens, batch by batch in the order of ``subject.batches()``."""
    with observing(subject):
        return [_look(subject, rows) for rows in subject.batches()]


def _look(subject: Subject, rows: Assembled) -> Seen:
    probe = flashsink.attach(subject.lm, attention=True, decorrelation=False, activations=True, median=True)
    try:
        subject.forward(rows)
        rate = torch.stack([stats.sink_rate(EPS, MIN_QUERIES) for stats in probe.sinks])
        activations = probe.activations
    finally:
        probe.detach()
    assert activations.median is not None
    return Seen(
        [
            [label(name, s, int(span)) for s, name in enumerate(row)]
            for row, span in zip(rows.names, rows.spans, strict=True)
        ],
        rows.mask.bool().cpu(),
        activations.max_abs.cpu(),
        activations.feature.long().cpu(),
        activations.median.cpu(),
        rate.cpu(),
    )


def choose(subject: Subject, seen: list[Seen]) -> list[str]:
    """The labels to look into: BOS, the opener, and what else is a sink or massive, the strongest first.

    All such delimiters and prompt tokens are taken, and the strongest ``OTHERS`` of the rest.
    """
    always = ["BOS", subject.opener]
    known = {name for batch in seen for row in batch.labels for name in row}
    strength: dict[str, float] = {}
    for batch in seen:
        peak = batch.size[: batch.inner].amax(dim=0)
        for b, s in batch.outstanding.nonzero().tolist():
            name = batch.labels[b][s]
            strength[name] = max(strength.get(name, 0.0), float(peak[b, s]))
    ranked = sorted((name for name in strength if name not in always), key=lambda name: -strength[name])
    framing = [name for name in ranked if name.startswith(("<", "prompt "))]
    rest = [name for name in ranked if name not in framing][:OTHERS]
    return [name for name in always if name in known] + framing + rest


def stands_out(seen: list[Seen], name: str) -> bool:
    """Whether any token with this label is a sink or massive."""
    return any(len(batch.where(name, outstanding=True)[0]) for batch in seen)


@contextmanager
def observing(subject: Subject) -> Iterator[None]:
    """No gradients, every module in eval mode; afterwards all is as it was."""
    training = [module for module in subject.lm.modules() if module.training]
    subject.lm.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def state_of(output: Any) -> Tensor:
    """The (B, S, C) states of what a layer or its attention returns: a tensor, or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The (B, S, C) states that a decoder layer was called with."""
    return args[0] if args else kwargs["hidden_states"]
