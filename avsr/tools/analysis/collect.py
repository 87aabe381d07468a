"""Measures a subject over all its rows and averages by token group and layer.

Groups of positions: BOS, every delimiter and every prompt token by name, all speech tokens, all text tokens. In plain
text the tokens that are most of a sink stand alone, by name. "Intermediate" is the delimiter that opens the first
stream, else the first prompt token, in plain text the strongest token. "Strongest" is the drawn group but BOS with the
largest sink rate over layers 1..L-1. Layers count from 1; L is their number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avsr.models.speech_llm import Assembled
from avsr.runtime.progress import ProgressBar
from avsr.tools.analysis.groups import BOS, PROMPT, TEXT, GroupSums, group_of
from avsr.tools.analysis.observe import EPS, MIN_QUERIES, Observed, observe
from avsr.tools.analysis.subject import Subject

MASSIVE_RATIO, MASSIVE_SIZE = 1000.0, 100.0  # Sun et al.
POSITIONS = 64  # leading positions with rates of their own
STRONGEST = 4  # text tokens that stand alone;
RARE = 3  # they are counted that often at least; and
SHOWN_PROMPT = 3  # prompt tokens that are drawn
PER_TOKEN = ("sink_rate_text", "cosine", "max_abs", "value_norm", "log10_ratio")
PER_COUNTED = ("sink_rate_corrected", "received", "received_value")


@dataclass
class _Massive:
    count: int = 0
    value: float = 0.0
    log10_ratio: float = 0.0
    token: str = ""


@dataclass
class _Totals:
    """What is kept of all batches."""

    layers: int
    groups: GroupSums = field(default_factory=GroupSums)
    massive: dict[tuple[int, str, int], _Massive] = field(default_factory=dict)  # by layer, group and feature
    massive_tokens: int = 0
    largest: dict[int, tuple[float, str, int, float]] = field(default_factory=dict)
    queries: int = 0
    decorrelation: float = 0.0
    span_tokens: int = 0
    positions: Tensor = field(default_factory=lambda: torch.zeros(5, POSITIONS, dtype=torch.float64))


def collect(subject: Subject) -> tuple[dict[str, Any], Assembled]:
    """All statistics of ``subject``, plain numbers ready for JSON, and one row of middle length to look at."""
    totals = _Totals(subject.layers)
    example: Assembled | None = None
    done = 0
    with ProgressBar("analyse", subject.count) as bar:
        for rows in subject.batches():
            _add(totals, rows, observe(subject, rows), words=not subject.opener and _is_text(rows))
            done += len(rows.names)
            if example is None and 2 * done >= subject.count:
                example = _one(rows, len(rows.names) // 2)
            bar.advance(len(rows.names))
    assert example is not None
    return _result(totals, subject, done), example


def is_massive(max_abs: Tensor, median: Tensor) -> Tensor:
    """Sun et al.: at least 1000 times the median of its row and layer, and above 100. ``max_abs`` (L, B, S), ``median``
    (L, B)."""
    return (max_abs >= MASSIVE_RATIO * median[..., None]) & (max_abs > MASSIVE_SIZE)


def _is_text(rows: Assembled) -> bool:
    return bool((rows.spans == 1).all())


def _one(rows: Assembled, b: int) -> Assembled:
    length = len(rows.names[b])
    one = slice(b, b + 1)
    return Assembled(rows.embeddings[one, :length], rows.mask[one, :length], rows.spans[one], [rows.names[b]])


def _add(totals: _Totals, rows: Assembled, seen: Observed, words: bool) -> None:
    valid = rows.mask.bool().cpu()
    spans = rows.spans.tolist()
    groups = [
        group_of(name, position, span, words)
        for names, span in zip(rows.names, spans, strict=True)
        for position, name in enumerate(names)
    ]
    places = totals.groups.places(groups)
    ratio = torch.log10(seen.max_abs.clamp(min=1e-12) / seen.median[..., None].clamp(min=1e-12))
    by_token = {
        "sink_rate": seen.rate,
        "sink_rate_text": seen.rate_text,
        "cosine": seen.cosine,
        "max_abs": seen.max_abs,
        "value_norm": seen.value_norm,
        "log10_ratio": ratio,
        "mass": seen.mass,
        "sink_rate_corrected": seen.sinks.float().mean(dim=2),
        "received": seen.received * seen.counted,
        "received_value": seen.received_value * seen.counted,
    }
    totals.groups.add("tokens", places, torch.ones(len(places)))
    totals.groups.add("counted", places, seen.counted[valid].double())
    totals.groups.add("counted_raw", places, seen.counted_raw[valid].double())
    totals.groups.add("heads", places, seen.sinks.permute(1, 3, 0, 2)[valid])
    for key, values in by_token.items():
        totals.groups.add(key, places, values.permute(1, 2, 0)[valid])
    totals.queries += sum(len(names) - span for names, span in zip(rows.names, spans, strict=True))
    totals.decorrelation += seen.decorrelation * seen.count
    totals.span_tokens += seen.count
    _add_positions(totals, seen, valid)
    _add_massive(totals, seen, ratio, valid, groups, [name for names in rows.names for name in names])
    _keep_largest(totals.largest, seen, ratio, rows.names)


def _add_positions(totals: _Totals, seen: Observed, valid: Tensor) -> None:
    here = min(valid.shape[1], POSITIONS)
    corrected = seen.sinks.float().mean(dim=(0, 2))
    raw = seen.rate.mean(dim=0)
    kept = (valid, seen.counted_raw, raw * seen.counted_raw, seen.counted, corrected * seen.counted)
    for row, values in enumerate(kept):
        totals.positions[row, :here] += values.double().sum(dim=0)[:here]


def _add_massive(
    totals: _Totals, seen: Observed, ratio: Tensor, valid: Tensor, groups: list[str], names: list[str]
) -> None:
    found = is_massive(seen.max_abs, seen.median)[:, valid]  # (L, tokens)
    totals.massive_tokens += int(found[: max(totals.layers - 1, 1)].any(dim=0).sum())
    values, features, ratios = seen.max_abs[:, valid], seen.feature[:, valid], ratio[:, valid]
    for layer, token in found.nonzero().tolist():
        held = totals.massive.setdefault((layer, groups[token], int(features[layer, token])), _Massive())
        held.count += 1
        value = float(values[layer, token])
        if value > held.value:
            held.value, held.log10_ratio, held.token = value, float(ratios[layer, token]), names[token]


def _keep_largest(
    largest: dict[int, tuple[float, str, int, float]], seen: Observed, ratio: Tensor, names: list[list[str]]
) -> None:
    values, places = seen.max_abs.flatten(1).max(dim=1)
    for layer, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        if layer not in largest or value > largest[layer][0]:
            b, s = divmod(place, seen.max_abs.shape[2])
            largest[layer] = (value, names[b][s], int(seen.feature[layer, b, s]), float(ratio[layer, b, s]))


def _result(totals: _Totals, subject: Subject, rows: int) -> dict[str, Any]:
    members = _members(totals.groups, rows)
    table = {group: _averages(totals, names) for group, names in members.items()}
    shown = _shown(table)
    opener = subject.opener if subject.opener in table else _first(table)
    strongest = max((group for group in shown if group != BOS), key=lambda group: _rate(table[group]), default=BOS)
    return {
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
        "largest": [
            {"layer": layer + 1, "value": value, "token": token, "feature": feature, "log10_ratio": ratio}
            for layer, (value, token, feature, ratio) in sorted(totals.largest.items())
        ],
        "massive_tokens_per_utterance": totals.massive_tokens / rows,
        "cos2": totals.decorrelation / totals.span_tokens if totals.span_tokens else None,
        "intermediate_activation": _inner(table[opener]["max_abs"]),
        "intermediate_sink_rate": _inner(table[opener]["sink_rate"]),
        "intermediate_sink_rate_text": _inner(table[opener]["sink_rate_text"]),
        "intermediate_sink_rate_corrected": _inner(table[opener]["sink_rate_corrected"]),
        "strongest_activation": _inner(table[strongest]["max_abs"]),
        "strongest_sink_rate": _inner(table[strongest]["sink_rate"]),
        "strongest_sink_rate_corrected": _inner(table[strongest]["sink_rate_corrected"]),
        "bos_activation": _inner(table[BOS]["max_abs"]),
        "bos_sink_rate": _inner(table[BOS]["sink_rate"]),
        "bos_sink_rate_corrected": _inner(table[BOS]["sink_rate_corrected"]),
    }


def _averages(totals: _Totals, names: list[str]) -> dict[str, Any]:
    sums = totals.groups
    averages: dict[str, Any] = {
        "tokens": int(sums.total("tokens", names)),
        "counted": int(sums.total("counted", names)),
        "counted_raw": int(sums.total("counted_raw", names)),
    }
    averages |= {key: sums.means(key, names) for key in PER_TOKEN}
    averages |= {key: sums.means(key, names, "counted") for key in PER_COUNTED}
    averages["sink_rate"] = sums.means("sink_rate", names, "counted_raw")
    averages["mass"] = (sums.total("mass", names) / max(totals.queries, 1)).tolist()
    return averages


def _members(sums: GroupSums, rows: int) -> dict[str, list[str]]:
    """The names behind every group: each its own, but for single text tokens that are no strong sink."""
    words = [name for name in sums.names if name[0] in "'\""]
    seen = [name for name in words if float(sums.total("counted", [name])) >= min(RARE, rows)]
    seen.sort(key=lambda name: _strength(sums.means("sink_rate_corrected", [name], "counted"), name, sums))
    alone = seen[-STRONGEST:][::-1]
    members = {name: [name] for name in sums.names if name not in words} | {name: [name] for name in alone}
    rest = [name for name in words if name not in alone]
    return members | ({TEXT: rest} if rest else {})


def _strength(rates: list[float] | None, name: str, sums: GroupSums) -> tuple[float, float]:
    received = sums.means("received", [name], "counted") or [0.0]
    return max(rates or [0.0]), max(received)


def _first(table: dict[str, Any]) -> str:
    """Without delimiters: the first prompt token, else the strongest text token, else text."""
    names = [name for name in table if name != BOS]
    return next((name for name in names if name.startswith(PROMPT)), names[0] if names else BOS)


def _rate(group: dict[str, Any]) -> tuple[float, float]:
    return _inner(group["sink_rate_corrected"]) or 0.0, _inner(group["sink_rate"]) or 0.0


def _shown(table: dict[str, Any]) -> list[str]:
    """What figures draw: all groups, but of the prompt's tokens only those that are most of a sink."""
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
    for (layer, name, feature), one in totals.massive.items():
        held = merged.setdefault((group_of_name[name], layer, feature), _Massive())
        count = held.count + one.count
        if one.value > held.value:
            held.value, held.log10_ratio, held.token = one.value, one.log10_ratio, one.token
        held.count = count
    return [
        {
            "group": group,
            "layer": layer + 1,
            "feature": feature,
            "token": held.token,
            "value": held.value,
            "log10_ratio": held.log10_ratio,
            "count": held.count,
        }
        for (group, layer, feature), held in sorted(merged.items())
    ]


def _inner(by_layer: list[float] | None) -> float | None:
    """The mean over layers 1..L-1 (over the only one where there is one); None where nothing was counted."""
    if by_layer is None:
        return None
    inner = by_layer[:-1] or by_layer
    return sum(inner) / len(inner)
