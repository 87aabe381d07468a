"""Whether all sinks carry their massive activations in one fixed set of features, that of BOS.

C hidden size, L layers; layers count from 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import comb
from typing import Any

import torch
from torch import Tensor

from avsr.errors import UserError
from avsr.tools.analysis.groups import BOS
from avsr.tools.analysis.statistics import TokenStatistics, choose_labels, is_massive, measure_tokens
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.walk import Tap, run

COMMON = 0.5  # a feature belongs to a label's set when it is massive in more than this share of its tokens


@dataclass
class _Label:
    tokens: int = 0
    features: Counter[int] = field(default_factory=Counter)  # in how many tokens it is massive
    values: dict[int, float] = field(default_factory=dict)  # sum of the signed values there
    identical: int = 0  # tokens with exactly the set of their row's BOS, which is not empty
    jaccard: float = 0.0  # sum over tokens
    cosine: float = 0.0

    def add(self, state: Tensor, bos: Tensor, median: Tensor) -> None:
        """One token: its state and that of its row's BOS, both (C,)."""
        features, of_bos = (set(is_massive(h.abs(), median).nonzero().flatten().tolist()) for h in (state, bos))
        self.tokens += 1
        self.features.update(features)
        for feature in features:
            self.values[feature] = self.values.get(feature, 0.0) + float(state[feature])
        self.identical += bool(features) and features == of_bos
        self.jaccard += len(features & of_bos) / max(len(features | of_bos), 1)  # empty sets share nothing
        self.cosine += float(torch.nn.functional.cosine_similarity(state, bos, dim=0))

    @property
    def common(self) -> set[int]:
        return {feature for feature, count in self.features.items() if count > COMMON * self.tokens}


def feature_sets(
    subject: Subject, seen: list[TokenStatistics] | None = None, layer: int | None = None
) -> dict[str, Any]:
    """Compares the massive features of every token that is a sink or massive to those of its row's BOS.

    A token's set holds the features with |h_f| at least 1000 times the median |h| of its row and above 100.

    Args:
        subject: the model and its input.
        seen: what :func:`avsr.tools.analysis.statistics.measure_tokens` gave for it; measured anew without.
        layer: whose output is examined; default: where the massive tokens other than BOS are largest on average (BOS
            when there are no others).

    Returns:
        ``layer``, ``hidden`` (C), ``bos`` (its common set, sorted), ``tokens``, ``same`` (whether the common set of
        every label is that of BOS and not empty) and ``same_massive`` (the same of the labels with a set that is not
        empty); both None when there is no such label but BOS.

        By label: ``count`` (tokens that stand out), ``features`` (``feature``, ``count`` of the tokens in which it is
        massive, mean signed ``value``), ``common`` (those of more than half of them), ``identical`` (tokens with
        exactly the set of their BOS, which is not empty), ``jaccard`` and ``cosine`` (means, to BOS) and ``p_value``
        (of the overlap of the common sets when the label's features are drawn at random from C, see :func:`overlap_p`;
        None for BOS).

    Raises:
        UserError: there is no such layer.
    """
    if layer is not None and not 1 <= layer <= subject.layers:
        raise UserError(f"layer: expected 1 to {subject.layers}, got {layer}")
    seen = measure_tokens(subject) if seen is None else seen
    at = _peak(seen) if layer is None else layer
    labels, hidden = _collect(subject, seen, at)
    bos = labels[BOS].common
    others = [label.common for name, label in labels.items() if name != BOS]
    return {
        "layer": at,
        "hidden": hidden,
        "bos": sorted(bos),
        "tokens": {name: _table(name, label, bos, hidden) for name, label in labels.items()},
        "same": _all_are(bos, others),
        "same_massive": _all_are(bos, [common for common in others if common]),
    }


def overlap_p(total: int, first: int, second: int, shared: int) -> float:
    """P(X >= shared) where X counts the common elements of a fixed set of ``first`` and a random one of ``second``
    out of ``total``: the upper tail of the hypergeometric distribution."""
    ways = sum(comb(first, k) * comb(total - first, second - k) for k in range(max(shared, 0), min(first, second) + 1))
    return ways / comb(total, second)


def _peak(seen: list[TokenStatistics]) -> int:
    """The layer, from 1, in which the massive tokens other than BOS are largest on average, or BOS without any."""
    total = torch.zeros(seen[0].inner, dtype=torch.float64)
    bos = torch.zeros_like(total)
    for batch in seen:
        found = batch.massive.clone()
        found[:, 0] = False
        total += batch.max_abs[: batch.inner, found].double().sum(dim=1)
        bos += batch.max_abs[: batch.inner, :, 0].double().sum(dim=1)
    return int((total if float(total.max()) > 0 else bos).argmax()) + 1


def _collect(subject: Subject, seen: list[TokenStatistics], layer: int) -> tuple[dict[str, _Label], int]:
    """What stands out, by label, and C. BOS is always among it."""
    labels = {name: _Label() for name in choose_labels(subject, seen)}
    held: list[Tensor] = []
    for batch, rows in zip(seen, subject.batches(), strict=True):
        run(subject, rows, Tap("output", lambda _, states: held.append(states), [layer - 1]))
        states, median = held.pop(), batch.median[layer - 1]
        for name, label in labels.items():
            places = batch.where(name, outstanding=name != BOS)
            for b, s in zip(*(index.tolist() for index in places), strict=True):
                bos, state = states[b, [0, s]].float().cpu()
                label.add(state, bos, median[b])
    return {name: label for name, label in labels.items() if label.tokens}, int(states.shape[-1])


def _table(name: str, label: _Label, bos: set[int], hidden: int) -> dict[str, Any]:
    common = label.common
    return {
        "count": label.tokens,
        "features": [
            {"feature": feature, "count": count, "value": label.values[feature] / count}
            for feature, count in label.features.most_common()
        ],
        "common": sorted(common),
        "identical": label.identical,
        "jaccard": label.jaccard / label.tokens,
        "cosine": label.cosine / label.tokens,
        "p_value": None if name == BOS else overlap_p(hidden, len(bos), len(common), len(bos & common)),
    }


def _all_are(bos: set[int], others: list[set[int]]) -> bool | None:
    return bool(bos) and all(common == bos for common in others) if others else None
