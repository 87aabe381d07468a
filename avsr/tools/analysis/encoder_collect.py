"""Averages the statistics of many clips by layer, head, region and time. Layers and heads count from 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avsr.tools.analysis.frames import REGIONS, FrameStatistics
from avsr.tools.analysis.statistics import EPS

BINS = 50  # of a whole clip
START, END, CLIP = "start", "end", "clip"
_PER_LAYER = (
    *("multiple", "multiple_raw", "sink_heads", "sink_clips", "sink_frames", "raw_heads", "raw_clips"),
    *("corrected_heads", "corrected_clips", "sink_mass", "activation", "ratio", "massive_clips", "massive_frames"),
)
PADDING_START, PADDING_END = "padding_start", "padding_end"


@dataclass
class _Totals:
    """Sums over clips in float64, by key; and the largest of all clips by layer."""

    clips: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    features: list[Counter[int]] = field(default_factory=list)
    massive: dict[tuple[int, int, str], dict[str, Any]] = field(default_factory=dict)
    largest: dict[int, dict[str, Any]] = field(default_factory=dict)
    strongest: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, torch.zeros((), dtype=torch.float64)) + value.double()

    def mean(self, key: str) -> Any:
        """Over clips."""
        return (self.sums[key] / self.clips).tolist()

    def ratio(self, key: str, per: str) -> Any:
        """Of two sums; None where there is nothing to divide by."""
        over = self.sums[per].expand(self.sums[key].shape)
        return _without_nan((self.sums[key] / over).masked_fill(over == 0, torch.nan).tolist())


def collect_frames(clips: Iterable[tuple[str, FrameStatistics]]) -> dict[str, Any]:
    """All statistics of (name, statistics) pairs, at least one, plain numbers ready for JSON.

    Means are over clips, but within a region over its frames. ``groups`` holds the regions, ``by_layer`` a row for each
    layer, ``heads`` tables (L, H), ``time`` the mean multiple (L, bins) in the first and last second of clip and
    padding and over the whole clip; ``largest`` and ``strongest`` the largest activation and multiple of every layer.
    """
    totals = _Totals()
    for name, one in clips:
        totals.clips += 1
        totals.seconds += one.seconds
        layers = len(one.max_abs)
        totals.features = totals.features or [Counter() for _ in range(layers)]
        totals.add(_by_layer(one))
        totals.add(_by_region(one))
        totals.add(_by_time(one))
        for layer, place in enumerate(one.max_abs.argmax(dim=1).tolist()):
            totals.features[layer][int(one.feature[layer, place])] += 1
        _keep_largest(totals, name, one)
        _add_massive(totals, one)
    return _result(totals)


def _by_layer(one: FrameStatistics) -> dict[str, Tensor]:
    multiple, sinks = one.multiple, one.sinks
    relative = one.value_norm / one.value_norm.mean(dim=-1, keepdim=True).clamp(min=1e-12)
    return {
        "multiple": multiple.amax(dim=(1, 2)),
        "multiple_raw": one.raw.amax(dim=(1, 2)) * one.raw.shape[-1],
        "sink_heads": sinks.any(dim=2).float().mean(dim=1),
        "sink_clips": sinks.flatten(1).any(dim=1).float(),
        "sink_frames": sinks.any(dim=1).sum(dim=1),
        "raw_heads": (one.raw > EPS).any(dim=2).float().mean(dim=1),
        "raw_clips": (one.raw > EPS).flatten(1).any(dim=1).float(),
        "corrected_heads": (one.others > EPS).any(dim=2).float().mean(dim=1),
        "corrected_clips": (one.others > EPS).flatten(1).any(dim=1).float(),
        "sink_mass": (one.mean * sinks).sum(dim=2).mean(dim=1),
        "sink_value": (relative * sinks).sum(dim=(1, 2)),
        "sinks": sinks.sum(dim=(1, 2)),
        "activation": one.max_abs.amax(dim=1),
        "ratio": one.max_abs.amax(dim=1) / one.median.clamp(min=1e-12),
        "massive_clips": one.massive.any(dim=1).float(),
        "massive_frames": one.massive.sum(dim=1),
        "head_multiple": multiple.amax(dim=2),
        "head_sinks": sinks.any(dim=2).float(),
        "head_padding": one.mean[..., one.own :].sum(dim=2),
        "padding": torch.tensor(1 - one.own / one.mean.shape[-1]),
    }


def _by_region(one: FrameStatistics) -> dict[str, Tensor]:
    """(R, L) sums over the frames of every region."""
    inside = torch.nn.functional.one_hot(one.regions, len(REGIONS)).double()  # (T, R)
    layers, heads, frames = one.others.shape

    def over(values: Tensor) -> Tensor:
        return (values.double() @ inside).T

    best = one.others.argmax(dim=2)
    strongest = torch.zeros(layers, frames, dtype=torch.float64)
    strongest.scatter_add_(1, best, torch.full(best.shape, 1 / heads, dtype=torch.float64))
    return {
        "region_frames": inside.sum(dim=0)[:, None],
        "region_share": inside.mean(dim=0),
        "region_mass": over(one.mean.mean(dim=1)),
        "region_multiple": over(one.multiple.mean(dim=1)),
        "region_sink_rate": over((one.raw > EPS).float().mean(dim=1)),
        "region_sink_rate_corrected": over((one.others > EPS).float().mean(dim=1)),
        "region_sink_rate_relative": over(one.sinks.float().mean(dim=1)),
        "region_strongest": over(strongest),
        "region_max_abs": over(one.max_abs),
        "region_value_norm": over(one.value_norm.mean(dim=1)),
        "region_peak": over(torch.nn.functional.one_hot(one.max_abs.argmax(dim=1), frames)),
    }


def _by_time(one: FrameStatistics) -> dict[str, Tensor]:
    """(L, bins) sums of the multiple with (bins,) numbers of frames, for every window of time."""
    values = one.multiple.mean(dim=1).double()
    rate, frames = round(one.own / one.seconds), values.shape[1]
    windows = {START: (0, min(rate, one.own), False), END: (max(0, one.own - rate), one.own, True)}
    if frames > one.own:
        windows[PADDING_START] = one.own, min(one.own + rate, frames), False
        windows[PADDING_END] = max(one.own, frames - rate), frames, True
    sums = {}
    for name, (first, stop, last) in windows.items():
        room = rate - (stop - first)  # windows of an end are filled from the right
        pad = (room, 0) if last else (0, room)
        sums[f"time_{name}"] = torch.nn.functional.pad(values[:, first:stop], pad)
        sums[f"count_{name}"] = torch.nn.functional.pad(torch.ones(stop - first, dtype=torch.float64), pad)
    bins = torch.arange(one.own) * BINS // one.own
    sums[f"time_{CLIP}"] = torch.zeros(len(values), BINS, dtype=torch.float64).index_add_(1, bins, values[:, : one.own])
    sums[f"count_{CLIP}"] = torch.bincount(bins, minlength=BINS).double()
    return sums


def _keep_largest(totals: _Totals, name: str, one: FrameStatistics) -> None:
    def keep(held: dict[int, dict[str, Any]], layer: int, by: str, place: int, **values: Any) -> None:
        if layer not in held or values[by] > held[layer][by]:
            where = {"clip": name, "second": place * one.seconds / one.own, "region": REGIONS[int(one.regions[place])]}
            held[layer] = {"layer": layer + 1, **values, **where}

    for layer, multiples in enumerate(one.multiple):
        head, place = divmod(int(multiples.argmax()), multiples.shape[1])
        share = float(one.others[layer, head, place])
        values = {"head": head + 1, "multiple": float(multiples[head, place]), "share": share}
        keep(totals.strongest, layer, "multiple", place, **values)
        place = int(one.max_abs[layer].argmax())
        value, feature = float(one.max_abs[layer, place]), int(one.feature[layer, place])
        ratio = value / max(float(one.median[layer]), 1e-12)
        keep(totals.largest, layer, "value", place, value=value, ratio=ratio, feature=feature)


def _add_massive(totals: _Totals, one: FrameStatistics) -> None:
    found = set()
    for layer, place in one.massive.nonzero().tolist():
        key = layer + 1, int(one.feature[layer, place]), REGIONS[int(one.regions[place])]
        value = float(one.max_abs[layer, place])
        held = totals.massive.setdefault(key, {"frames": 0, "clips": 0, "value": 0.0, "ratio": 0.0})
        held["frames"] += 1
        held["clips"] += key not in found
        found.add(key)
        if value > held["value"]:
            held["value"], held["ratio"] = value, value / max(float(one.median[layer]), 1e-12)


def _result(totals: _Totals) -> dict[str, Any]:
    layers = len(totals.features)
    rows: list[dict[str, Any]] = [{"layer": layer + 1} for layer in range(layers)]
    for key in _PER_LAYER:
        for row, value in zip(rows, totals.mean(key), strict=True):
            row[key] = value
    for row, value in zip(rows, totals.ratio("sink_value", "sinks"), strict=True):
        row["sink_value"] = value
    for row, counts in zip(rows, totals.features, strict=True):
        feature, count = counts.most_common(1)[0]
        row["feature"], row["feature_clips"] = feature, count / totals.clips
    padded = bool(totals.sums["padding"])
    windows = [key.removeprefix("time_") for key in totals.sums if key.startswith("time_")]
    return {
        "layers": layers,
        "clips": totals.clips,
        "seconds": totals.seconds,
        "by_layer": rows,
        "heads": {
            "multiple": totals.mean("head_multiple"),
            "sinks": totals.mean("head_sinks"),
            "padding": totals.mean("head_padding") if padded else None,
        },
        "padding_frames": totals.mean("padding"),
        "groups": _regions(totals),
        "time": {name: totals.ratio(f"time_{name}", f"count_{name}") for name in windows},
        "massive": [
            {"layer": layer, "feature": feature, "region": region, **held}
            for (layer, feature, region), held in sorted(totals.massive.items())
        ],
        "largest": [held for _, held in sorted(totals.largest.items())],
        "strongest": [held for _, held in sorted(totals.strongest.items())],
    }


def _regions(totals: _Totals) -> dict[str, Any]:
    """By region that has frames: shares of a clip's frames, of its attention (``mass``), of the (clip, head) pairs
    whose strongest frame and of the clips whose largest activation is there; and means over the region's frames."""
    found = {}
    for place, region in enumerate(REGIONS):
        if not totals.sums["region_frames"][place]:
            continue
        table: dict[str, Any] = {"frames": totals.mean("region_share")[place]}
        for key in ("mass", "strongest", "peak"):
            table[key] = totals.mean(f"region_{key}")[place]
        rates = ("sink_rate", "sink_rate_corrected", "sink_rate_relative")
        for key in ("multiple", *rates, "max_abs", "value_norm"):
            table[key] = totals.ratio(f"region_{key}", "region_frames")[place]
        found[region] = table
    return found


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if values != values else values
