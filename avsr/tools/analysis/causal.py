"""The causal test: does the direction of a token's state make it a sink with a massive activation?

Before the layer in which a massive activation is made, a sink's state is turned towards that of the nearest ordinary
token, and an ordinary token's towards BOS; its length stays. The rest of the network then runs on. Layers count from 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flashsink
from avsr.errors import UserError
from avsr.models.speech_llm import Assembled
from avsr.tools.analysis.collect import EPS, MIN_QUERIES
from avsr.tools.analysis.origin import trace_origin
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.tokens import (
    SINK_RATE,
    Seen,
    choose,
    input_of,
    is_massive,
    look,
    observing,
    stands_out,
    state_of,
)

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
TENFOLD = 10.0  # an activation vanishes below a tenth of itself and appears above ten times itself
HALF = 0.5  # of the rows, for what is said of all; of the attention of the row's sinks, for what draws like a sink


@dataclass
class _Places:
    """The tokens that are turned, one a row, and what they are turned towards."""

    rows: Tensor  # (n,) int64
    positions: Tensor  # (n,) int64
    goals: Tensor  # (n, S) bool, tokens of the same row; the nearest is the goal
    others: Tensor  # (n, S) bool, the row's other sinks


@dataclass
class _Sums:
    """Sums over rows, by fraction."""

    rows: int = 0
    angle: float = 0.0
    values: dict[str, Tensor] = field(default_factory=dict)  # (fractions,) float64

    def add(self, key: str, index: int, value: Tensor) -> None:
        total = self.values.setdefault(key, torch.zeros(len(FRACTIONS), dtype=torch.float64))
        total[index] += float(value.double().sum())

    def mean(self, key: str) -> list[float]:
        return [float(value) / self.rows for value in self.values[key]]


def causal_test(
    subject: Subject,
    seen: list[Seen] | None = None,
    origin: dict[str, Any] | None = None,
    layer: int | None = None,
) -> dict[str, Any]:
    """Turns the states of sinks and of ordinary tokens by fractions of the angle and measures what becomes of them.

    Args:
        subject: the model and its input, all of which is used.
        seen: what :func:`avsr.tools.analysis.tokens.look` gave for it; looked at anew without.
        origin: what :func:`avsr.tools.analysis.origin.trace_origin` gave for it, or for more rows (a label that it
            does not have is left out); traced anew without.
        layer: whose output is turned, 0 for the embeddings; default: for every label the layer before its origin, for
            ordinary tokens that of BOS.

    Returns:
        ``fractions``, ``sinks`` (by label, the first such token of every row; None for what the embedding brings along,
        as there is no layer before which to turn it) and ``normal`` (one table: the ordinary token nearest to the
        middle of every row; None when no row has one, or when the embedding makes BOS what it is).

        A table holds ``layer``, ``rows``, ``angle`` (mean, degrees) and by fraction the means over rows of
        ``activation`` (the largest |h| in the later layers), ``log10_ratio`` (the largest, to the median), ``massive``
        (share of rows), ``cosine`` (to the untouched BOS), ``sink_rate``, ``received`` (mean attention from the queries
        that see it) and ``received_by_others`` (the same of the row's other sinks, 0 without any). The last four are
        means over the later layers; layer L is never among them.

        Then the verdict on the whole turn. Sinks: ``activation_vanished`` (below a tenth) and ``sink_vanished`` (its
        rate is no sink's any more), None when it was not massive or no sink before. Ordinary tokens:
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
    seen = look(subject) if seen is None else seen
    origin = trace_origin(subject, seen) if origin is None else origin
    made = {name: table["layer"] - 1 for name, table in origin["tokens"].items()}
    names = [name for name in choose(subject, seen) if name in made and stands_out(seen, name)]
    with observing(subject):
        sinks: dict[str, Any] = {}
        for name in names:
            at = made[name] if layer is None else layer
            if at < 0:
                sinks[name] = None
                continue
            sums = _turn_all(subject, seen, at, partial(_sinks, name))
            if sums.rows:
                sinks[name] = _table(sums, at, vanish=True)
        at = made["BOS"] if layer is None else layer
        sums = _turn_all(subject, seen, at, _normal) if at >= 0 else _Sums()
    return {
        "fractions": list(FRACTIONS),
        "sinks": sinks,
        "normal": _table(sums, at, vanish=False) if sums.rows else None,
    }


def turned(state: Tensor, goal: Tensor, fraction: float) -> Tensor:
    """(n, C) ``state`` turned towards ``goal`` by a fraction of the angle between them, its length kept.

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


def _sinks(name: str, batch: Seen) -> _Places:
    """The first outstanding token of every row with this label, towards any ordinary token."""
    first: dict[int, int] = {}
    for b, s in zip(*(index.tolist() for index in batch.where(name, outstanding=True)), strict=True):
        first.setdefault(b, s)
    return _places([(b, s) for b, s in first.items() if batch.ordinary[b].any()], batch.ordinary, batch.sinks)


def _normal(batch: Seen) -> _Places:
    """The ordinary token nearest to the middle of every row, among those that enough queries see; towards BOS."""
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


def _turn_all(subject: Subject, seen: list[Seen], layer: int, find: Callable[[Seen], _Places]) -> _Sums:
    sums = _Sums()
    for batch, assembled in zip(seen, subject.batches(), strict=True):
        places = find(batch)
        if len(places.rows):
            sums.rows += len(places.rows)
            bos: list[Tensor] = []  # its untouched states, by layer
            for index, fraction in enumerate(FRACTIONS):
                _measure(_Turn(subject, layer, places, fraction, bos), assembled, sums, index)
    return sums


@dataclass
class _Turn:
    """One forward with turned states. The first one, with nothing turned, notes those of BOS."""

    subject: Subject
    layer: int
    places: _Places
    fraction: float
    bos: list[Tensor]
    cosines: list[Tensor] = field(default_factory=list)  # (n,) by layer
    angle: float = 0.0  # sum over tokens

    def hooks(self, stack: ExitStack) -> None:
        layers = self.subject.decoder.layers
        stack.callback(layers[self.layer].register_forward_pre_hook(self.turn, with_kwargs=True).remove)
        for number in range(self.layer, len(layers)):
            stack.callback(layers[number].register_forward_hook(self.compare).remove)

    def turn(self, module: Any, args: Any, kwargs: Any) -> Any:
        states = input_of(args, kwargs)
        places = self.places
        rows, positions, goals = (index.to(states.device) for index in (places.rows, places.positions, places.goals))
        own = states[rows, positions]
        cosine = torch.nn.functional.cosine_similarity(own[:, None].double(), states[rows].double(), dim=-1)
        best = cosine.masked_fill(~goals, -torch.inf).max(dim=1)
        self.angle = float(best.values.clamp(-1, 1).acos().rad2deg().sum())
        changed = states.clone()
        changed[rows, positions] = turned(own, states[rows, best.indices], self.fraction)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def compare(self, module: Any, args: Any, output: Any) -> None:
        states = state_of(output)
        rows, positions = self.places.rows.to(states.device), self.places.positions.to(states.device)
        if self.fraction == 0:
            self.bos.append(states[rows, 0].float())
        goal = self.bos[len(self.cosines)]
        self.cosines.append(torch.nn.functional.cosine_similarity(states[rows, positions].float(), goal, dim=-1).cpu())


def _measure(turn: _Turn, assembled: Assembled, sums: _Sums, index: int) -> None:
    """One forward, added to ``sums``."""
    subject, rows, positions = turn.subject, turn.places.rows, turn.places.positions
    probe = flashsink.attach(subject.lm, attention=True, decorrelation=False, activations=True, median=True)
    try:
        with ExitStack() as stack:
            turn.hooks(stack)
            subject.forward(assembled)
        later = slice(turn.layer, subject.layers - 1)
        rate = torch.stack([stats.sink_rate(EPS, MIN_QUERIES) for stats in probe.sinks[later]]).cpu()
        received = torch.stack([stats.mean_received.mean(dim=1) for stats in probe.sinks[later]]).mean(dim=0).cpu()
        activations = probe.activations
    finally:
        probe.detach()
    assert activations.median is not None
    size = activations.max_abs[later].cpu()[:, rows, positions]
    median = activations.median[later].cpu()[:, rows]
    sums.add("activation", index, size.amax(dim=0))
    sums.add("log10_ratio", index, (size / median.clamp(min=1e-12)).amax(dim=0).log10())
    sums.add("massive", index, is_massive(size, median).any(dim=0))
    sums.add("cosine", index, torch.stack(turn.cosines[: size.shape[0]]).mean(dim=0))
    sums.add("sink_rate", index, rate[:, rows, positions].mean(dim=0))
    others = turn.places.others
    sums.add("received", index, received[rows, positions])
    sums.add("received_by_others", index, (received[rows] * others).sum(dim=1) / others.sum(dim=1).clamp(min=1))
    if index == 0:
        sums.angle += turn.angle


def _table(sums: _Sums, layer: int, vanish: bool) -> dict[str, Any]:
    table = {key: sums.mean(key) for key in sums.values}
    size, massive, rate, received = (table[key] for key in ("activation", "massive", "sink_rate", "received"))
    if vanish:
        verdict = {
            "activation_vanished": size[-1] * TENFOLD < size[0] if massive[0] >= HALF else None,
            "sink_vanished": rate[-1] < SINK_RATE if rate[0] >= SINK_RATE else None,
        }
    else:
        drawn = [own >= HALF * other for own, other in zip(received, table["received_by_others"], strict=True)]
        verdict = {
            "activation_appeared": size[-1] > TENFOLD * size[0] and massive[-1] >= HALF,
            "sink_appeared": drawn[-1] and not drawn[0],
        }
    return {"layer": layer, "rows": sums.rows, "angle": sums.angle / sums.rows, **table, **verdict}
