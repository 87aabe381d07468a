"""What the tokens of a batch do: activations, sink rates, attention received; and which of them stand out.

B rows, S tokens, L layers, H heads. Tables count layers from 1. A token is judged by layers 1..L-1, since the last one
prepares the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import flashsink
from avsr.tools.analysis.attention import text_attention
from avsr.tools.analysis.groups import BOS, PROMPT, label
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.walk import QKV, Tap, measure

if TYPE_CHECKING:
    from avsr.models.rows import Assembled

EPS = 0.3  # a key is a sink when its mean received attention exceeds this (Gu et al.)
MIN_QUERIES = 8  # keys that fewer queries see are not counted
MASSIVE_RATIO, MASSIVE_SIZE = 1000.0, 100.0  # Sun et al.
SINK_RATE = 0.1  # a token is a sink when it is one in at least this share of all (layer, head) pairs
HALF_WAY = 2.0  # times the usual: some tokens start out like sinks and get stuck
OTHERS = 3  # of the tokens that are neither BOS, delimiter nor prompt only the strongest are named
SINKS_AND_ACTIVATIONS = {"attention": True, "decorrelation": False, "activations": True, "median": True}  # for attach


@dataclass
class TokenStatistics:
    """What one batch's tokens did; tensors on the CPU.

    Attributes:
        labels: a label for every token of every row, see :func:`avsr.tools.analysis.groups.label`.
        valid: (B, S) bool, no padding.
        max_abs: (L, B, S) float32, max |h| of the layers' outputs, and feature: (L, B, S) int64, where it is.
        median: (L, B) float32, median of |h| over the row.
        sink_rate: (L, B, S) float32, share of heads in which the token is a sink (of all queries); 0 for keys that
            fewer than ``MIN_QUERIES`` queries see, their own included.
    """

    labels: list[list[str]]
    valid: Tensor
    max_abs: Tensor
    feature: Tensor
    median: Tensor
    sink_rate: Tensor

    @property
    def inner(self) -> int:
        """Number of layers that count."""
        return max(len(self.max_abs) - 1, 1)

    @cached_property
    def massive(self) -> Tensor:
        """(B, S) bool: a massive activation in some layer."""
        return is_massive(self.max_abs, self.median[..., None])[: self.inner].any(dim=0) & self.valid

    @cached_property
    def sinks(self) -> Tensor:
        """(B, S) bool."""
        return (self.sink_rate[: self.inner].mean(dim=0) >= SINK_RATE) & self.valid

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
        ratio = (self.max_abs / self.median[..., None].clamp(min=1e-12))[: self.inner].amax(dim=0)
        usual = torch.where(rest, ratio, torch.nan).nanmedian(dim=1, keepdim=True).values
        return rest & (ratio <= HALF_WAY * usual)

    def where(self, name: str, *, outstanding: bool) -> tuple[Tensor, Tensor]:
        """(n,) rows and (n,) positions of the tokens with a label, of all or only of those that stand out."""
        places = [(b, s) for b, row in enumerate(self.labels) for s, other in enumerate(row) if other == name]
        rows, positions = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(dim=1)
        keep = self.outstanding[rows, positions] | (not outstanding)
        return rows[keep], positions[keep]


@dataclass
class TextStatistics:
    """What one batch's text queries attend to, with the alignment of all states; tensors on the CPU.

    ``counted`` says which keys at least ``MIN_QUERIES`` text queries other than their own see, in a row with fewer text
    tokens all of them (so that its prompt counts); "from others" means from these queries.
    """

    counted: Tensor  # (B, S) bool
    counted_raw: Tensor  # (B, S) bool, keys that at least ``MIN_QUERIES`` queries see, their own included
    sink_rate_text: Tensor  # (L, B, S) share of heads in which a key is a sink of the text queries, however few
    sinks: Tensor  # (L, B, H, S) bool, sinks by the attention from others
    received: Tensor  # (L, B, S) mean attention from others, mean over heads
    received_value: Tensor  # (L, B, S) mean over heads of that attention x |v|
    value_norm: Tensor  # (L, B, S) |v|, mean over key heads
    mass: Tensor  # (L, B, S) attention of all text queries, their own included, mean over heads
    cosine: Tensor  # (L, B, S) to BOS
    decorrelation: float  # mean squared cosine over ``count`` tokens
    count: int


def is_massive(size: Tensor, median: Tensor) -> Tensor:
    """|h| >= 1000 times the median |h| of its row and layer, and above 100 (Sun et al.)."""
    return (size >= MASSIVE_RATIO * median) & (size > MASSIVE_SIZE)


@torch.no_grad()
def measure_tokens(subject: Subject) -> list[TokenStatistics]:
    """Statistics of all tokens, batch by batch in the order of ``subject.batches()``."""
    return [_tokens(rows, measure(subject, rows, **SINKS_AND_ACTIVATIONS)) for rows in subject.batches()]


def _tokens(rows: Assembled, probe: flashsink.Probe) -> TokenStatistics:
    activations = probe.activations
    assert activations.median is not None
    return TokenStatistics(
        labels=[
            [label(name, s, int(span)) for s, name in enumerate(row)]
            for row, span in zip(rows.names, rows.spans, strict=True)
        ],
        valid=rows.mask.bool().cpu(),
        max_abs=activations.max_abs.cpu(),
        feature=activations.feature.long().cpu(),
        median=activations.median.cpu(),
        sink_rate=torch.stack([stats.sink_rate(EPS, MIN_QUERIES) for stats in probe.sinks]).cpu(),
    )


@torch.no_grad()
def measure_batch(subject: Subject, rows: Assembled) -> tuple[TokenStatistics, TextStatistics]:
    """All statistics of one batch, from one forward, in float32."""
    lengths = rows.mask.sum(dim=1)
    position = torch.arange(rows.mask.shape[1], device=lengths.device)
    text = (position >= rows.spans[:, None]) & (position < lengths[:, None])
    queries = (lengths[:, None] - torch.maximum(position[None], rows.spans[:, None])).clamp(min=0)  # (B, S)
    others = queries - text.long()
    enough = (lengths - rows.spans).clamp(min=1, max=MIN_QUERIES)  # (B,)
    counted = (others >= enough[:, None]) & (position < lengths[:, None])
    layers: dict[str, list[Tensor]] = {}

    def keep(**values: Tensor) -> None:
        for key, value in values.items():
            layers.setdefault(key, []).append(value.cpu())

    def see_attention(layer: int, qkv: QKV) -> None:
        received, own = text_attention(qkv, rows.spans, lengths)
        mean = (received - own) / others.clamp(min=1)[:, None]
        norm = qkv.v.float().norm(dim=-1)
        value = norm.repeat_interleave(received.shape[1] // norm.shape[1], dim=1)
        keep(
            sink_rate_text=(received / queries.clamp(min=1)[:, None] > EPS).float().mean(dim=1),
            sinks=(mean > EPS) & counted[:, None],
            received=mean.mean(dim=1),
            received_value=(mean * value).mean(dim=1),
            value_norm=norm.mean(dim=1),
            mass=received.mean(dim=1),
        )

    def see_state(layer: int, states: Tensor) -> None:
        h = states.float()
        keep(cosine=torch.nn.functional.cosine_similarity(h, h[:, :1], dim=-1))

    options = SINKS_AND_ACTIVATIONS | {"decorrelation": True}
    probe = measure(subject, rows, Tap("qkv", see_attention), Tap("output", see_state), **options)
    return _tokens(rows, probe), TextStatistics(
        counted=counted.cpu(),
        counted_raw=(lengths[:, None] - position >= MIN_QUERIES).cpu(),
        **{key: torch.stack(values) for key, values in layers.items()},
        decorrelation=float(probe.decorrelation_loss) if subject.layers > 1 else 0.0,
        count=int(probe.decorrelation_count),
    )


def choose_labels(subject: Subject, seen: list[TokenStatistics]) -> list[str]:
    """The labels to examine: BOS, the opener, and what else is a sink or massive, the strongest first.

    All such delimiters and prompt tokens are taken, and the strongest ``OTHERS`` of the rest.
    """
    always = [BOS, subject.opener]
    known = {name for batch in seen for row in batch.labels for name in row}
    strength: dict[str, float] = {}
    for batch in seen:
        peak = batch.max_abs[: batch.inner].amax(dim=0)
        for b, s in batch.outstanding.nonzero().tolist():
            name = batch.labels[b][s]
            strength[name] = max(strength.get(name, 0.0), float(peak[b, s]))
    ranked = sorted((name for name in strength if name not in always), key=lambda name: -strength[name])
    framing = [name for name in ranked if name.startswith(("<", PROMPT))]
    rest = [name for name in ranked if name not in framing][:OTHERS]
    return [name for name in always if name in known] + framing + rest


def stands_out(seen: list[TokenStatistics], name: str) -> bool:
    """Whether any token with this label is a sink or massive."""
    return any(len(batch.where(name, outstanding=True)[0]) for batch in seen)
