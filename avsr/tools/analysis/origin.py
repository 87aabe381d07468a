"""Where massive activations come from: which layer, which block, which hidden units of which MLP.

A pre-norm decoder layer adds to the residual stream twice: h[l] = h[l-1] + attention + mlp. Followed at one feature f,
the massive one, the largest of these terms or of the embedding h[0] is the origin. In the MLP it is a sum over hidden
units u, sum_u W_down[f, u] * act(gate[u]) * up[u]. C hidden size, I units of an MLP, L layers; layers count from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from avsr.errors import UserError
from avsr.tools.analysis.statistics import TokenStatistics, choose_labels, measure_tokens, stands_out
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.walk import Tap, run

TOP = 4  # units that are listed
_ROUNDINGS = 4  # that an addition may be off, in units of the dtype's epsilon
_VALUES = ("gate", "activated", "up", "product", "gate_positive")


class Untraceable(UserError):
    """A decoder in whose layers the origin of a value cannot be followed."""


@dataclass
class _Target:
    """One label: its feature f and the tokens to follow, of all batches."""

    name: str
    outstanding: bool  # whether only the tokens that stand out are followed
    feature: int
    counts: dict[str, int]

    def where(self, batch: TokenStatistics) -> tuple[Tensor, Tensor]:
        """(n,) rows and (n,) positions of the tokens to follow."""
        return batch.where(self.name, outstanding=self.outstanding)


def trace_origin(subject: Subject, seen: list[TokenStatistics] | None = None) -> dict[str, Any]:
    """Follows BOS, the opener and every token that is a sink or massive to where its massive activation is made.

    Args:
        subject: the model and its input.
        seen: what :func:`avsr.tools.analysis.statistics.measure_tokens` gave for it; measured anew without.

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
    seen = measure_tokens(subject) if seen is None else seen
    targets = [_target(name, seen) for name in choose_labels(subject, seen)]
    added = _follow(subject, seen, targets)
    tables = [_steps(target, {key: mean[i] for key, mean in added.items()}) for i, target in enumerate(targets)]
    insides = _insides(subject, seen, targets, [table["inside"]["layer"] for table in tables])
    for table, inside in zip(tables, insides, strict=True):
        table["inside"].update(inside)
    return {"layers": subject.layers, "tokens": {t.name: table for t, table in zip(targets, tables, strict=True)}}


def _target(name: str, seen: list[TokenStatistics]) -> _Target:
    target = _Target(name, stands_out(seen, name), 0, {"count": 0, "sinks": 0, "massive": 0, "traced": 0})
    features: Counter[int] = Counter()
    for batch in seen:
        rows, places = target.where(batch)
        peak = batch.max_abs[: batch.inner, rows, places].argmax(dim=0)
        features.update(batch.feature[peak, rows, places].tolist())
        everywhere = batch.where(name, outstanding=False)
        target.counts["count"] += len(everywhere[0])
        target.counts["sinks"] += int(batch.sinks[everywhere].sum())
        target.counts["massive"] += int(batch.massive[everywhere].sum())
        target.counts["traced"] += len(rows)
    target.feature = features.most_common(1)[0][0]
    return target


def _follow(subject: Subject, seen: list[TokenStatistics], targets: Sequence[_Target]) -> dict[str, Tensor]:
    """The mean values at the targets' features: "embedding" (targets, 1), and by layer "residual" (the value after it),
    "attention" and "mlp" (what they added) (targets, L); float64.

    Raises:
        Untraceable: in the first batch a layer's output is not its input with what attention and MLP gave, up to
            rounding: so with norms after the blocks or with scaled residuals.
    """
    points = {"embedding": "input", "residual": "output", "attention": "attention", "mlp": "mlp"}
    sums = {
        key: torch.zeros(len(targets), 1 if key == "embedding" else subject.layers, dtype=torch.float64)
        for key in points
    }

    def add(key: str, index: Sequence[Tensor], target: Tensor, layer: int, states: Tensor) -> None:
        values = states[tuple(place.to(states.device) for place in index)]
        sums[key][:, layer].index_add_(0, target, values.double().cpu())

    checks = _check_additions(subject, seen[0].valid)
    for batch, rows in zip(seen, subject.batches(), strict=True):
        found = [target.where(batch) for target in targets]
        target = torch.arange(len(targets)).repeat_interleave(torch.tensor([len(places) for places, _ in found]))
        features = torch.tensor([t.feature for t in targets])[target]
        index = torch.cat([b for b, _ in found]), torch.cat([s for _, s in found]), features
        taps = [
            Tap(point, partial(add, key, index, target), [0] if key == "embedding" else None)
            for key, point in points.items()
        ]
        run(subject, rows, *checks, *taps)
        checks = []
    traced = torch.tensor([[target.counts["traced"]] for target in targets])
    return {key: total / traced for key, total in sums.items()}


def _check_additions(subject: Subject, valid: Tensor) -> list[Tap]:
    """Taps for one batch that raise :class:`Untraceable` at a layer that does not just add; ``valid`` (B, S)."""
    terms: list[Tensor] = []

    def begin(layer: int, states: Tensor) -> None:
        terms[:] = [states.double()]

    def add(layer: int, states: Tensor) -> None:
        terms.append(states.double())

    def check(layer: int, states: Tensor) -> None:
        size = sum(term.norm(dim=-1) for term in terms)
        missed = (states.double() - sum(terms)).norm(dim=-1)
        if bool((missed > _ROUNDINGS * torch.finfo(states.dtype).eps * size)[valid.to(states.device)].any()):
            raise Untraceable(
                f"{type(subject.decoder).__name__}: layer {layer + 1} does not just add attention and MLP to its input"
            )

    return [Tap("input", begin), Tap("attention", add), Tap("mlp", add), Tap("output", check)]


def _steps(target: _Target, added: dict[str, Tensor]) -> dict[str, Any]:
    """The table of a label without the inside of its MLP; ``added`` as :func:`_follow` gives it, for one target."""
    residual = added["residual"]
    peak = int(residual[: max(len(residual) - 1, 1)].abs().argmax())
    sign = 1.0 if residual[peak] >= 0 else -1.0
    terms = {key: sign * added[key][: peak + 1] for key in ("embedding", "attention", "mlp")}
    block = max(terms, key=lambda name: float(terms[name].max()))
    at = int(terms[block].argmax())
    return {
        **target.counts,
        "feature": target.feature,
        "peak_layer": peak + 1,
        "embedding": float(added["embedding"]),
        **{key: added[key].tolist() for key in ("residual", "attention", "mlp")},
        "layer": 0 if block == "embedding" else at + 1,
        "block": block,
        "step": float(added[block][at]),
        "inside": {"layer": int(terms["mlp"].argmax()) + 1},
    }


class _Units:
    """Means over tokens of what an MLP's units did, each (I,) float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], rows: Tensor, places: Tensor) -> None:
        self.tokens += len(rows)
        for key, value in values.items():
            total = value[rows.to(value.device), places.to(value.device)].double().sum(dim=0).cpu()
            self._sums[key] = self._sums[key] + total if key in self._sums else total

    def mean(self, key: str) -> Tensor:
        return self._sums[key] / max(self.tokens, 1)

    def at(self, unit: int) -> dict[str, float]:
        return {key: float(self.mean(key)[unit]) for key in _VALUES}


def _insides(
    subject: Subject, seen: list[TokenStatistics], targets: Sequence[_Target], layers: list[int]
) -> list[dict[str, Any]]:
    """The units of layer ``layers[i]`` that write to the feature of ``targets[i]``."""
    mine = [_Units() for _ in targets]
    ordinary = {layer: _Units() for layer in layers}
    mlps = {layer: subject.decoder.layers[layer - 1].mlp for layer in layers}
    held: dict[str, Tensor] = {}

    def keep(key: str, layer: int, values: Tensor) -> None:
        held[key] = values

    def reduce(batch: TokenStatistics, number: int, product: Tensor) -> None:
        layer, gate, up = number + 1, held.pop("gate"), held.pop("up")
        values = dict(zip(_VALUES, (gate, mlps[layer].act_fn(gate), up, product, gate > 0), strict=True))
        ordinary[layer].add(values, *batch.ordinary.nonzero(as_tuple=True))
        for target, units, own in zip(targets, mine, layers, strict=True):
            if own == layer:
                units.add(values, *target.where(batch))

    numbers = [layer - 1 for layer in mlps]
    for batch, rows in zip(seen, subject.batches(), strict=True):
        taps = [Tap(key, partial(keep, key), numbers) for key in ("gate", "up")]
        run(subject, rows, *taps, Tap("product", partial(reduce, batch), numbers))
    found = []
    for target, units, layer in zip(targets, mine, layers, strict=True):
        like = rows.embeddings.new_zeros(1, len(units.mean("gate")))
        down = _row_of(mlps[layer].down_proj, target.feature, like)
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
    listed = [
        {
            "unit": unit,
            **units.at(unit),
            "down": float(down[unit]),
            "contribution": float(contribution[unit]),
            "share": float(contribution[unit]) / total if total else 0.0,
            "ordinary": ordinary.at(unit) if ordinary.tokens else None,
        }
        for unit in contribution.abs().topk(min(TOP, len(down))).indices.tolist()
    ]
    return {"sum": total, "ordinary_tokens": ordinary.tokens, "units": listed}
