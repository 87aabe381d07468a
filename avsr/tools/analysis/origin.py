"""Where massive activations come from: which layer, which block, which hidden units of which MLP.

A pre-norm decoder layer adds to the residual twice: h[l] = h[l-1] + attention + mlp. Followed at one feature f, the
massive one, the largest of these terms or of the embedding h[0] is the origin. In the MLP it is a sum over hidden
units u, sum_u W_down[f, u] * act(gate[u]) * up[u]. C hidden size, I units of an MLP, L layers; layers count from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from avsr.errors import UserError
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.tokens import Seen, choose, input_of, look, observing, stands_out, state_of

TOP = 4  # units that are listed
_ROUNDINGS = 4  # that an addition may be off, in units of the dtype's epsilon
_VALUES = ("gate", "activated", "up", "product", "gate_positive")


class Untraceable(UserError):
    """A decoder in whose layers the origin of a value cannot be followed."""


@dataclass
class _Target:
    """One label: its feature f and what was found there."""

    name: str
    outstanding: bool  # whether only the tokens that stand out are followed
    feature: int
    counts: dict[str, int]
    added: dict[str, Tensor] = field(default_factory=dict)  # by "residual", "attention", "mlp": (L,) float64


def trace_origin(subject: Subject, seen: list[Seen] | None = None) -> dict[str, Any]:
    """Follows BOS, the opener and every token that is a sink or massive to where its massive activation is made.

    Args:
        subject: the model and its input.
        seen: what :func:`avsr.tools.analysis.tokens.look` gave for it; looked at anew without.

    Returns:
        ``layers`` and ``tokens``. By label: ``count``, ``sinks`` and ``massive`` (numbers of tokens), ``traced`` (the
        tokens that the means are taken over: those that stand out, or all when none does), ``feature`` (the most
        frequent place of their largest |h|), ``peak_layer`` (of the value at it), ``embedding`` (the mean value at the
        feature before layer 1), ``residual``, ``attention`` and ``mlp`` (by layer: the mean value after it and what its
        blocks added), ``layer``, ``block`` and ``step`` (the largest addition up to the peak, of the peak's sign; layer
        0 and "embedding" when that is the value before layer 1).

        And ``inside``: of the MLP that added most its ``layer``, the ``sum`` over its units (without a bias), the
        number of ``ordinary_tokens``, and the 4 ``units`` that add most, each with its ``contribution`` = ``product`` *
        ``down`` (the weight W_down[f, unit]), its ``share`` of the sum, the means over the traced tokens of ``gate``
        (before the activation function), ``activated``, ``up`` and ``product``, the share of tokens with
        ``gate_positive``, and under ``ordinary`` the same means over tokens that do not stand out (None without any).

    Raises:
        Untraceable: the MLPs are not gated ones, or a layer does not just add attention and MLP to its input.
    """
    if any(not hasattr(getattr(layer, "mlp", None), "gate_proj") for layer in subject.decoder.layers):
        raise Untraceable(f"{type(subject.decoder).__name__}: expected MLPs with gate_proj, up_proj and down_proj")
    _check_additions(subject)
    seen = look(subject) if seen is None else seen
    targets = [_target(name, seen) for name in choose(subject, seen)]
    with observing(subject):
        embedding = _follow(subject, seen, targets)
        tables = [_steps(target, embedding[i]) for i, target in enumerate(targets)]
        insides = _insides(subject, seen, targets, [table["inside"]["layer"] for table in tables])
    for table, inside in zip(tables, insides, strict=True):
        table["inside"].update(inside)
    return {"layers": subject.layers, "tokens": {t.name: table for t, table in zip(targets, tables, strict=True)}}


def _check_additions(subject: Subject) -> None:
    """Raises :class:`Untraceable` unless in the first batch every layer's output is its input with what attention and
    MLP gave, up to rounding: not so with norms behind the blocks or with scaled residuals."""
    terms: list[Tensor] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        terms[:] = [input_of(args, kwargs).double()]

    def add(module: Any, args: Any, output: Any) -> None:
        terms.append(state_of(output).double())

    def leave(number: int, module: Any, args: Any, output: Any) -> None:
        state = state_of(output)
        size = sum(term.norm(dim=-1) for term in terms)
        missed = (state.double() - sum(terms)).norm(dim=-1)
        if bool((missed > _ROUNDINGS * torch.finfo(state.dtype).eps * size)[valid].any()):
            raise Untraceable(
                f"{type(subject.decoder).__name__}: layer {number} does not just add attention and MLP to its input"
            )

    with ExitStack() as stack, observing(subject):
        for number, layer in enumerate(subject.decoder.layers, 1):
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module in (layer.self_attn, layer.mlp):
                stack.callback(module.register_forward_hook(add).remove)
            stack.callback(layer.register_forward_hook(partial(leave, number)).remove)
        rows = next(iter(subject.batches()))
        valid = rows.mask.bool()
        subject.forward(rows)


def _target(name: str, seen: list[Seen]) -> _Target:
    outstanding = stands_out(seen, name)
    features: Counter[int] = Counter()
    counts = {"count": 0, "sinks": 0, "massive": 0, "traced": 0}
    for batch in seen:
        rows, places = batch.where(name, outstanding=outstanding)
        peak = batch.size[: batch.inner, rows, places].argmax(dim=0)
        features.update(batch.feature[peak, rows, places].tolist())
        everywhere = batch.where(name, outstanding=False)
        counts["count"] += len(everywhere[0])
        counts["sinks"] += int(batch.sinks[everywhere].sum())
        counts["massive"] += int(batch.massive[everywhere].sum())
        counts["traced"] += len(rows)
    return _Target(name, outstanding, features.most_common(1)[0][0], counts)


def _follow(subject: Subject, seen: list[Seen], targets: Sequence[_Target]) -> list[float]:
    """Fills ``targets[i].added`` with means; returns the mean embedding values at their features."""
    sums = {
        key: torch.zeros(len(targets), subject.layers, dtype=torch.float64) for key in ("layer", "attention", "mlp")
    }
    first = torch.zeros(len(targets), dtype=torch.float64)
    where: list[Tensor] = []  # rows, positions, features and target of the tokens of the batch at hand

    def values(states: Tensor) -> Tensor:
        rows, places, features, _ = (index.to(states.device) for index in where)
        return states[rows, places, features].double().cpu()

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        first.index_add_(0, where[3], values(input_of(args, kwargs)))

    def add(key: str, layer: int, module: Any, args: Any, output: Any) -> None:
        sums[key][:, layer].index_add_(0, where[3], values(state_of(output)))

    with ExitStack() as stack:
        layers = subject.decoder.layers
        stack.callback(layers[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        for number, layer in enumerate(layers):
            for key, module in (("layer", layer), ("attention", layer.self_attn), ("mlp", layer.mlp)):
                stack.callback(module.register_forward_hook(partial(add, key, number)).remove)
        for batch, rows in zip(seen, subject.batches(), strict=True):
            found = [batch.where(target.name, outstanding=target.outstanding) for target in targets]
            lengths = torch.tensor([len(places) for places, _ in found])
            target = torch.arange(len(targets)).repeat_interleave(lengths)
            features = torch.tensor([t.feature for t in targets])[target]
            where[:] = torch.cat([b for b, _ in found]), torch.cat([s for _, s in found]), features, target
            subject.forward(rows)
    for i, t in enumerate(targets):
        means = {key: total[i] / t.counts["traced"] for key, total in sums.items()}
        t.added = {"residual": means["layer"], "attention": means["attention"], "mlp": means["mlp"]}
    return [float(first[i]) / t.counts["traced"] for i, t in enumerate(targets)]


def _steps(target: _Target, embedding: float) -> dict[str, Any]:
    residual = target.added["residual"]
    inner = residual[: max(len(residual) - 1, 1)]
    peak = int(inner.abs().argmax())
    sign = 1.0 if inner[peak] >= 0 else -1.0
    added = {"embedding": torch.tensor([embedding], dtype=torch.float64)}
    added |= {block: target.added[block][: peak + 1] for block in ("attention", "mlp")}
    block = max(added, key=lambda name: float((sign * added[name]).max()))
    at = int((sign * added[block]).argmax())
    return {
        **target.counts,
        "feature": target.feature,
        "peak_layer": peak + 1,
        "embedding": embedding,
        **{key: value.tolist() for key, value in target.added.items()},
        "layer": 0 if block == "embedding" else at + 1,
        "block": block,
        "step": float(added[block][at]),
        "inside": {"layer": int((sign * added["mlp"]).argmax()) + 1},
    }


@dataclass
class _Units:
    """Sums over tokens of what an MLP's units did."""

    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # (I,) float64

    def add(self, values: dict[str, Tensor], rows: Tensor, places: Tensor) -> None:
        self.tokens += len(rows)
        for key, value in values.items():
            total = value[rows.to(value.device), places.to(value.device)].double().sum(dim=0).cpu()
            self.sums[key] = self.sums[key] + total if key in self.sums else total

    def mean(self, key: str) -> Tensor:
        return self.sums[key] / max(self.tokens, 1)


def _insides(subject: Subject, seen: list[Seen], targets: Sequence[_Target], layers: list[int]) -> list[dict[str, Any]]:
    """The units of layer ``layers[i]`` that write to the feature of ``targets[i]``."""
    mine = [_Units() for _ in targets]
    ordinary = {layer: _Units() for layer in layers}
    held: dict[str, Tensor] = {}
    current: list[Seen] = []

    def keep(key: str, module: Any, args: Any, output: Tensor) -> None:
        held[key] = output

    def reduce(layer: int, mlp: Any, module: Any, args: Any) -> None:
        batch, gate = current[0], held["gate"]
        values = dict(zip(_VALUES, (gate, mlp.act_fn(gate), held["up"], args[0], gate > 0), strict=True))
        held.clear()
        ordinary[layer].add(values, *batch.ordinary.nonzero(as_tuple=True))
        for target, units, own in zip(targets, mine, layers, strict=True):
            if own == layer:
                units.add(values, *batch.where(target.name, outstanding=target.outstanding))

    with ExitStack() as stack:
        for layer in ordinary:
            mlp = subject.decoder.layers[layer - 1].mlp
            stack.callback(mlp.gate_proj.register_forward_hook(partial(keep, "gate")).remove)
            stack.callback(mlp.up_proj.register_forward_hook(partial(keep, "up")).remove)
            stack.callback(mlp.down_proj.register_forward_pre_hook(partial(reduce, layer, mlp)).remove)
        for batch, rows in zip(seen, subject.batches(), strict=True):
            current[:] = [batch]
            subject.forward(rows)
    dtype, device = rows.embeddings.dtype, rows.embeddings.device
    found = []
    for target, units, layer in zip(targets, mine, layers, strict=True):
        like = torch.zeros(1, len(units.sums["gate"]), dtype=dtype, device=device)
        down = _row_of(subject.decoder.layers[layer - 1].mlp.down_proj, target.feature, like)
        found.append(_strongest(units, ordinary[layer], down))
    return found


def _row_of(linear: Any, feature: int, like: Tensor) -> Tensor:
    """(I,) float64 row ``feature`` of a linear module's matrix, adapters included: the gradient of that output with
    respect to the (1, I) input ``like``."""
    with torch.enable_grad():
        x = like.requires_grad_()
        (row,) = torch.autograd.grad(linear(x)[0, feature], x)
    return row[0].double().cpu()


def _strongest(units: _Units, ordinary: _Units, down: Tensor) -> dict[str, Any]:
    contribution = units.mean("product") * down
    total = float(contribution.sum())
    listed = []
    for unit in contribution.abs().topk(min(TOP, len(down))).indices.tolist():
        listed.append(
            {
                "unit": unit,
                **{key: float(units.mean(key)[unit]) for key in _VALUES},
                "down": float(down[unit]),
                "contribution": float(contribution[unit]),
                "share": float(contribution[unit]) / total if total else 0.0,
                "ordinary": {key: float(ordinary.mean(key)[unit]) for key in _VALUES} if ordinary.tokens else None,
            }
        )
    return {"sum": total, "ordinary_tokens": ordinary.tokens, "units": listed}
