"""The causal test: does the direction of a token's state make it a sink with a massive activation?

An intervention on the residual stream: before the layer in which a massive activation is made, a sink's state is
rotated toward that of the nearest ordinary token, and an ordinary token's toward BOS; its norm stays. The rest of the
network then runs on. Layers count from 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avsr.errors import UserError
from avsr.tools.analysis.groups import BOS
from avsr.tools.analysis.origin import trace_origin
from avsr.tools.analysis.statistics import (
    EPS,
    MIN_QUERIES,
    SINK_RATE,
    SINKS_AND_ACTIVATIONS,
    TokenStatistics,
    choose_labels,
    is_massive,
    measure_tokens,
    stands_out,
)
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.walk import Tap, measure

if TYPE_CHECKING:
    from avsr.models.rows import Assembled

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
TENFOLD = 10.0  # an activation vanishes below a tenth of itself and appears above ten times itself
HALF = 0.5  # of the rows, for what is said of all; of the attention of the row's sinks, for what draws like a sink


@dataclass
class _Places:
    """The tokens of a batch whose states are rotated, one a row, and what they are rotated toward."""

    rows: Tensor  # (n,) int64
    positions: Tensor  # (n,) int64
    goals: Tensor  # (n, S) bool, tokens of the same row; the nearest is the goal
    others: Tensor  # (n, S) bool, the row's other sinks


def causal_test(
    subject: Subject,
    seen: list[TokenStatistics] | None = None,
    origin: dict[str, Any] | None = None,
    layer: int | None = None,
) -> dict[str, Any]:
    """Rotates the states of sinks and of ordinary tokens by fractions of the angle and measures what becomes of them.

    Args:
        subject: the model and its input, all of which is used.
        seen: what :func:`avsr.tools.analysis.statistics.measure_tokens` gave for it; measured anew without.
        origin: what :func:`avsr.tools.analysis.origin.trace_origin` gave for it, or for more rows (a label that it
            does not have is left out); traced anew without.
        layer: whose output is rotated, 0 for the embeddings; default: for every label the layer before its origin, for
            ordinary tokens that of BOS.

    Returns:
        ``fractions``, ``sinks`` (by label, the first such token of every row; None for what is massive in the embedding
        already, as there is no layer before which to rotate it) and ``normal`` (one table: the ordinary token nearest
        to the middle of every row; None when no row has one, or when the embedding makes BOS what it is).

        A table holds ``layer``, ``rows``, ``angle`` (mean, degrees) and by fraction the means over rows of
        ``activation`` (the largest |h| in the later layers), ``log10_ratio`` (the largest, to the median), ``massive``
        (share of rows), ``cosine`` (to the untouched BOS), ``sink_rate``, ``received`` (mean attention from the queries
        that see it) and ``received_by_others`` (the same of the row's other sinks, 0 without any). The last four are
        means over the later layers; layer L is never among them.

        Then the verdict on the whole rotation. Sinks: ``activation_vanished`` (below a tenth) and ``sink_vanished``
        (its rate is no sink's any more), None when it was not massive or no sink before. Ordinary tokens:
        ``activation_appeared`` (above ten times and massive in half of the rows) and ``sink_appeared`` (it draws at
        least half as much attention as the row's sinks, or BOS without any, and did not before; sinks share, so that a
        further one need not reach their rate).

    Raises:
        UserError: no such layer, or a model of one layer.
    """
    last = subject.layers - 2
    if last < 0:
        raise UserError("causal test: expected a model of at least 2 layers")
    if layer is not None and not 0 <= layer <= last:
        raise UserError(f"layer: expected 0 to {last}, got {layer}")
    seen = measure_tokens(subject) if seen is None else seen
    origin = trace_origin(subject, seen) if origin is None else origin
    at = {name: table["layer"] - 1 if layer is None else layer for name, table in origin["tokens"].items()}
    sinks: dict[str, Any] = {}
    for name in choose_labels(subject, seen):
        if name in at and stands_out(seen, name):
            means = _intervene(subject, seen, at[name], partial(_sinks, name))
            if means or at[name] < 0:
                sinks[name] = means and means | _vanished(means)
    normal = _intervene(subject, seen, at[BOS], _ordinary)
    return {"fractions": list(FRACTIONS), "sinks": sinks, "normal": normal and normal | _appeared(normal)}


def rotate(state: Tensor, goal: Tensor, fraction: float) -> Tensor:
    """(n, C) ``state`` rotated toward ``goal`` by a fraction of the angle between them, its norm kept.

    Spherical interpolation: |h| (cos(t a) u + sin(t a) v), u along the state and v the part of the goal across it.
    """
    h, g = state.double(), goal.double()
    length = h.norm(dim=-1, keepdim=True)
    u, g = h / length.clamp(min=1e-30), g / g.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    along = (u * g).sum(dim=-1, keepdim=True)
    across = g - along * u
    size = across.norm(dim=-1, keepdim=True)
    angle = fraction * torch.atan2(size, along)
    return (angle.cos() * h + angle.sin() * length * across / size.clamp(min=1e-30)).to(state.dtype)


def _sinks(name: str, batch: TokenStatistics) -> _Places:
    """The first outstanding token of every row with this label, toward any ordinary token."""
    first: dict[int, int] = {}
    for b, s in zip(*(index.tolist() for index in batch.where(name, outstanding=True)), strict=True):
        first.setdefault(b, s)
    return _places([(b, s) for b, s in first.items() if batch.ordinary[b].any()], batch.ordinary, batch.sinks)


def _ordinary(batch: TokenStatistics) -> _Places:
    """The ordinary token nearest to the middle of every row, among those that enough queries see; toward BOS."""
    found = []
    for b, (ordinary, valid) in enumerate(zip(batch.ordinary, batch.valid, strict=True)):
        length = int(valid.sum())
        places = [s for s in ordinary.nonzero().flatten().tolist() if length - s >= MIN_QUERIES]
        if places:
            found.append((b, min(places, key=lambda s: abs(2 * s - length))))
    bos = torch.zeros_like(batch.valid)
    bos[:, 0] = True
    sinks = torch.where(batch.sinks.any(dim=1, keepdim=True), batch.sinks, bos)  # without any BOS stands for them
    return _places(found, bos, sinks)


def _places(found: list[tuple[int, int]], goals: Tensor, sinks: Tensor) -> _Places:
    rows, positions = torch.tensor(found, dtype=torch.long).reshape(-1, 2).unbind(dim=1)
    others = sinks[rows]  # a copy
    others[torch.arange(len(rows)), positions] = False
    return _Places(rows, positions, goals[rows], others)


def _intervene(
    subject: Subject, seen: list[TokenStatistics], layer: int, find: Callable[[TokenStatistics], _Places]
) -> dict[str, Any] | None:
    """The table of the tokens that ``find`` gives, without a verdict; None without any or before the embeddings."""
    if layer < 0:
        return None
    rows = 0
    sums: dict[str, list[float]] = {}
    for batch, assembled in zip(seen, subject.batches(), strict=True):
        places = find(batch)
        if not len(places.rows):
            continue
        rows += len(places.rows)
        bos: list[Tensor] = []  # its untouched states, by layer
        for index, fraction in enumerate(FRACTIONS):
            for key, value in _measure(subject, assembled, layer, places, fraction, bos).items():
                sums.setdefault(key, [0.0] * len(FRACTIONS))[index] += value
    if not rows:
        return None
    means = {key: [value / rows for value in values] for key, values in sums.items()}
    return {"layer": layer, "rows": rows, "angle": means.pop("angle")[0], **means}


@torch.no_grad()
def _measure(
    subject: Subject, assembled: Assembled, layer: int, places: _Places, fraction: float, bos: list[Tensor]
) -> dict[str, float]:
    """Sums over the tokens at ``places`` from one forward with the input of layer ``layer`` + 1 rotated. The first one,
    with nothing rotated, notes the states of BOS in ``bos``."""
    rows, positions, others = places.rows, places.positions, places.others
    sums: dict[str, Tensor] = {}
    cosines: list[Tensor] = []  # (n,) by layer

    def intervene(number: int, states: Tensor) -> Tensor:
        b, s, goals = (index.to(states.device) for index in (rows, positions, places.goals))
        own = states[b, s]
        cosine = torch.nn.functional.cosine_similarity(own[:, None].double(), states[b].double(), dim=-1)
        best = cosine.masked_fill(~goals, -torch.inf).max(dim=1)
        sums["angle"] = best.values.clamp(-1, 1).acos().rad2deg()
        changed = states.clone()
        changed[b, s] = rotate(own, states[b, best.indices], fraction)
        return changed

    def compare(number: int, states: Tensor) -> None:
        b, s = rows.to(states.device), positions.to(states.device)
        if fraction == 0:
            bos.append(states[b, 0].float())
        goal = bos[number - layer]
        cosines.append(torch.nn.functional.cosine_similarity(states[b, s].float(), goal, dim=-1).cpu())

    later = range(layer, subject.layers - 1)
    taps = Tap("input", intervene, [layer]), Tap("output", compare, later)
    probe = measure(subject, assembled, *taps, **SINKS_AND_ACTIVATIONS)
    stats, activations = [probe.sinks[number] for number in later], probe.activations
    assert activations.median is not None
    rate = torch.stack([one.sink_rate(EPS, MIN_QUERIES) for one in stats]).cpu()
    received = torch.stack([one.mean_received.mean(dim=1) for one in stats]).mean(dim=0).cpu()
    size = activations.max_abs[layer:-1].cpu()[:, rows, positions]
    median = activations.median[layer:-1].cpu()[:, rows]
    sums |= {
        "activation": size.amax(dim=0),
        "log10_ratio": (size / median.clamp(min=1e-12)).amax(dim=0).log10(),
        "massive": is_massive(size, median).any(dim=0),
        "cosine": torch.stack(cosines).mean(dim=0),
        "sink_rate": rate[:, rows, positions].mean(dim=0),
        "received": received[rows, positions],
        "received_by_others": (received[rows] * others).sum(dim=1) / others.sum(dim=1).clamp(min=1),
    }
    return {key: float(value.double().sum()) for key, value in sums.items()}


def _vanished(means: dict[str, Any]) -> dict[str, bool | None]:
    size, rate = means["activation"], means["sink_rate"]
    return {
        "activation_vanished": size[-1] * TENFOLD < size[0] if means["massive"][0] >= HALF else None,
        "sink_vanished": rate[-1] < SINK_RATE if rate[0] >= SINK_RATE else None,
    }


def _appeared(means: dict[str, Any]) -> dict[str, bool]:
    size = means["activation"]
    drawn = [own >= HALF * by for own, by in zip(means["received"], means["received_by_others"], strict=True)]
    return {
        "activation_appeared": size[-1] > TENFOLD * size[0] and means["massive"][-1] >= HALF,
        "sink_appeared": drawn[-1] and not drawn[0],
    }
