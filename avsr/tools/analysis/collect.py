"""Measures a subject over all its rows and averages by token group and layer.

Groups of positions: BOS, every delimiter and every prompt token by name, all speech tokens, all text tokens. In plain
text the strongest sinks among the tokens stand alone, by name. "Intermediate" is the delimiter that opens the first
stream, else the first prompt token, in plain text the strongest token. "Strongest" is the drawn group other than BOS
with the largest sink rate over layers 1..L-1. Layers count from 1; L is their number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avsr.runtime.progress import ProgressBar
from avsr.tools.analysis.groups import BOS, PROMPT, TEXT, GroupSums, group_of, mean_over_layers
from avsr.tools.analysis.statistics import (
    EPS,
    MIN_QUERIES,
    TextStatistics,
    TokenStatistics,
    is_massive,
    measure_batch,
)
from avsr.tools.analysis.subject import Subject, select_rows

if TYPE_CHECKING:
    from avsr.models.rows import Assembled

POSITIONS = 64  # leading positions with rates of their own
STRONGEST = 4  # text tokens that stand alone;
RARE = 3  # they are counted that often at least; and
SHOWN_PROMPT = 3  # prompt tokens that are drawn
PER_TOKEN = ("sink_rate_text", "cosine", "max_abs", "value_norm", "log10_ratio")
PER_COUNTED = ("sink_rate_corrected", "received", "received_value")
_RATES = ("sink_rate", "sink_rate_text", "sink_rate_corrected")


@dataclass
class _Massive:
    """The largest of some massive activations, and their number."""

    token: str = ""
    value: float = 0.0
    log10_ratio: float = 0.0
    count: int = 0

    def add(self, other: _Massive) -> None:
        if other.value > self.value:
            self.token, self.value, self.log10_ratio = other.token, other.value, other.log10_ratio
        self.count += other.count


@dataclass
class _Totals:
    """What is kept of all batches."""

    layers: int
    groups: GroupSums = field(default_factory=GroupSums)
    massive: dict[tuple[str, int, int], _Massive] = field(default_factory=dict)  # by group, layer (from 1) and feature
    massive_tokens: int = 0
    largest: dict[int, dict[str, Any]] = field(default_factory=dict)  # by layer, from 0
    queries: int = 0
    decorrelation: float = 0.0
    span_tokens: int = 0
    positions: Tensor = field(default_factory=lambda: torch.zeros(5, POSITIONS, dtype=torch.float64))


def collect(subject: Subject) -> tuple[dict[str, Any], Assembled]:
    """All statistics of ``subject``, plain numbers ready for JSON, and one row of middle length as an example."""
    totals = _Totals(subject.layers)
    example: Assembled | None = None
    done = 0
    with ProgressBar("analyze", subject.count) as bar:
        for rows in subject.batches():
            words = not subject.opener and bool((rows.spans == 1).all())  # plain text
            _add(totals, rows, *measure_batch(subject, rows), words=words)
            done += len(rows.names)
            if example is None and 2 * done >= subject.count:
                example = select_rows(rows, [len(rows.names) // 2])
            bar.advance(len(rows.names))
    assert example is not None
    return _result(totals, subject, done), example


def _add(totals: _Totals, rows: Assembled, tokens: TokenStatistics, text: TextStatistics, *, words: bool) -> None:
    valid = tokens.valid
    spans = rows.spans.tolist()
    names = [name for row in rows.names for name in row]
    groups = [
        group_of(name, position, span, words)
        for row, span in zip(rows.names, spans, strict=True)
        for position, name in enumerate(row)
    ]
    places = totals.groups.places(groups)
    ratio = torch.log10(tokens.max_abs.clamp(min=1e-12) / tokens.median[..., None].clamp(min=1e-12))
    by_token = {
        "sink_rate": tokens.sink_rate,
        "sink_rate_text": text.sink_rate_text,
        "cosine": text.cosine,
        "max_abs": tokens.max_abs,
        "value_norm": text.value_norm,
        "log10_ratio": ratio,
        "mass": text.mass,
        "sink_rate_corrected": text.sinks.float().mean(dim=2),
        "received": text.received * text.counted,
        "received_value": text.received_value * text.counted,
    }
    totals.groups.add("tokens", places, torch.ones(len(places)))
    totals.groups.add("counted", places, text.counted[valid].double())
    totals.groups.add("counted_raw", places, text.counted_raw[valid].double())
    totals.groups.add("heads", places, text.sinks.permute(1, 3, 0, 2)[valid])
    for key, values in by_token.items():
        totals.groups.add(key, places, values.permute(1, 2, 0)[valid])
    totals.queries += len(names) - sum(spans)
    totals.decorrelation += text.decorrelation * text.count
    totals.span_tokens += text.count
    _add_positions(totals, tokens, text)
    _add_massive(totals, tokens, ratio, groups, names)
    _keep_largest(totals.largest, tokens, ratio, rows.names)


def _add_positions(totals: _Totals, tokens: TokenStatistics, text: TextStatistics) -> None:
    here = min(tokens.valid.shape[1], POSITIONS)
    corrected = text.sinks.float().mean(dim=(0, 2))
    raw = tokens.sink_rate.mean(dim=0)
    kept = (tokens.valid, text.counted_raw, raw * text.counted_raw, text.counted, corrected * text.counted)
    for row, values in enumerate(kept):
        totals.positions[row, :here] += values.double().sum(dim=0)[:here]


def _add_massive(totals: _Totals, tokens: TokenStatistics, ratio: Tensor, groups: list[str], names: list[str]) -> None:
    found = is_massive(tokens.max_abs, tokens.median[..., None])[:, tokens.valid]  # (L, tokens)
    totals.massive_tokens += int(found[: tokens.inner].any(dim=0).sum())
    values, features, ratios = (x[:, tokens.valid] for x in (tokens.max_abs, tokens.feature, ratio))
    for layer, i in found.nonzero().tolist():
        key = groups[i], layer + 1, int(features[layer, i])
        one = _Massive(names[i], float(values[layer, i]), float(ratios[layer, i]), 1)
        totals.massive.setdefault(key, _Massive()).add(one)


def _keep_largest(
    largest: dict[int, dict[str, Any]], tokens: TokenStatistics, ratio: Tensor, names: list[list[str]]
) -> None:
    values, places = tokens.max_abs.flatten(1).max(dim=1)
    for layer, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        if layer not in largest or value > largest[layer]["value"]:
            b, s = divmod(place, tokens.max_abs.shape[2])
            feature, log10_ratio = int(tokens.feature[layer, b, s]), float(ratio[layer, b, s])
            held = {"layer": layer + 1, "value": value, "token": names[b][s], "feature": feature}
            largest[layer] = held | {"log10_ratio": log10_ratio}


def _result(totals: _Totals, subject: Subject, rows: int) -> dict[str, Any]:
    members = _members(totals.groups, rows)
    table = {group: _averages(totals, names) for group, names in members.items()}
    shown = _shown(table)
    opener = subject.opener if subject.opener in table else _first(table)
    strongest = max((group for group in shown if group != BOS), key=lambda group: _rate(table[group]), default=BOS)
    result = {
        "layers": totals.layers,
        "utterances": rows,
        "eps": EPS,
        "min_queries": MIN_QUERIES,
        "intermediate": opener,
        "strongest": strongest,
        "shown": shown,
        "groups": table,
        "heads": {
            group: totals.groups.means("heads", members[group], "counted") for group in shown if table[group]["counted"]
        },
        "positions": _positions(totals),
        "massive": _massive(totals, members),
        "largest": [held for _, held in sorted(totals.largest.items())],
        "massive_tokens_per_utterance": totals.massive_tokens / rows,
        "cos2": totals.decorrelation / totals.span_tokens if totals.span_tokens else None,
    }
    for kind, group in (("intermediate", opener), ("strongest", strongest), ("bos", BOS)):
        result[f"{kind}_activation"] = mean_over_layers(table[group]["max_abs"])
        for key in _RATES:
            if key != "sink_rate_text" or kind == "intermediate":
                result[f"{kind}_{key}"] = mean_over_layers(table[group][key])
    return result


def _averages(totals: _Totals, names: list[str]) -> dict[str, Any]:
    sums = totals.groups
    averages: dict[str, Any] = {key: int(sums.total(key, names)) for key in ("tokens", "counted", "counted_raw")}
    averages |= {key: sums.means(key, names) for key in PER_TOKEN}
    averages |= {key: sums.means(key, names, "counted") for key in PER_COUNTED}
    averages["sink_rate"] = sums.means("sink_rate", names, "counted_raw")
    averages["mass"] = (sums.total("mass", names) / max(totals.queries, 1)).tolist()
    return averages


def _members(sums: GroupSums, rows: int) -> dict[str, list[str]]:
    """The names of every group: each its own, but for single text tokens that are no strong sink."""

    def strength(name: str) -> tuple[float, float]:
        rates, received = (sums.means(key, [name], "counted") for key in ("sink_rate_corrected", "received"))
        return max(rates or [0.0]), max(received or [0.0])

    words = [name for name in sums.names if name[0] in "'\""]
    seen = [name for name in words if float(sums.total("counted", [name])) >= min(RARE, rows)]
    alone = sorted(seen, key=strength)[-STRONGEST:][::-1]
    members = {name: [name] for name in sums.names if name not in words} | {name: [name] for name in alone}
    rest = [name for name in words if name not in alone]
    return members | ({TEXT: rest} if rest else {})


def _first(table: dict[str, Any]) -> str:
    """Without delimiters: the first prompt token, else the strongest text token, else text."""
    names = [name for name in table if name != BOS]
    return next((name for name in names if name.startswith(PROMPT)), names[0] if names else BOS)


def _rate(group: dict[str, Any]) -> tuple[float, float]:
    return mean_over_layers(group["sink_rate_corrected"]) or 0.0, mean_over_layers(group["sink_rate"]) or 0.0


def _shown(table: dict[str, Any]) -> list[str]:
    """What figures draw: all groups, but of the prompt tokens only the strongest sinks."""
    prompt = [name for name in table if name.startswith(PROMPT)]
    prompt.sort(key=lambda name: -max(table[name]["sink_rate"] or [0.0]))
    return [name for name in table if not name.startswith(PROMPT) or name in prompt[:SHOWN_PROMPT]]


def _positions(totals: _Totals) -> list[dict[str, Any]]:
    return [
        {
            "position": place,
            "rows": int(rows),
            "sink_rate": rate / counted_raw if counted_raw else None,
            "sink_rate_corrected": corrected / counted if counted else None,
        }
        for place, (rows, counted_raw, rate, counted, corrected) in enumerate(totals.positions.T.tolist())
        if rows
    ]


def _massive(totals: _Totals, members: dict[str, list[str]]) -> list[dict[str, Any]]:
    """By group, layer and feature: how many tokens, and the largest of them."""
    group_of_name = {name: group for group, names in members.items() for name in names}
    merged: dict[tuple[str, int, int], _Massive] = {}
    for (name, layer, feature), one in totals.massive.items():
        merged.setdefault((group_of_name[name], layer, feature), _Massive()).add(one)
    return [
        {"group": group, "layer": layer, "feature": feature, **asdict(held)}
        for (group, layer, feature), held in sorted(merged.items(), key=lambda item: item[0])
    ]
