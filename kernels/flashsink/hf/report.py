"""What a probe saw, as a list of the tokens that stand out and as a picture.

L layers, B rows, S tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink.hf.records import Options, Record
from flashsink.types import ActivationStats, Layout, SinkStats

EPS, MIN_QUERIES = 0.3, 8  # of a sink
_CELLS = 256  # columns of a picture: more would be narrower than one sees
_MARKS, _APART = 6, 0.06  # tokens that a picture names, and how much of its width lies between them;
_WEAK = 0.1  # they have at least this share of the strongest


class Seen(NamedTuple):
    """What a probe recorded in one forward; None or nothing where it was not asked to."""

    record: Record
    sinks: dict[int, SinkStats]
    activations: ActivationStats | None
    cosines: Tensor | None  # (L-1, B, S)


def seen(probe: Any, options: Options, record: Record) -> Seen:
    """What ``probe`` recorded in the forward of ``record``.

    Raises:
        RuntimeError: that is nothing.
    """
    if not options.attention and not options.activations:
        raise RuntimeError("this probe was attached with attention=False and activations=False")
    if not record.recorded:
        raise RuntimeError("the last forward was skipped by stats_every")
    sinks = probe.sinks_by_layer if options.attention else {}
    activations = probe.activations if options.activations else None
    return Seen(record, sinks, activations, probe.cosines.cpu() if options.cosines else None)


def tokens(seen: Seen, eps: float, min_queries: int) -> list[dict[str, Any]]:
    """What :meth:`flashsink.Probe.report` returns."""
    record, sinks, activations, cosines = seen
    layout = record.places[0].to(torch.device("cpu"))
    first = (layout.offsets() == 0) & record.anchored
    layers = range(len(activations.max_abs)) if activations is not None else sorted(sinks)
    largest = None if activations is None else _largest(activations.max_abs.cpu(), layout)
    found: list[dict[str, Any]] = []
    for layer in layers:
        stats = sinks.get(layer)
        rate = None if stats is None else stats.sink_rate(eps, min_queries).cpu()
        mean = None if stats is None else stats.mean_received.mean(dim=1).cpu()
        shown = first.clone()
        if rate is not None:
            shown |= (rate > 0) & layout.valid()
        if largest is not None:
            shown |= largest[layer]
        for row, token in shown.nonzero().tolist():
            entry = {"layer": layer, "row": row, "token": token, "kind": "BOS" if first[row, token] else "token"}
            entry["sink_rate"] = None if rate is None else _number(rate[row, token])
            entry["mean_received"] = None if mean is None else _number(mean[row, token])
            own = None if cosines is None or layer == len(cosines) else _number(cosines[layer, row, token])
            entry |= _activation(activations, layer, row, token)
            found.append(entry | {"cos2": own})
    return found


def _largest(max_abs: Tensor, layout: Layout) -> Tensor:
    """(L, B, S) bool: of every layer and row or packed sequence the token with the largest activation, BOS or not, and
    the largest other."""
    segment, offset = layout.segments(), layout.offsets()
    size = max_abs.nan_to_num(nan=torch.inf, posinf=torch.inf)
    found = torch.zeros_like(size, dtype=torch.bool)
    for index in segment.unique().tolist():
        for own in (segment == index, (segment == index) & (offset > 0)):
            if index >= 0 and own.any():
                best = size.masked_fill(~own, -1.0).flatten(1).argmax(dim=1)
                found.flatten(1)[torch.arange(len(size)), best] = True
    return found


def _activation(activations: ActivationStats | None, layer: int, row: int, token: int) -> dict[str, Any]:
    """The fields of one token."""
    if activations is None:
        return {"max_abs": None, "feature": None, "ratio": None}
    size, median = _number(activations.max_abs[layer, row, token]), None
    if activations.median is not None:
        median = _number(activations.median[layer, row])
    ratio = size / median if size is not None and median else None
    return {"max_abs": size, "feature": int(activations.feature[layer, row, token]), "ratio": ratio}


def _number(x: Tensor) -> float | None:
    value = float(x)
    return value if math.isfinite(value) else None


def picture(seen: Seen, layers: int, row: int, path: str | Path | None) -> Any:
    """What :meth:`flashsink.Probe.plot` returns."""
    record, sinks, activations, _ = seen
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"matplotlib: plot() needs it, 'pip install matplotlib' gets it ({error})") from error
    if path is not None and Path(path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path: expected a file that ends in .png or .svg, got {str(path)!r}")
    layout = record.places[0].to(torch.device("cpu"))
    if not 0 <= row < layout.rows:
        raise ValueError(f"row: expected 0 to {layout.rows - 1}, got {row}")
    keep = layout.valid()[row]
    if not keep.any():
        raise ValueError(f"row: {row} has no tokens")
    start = int(keep.int().argmax())
    panels: list[tuple[str, Tensor, dict[str, Any]]] = []
    if sinks:
        shares = _received(sinks, layers, row)[:, keep]
        panels.append(("attention received per query, mean over heads", shares, {"cmap": "viridis", "vmin": 0.0}))
        panels[0][2]["vmax"] = 1.0
    if activations is not None:
        sizes = activations.max_abs[:, row].cpu()[:, keep]
        sizes = torch.where(sizes.isfinite() & (sizes > 0), sizes, torch.nan)
        known = sizes[sizes.isfinite()]
        low, high = (float(known.min()), float(known.max())) if len(known) else (1.0, 1.0)
        panels.append(("largest |h|", sizes, {"cmap": "magma", "norm": LogNorm(low, max(high, low * 1.01))}))
    figure = Figure(figsize=(9.0, len(panels) * (1.5 + 0.055 * max(layers, 8))), layout="constrained", dpi=150)
    for axis, (title, values, colors) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _draw(axis, title, values, start, colors)
    if layout.rows > 1:
        figure.suptitle(f"row {row}", x=0.01, ha="left", fontsize=10)
    if path is not None:
        figure.savefig(path)
    return figure


def _received(sinks: dict[int, SinkStats], layers: int, row: int) -> Tensor:
    """(L, S) mean received attention; NaN for layers that have none and keys that too few queries see."""
    parts = {
        layer: (stats.mean_received[row].mean(dim=0).cpu(), stats.queries[row].cpu()) for layer, stats in sinks.items()
    }
    some = next(iter(parts.values()))[0]
    shares = torch.full((layers, len(some)), torch.nan)
    for layer, (mean, queries) in parts.items():
        few = queries < min(MIN_QUERIES, int(queries.max()))
        shares[layer] = mean.masked_fill(few, torch.nan)
    return shares


def _draw(axis: Any, title: str, values: Tensor, start: int, colors: dict[str, Any]) -> None:
    """``values`` (L, S) by layer (down) and token (across); a column of many tokens shows the largest of them, and
    those that stand out are named above."""
    from matplotlib.ticker import MaxNLocator

    layers, count = values.shape
    filled = values.nan_to_num(nan=-torch.inf)
    cells = torch.nn.functional.adaptive_max_pool1d(filled, min(count, _CELLS))
    cells = cells.masked_fill(cells.isinf(), torch.nan)
    extent = (start - 0.5, start + count - 0.5, layers - 0.5, -0.5)
    image = axis.imshow(cells.numpy(), aspect="auto", interpolation="nearest", extent=extent, **colors)
    axis.figure.colorbar(image, ax=axis, pad=0.01)
    axis.set_title(title, loc="left", fontsize=10, pad=18)
    axis.set_xlabel("token")
    axis.set_ylabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_yticks(range(0, layers, math.ceil(layers / 9)))
    axis.set_facecolor("#dddddd")
    marks: list[int] = []
    strength = filled.amax(dim=0)
    for place in strength.argsort(descending=True, stable=True).tolist():
        if len(marks) == _MARKS or strength[place] < _WEAK * strength.max():
            break
        if all(abs(place - other) >= _APART * count for other in marks):
            marks.append(place)
    top = axis.secondary_xaxis("top")
    top.set_xticks([start + place for place in marks])
    top.tick_params(labelsize=8, length=2, pad=1)
