"""Figures of an analysis, each of one run but for :func:`lines_by_layer`; ``Run`` is a name with its analysis.

Functions over several runs return a figure for each, with axes of the same range, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from matplotlib.axes import Axes

from avsr.tools.analysis.plots import COLOURS, legend_below, panels, styled, to_svg, token_label

Run = tuple[str, dict[str, Any]]
_PITCH, _CELL = 0.11, 0.085  # inches for one token: of a bar, of a map


def lines_by_layer(runs: Sequence[Run], key: str, groups: Sequence[str], ylabel: str, *, log: bool = False) -> str:
    """One figure with a panel a run: ``key`` of every group over layers 1..L."""
    with styled():
        figure, axes = panels(len(runs), width=4.9)
        for axis, (name, analysis) in zip(axes, runs, strict=True):
            _draw_lines(axis, analysis, key, groups)
            axis.set_title(name)
            if log:
                axis.set_yscale("log")
        axes[0].set_ylabel(ylabel)
        legend_below(figure, axes[0])
        return to_svg(figure, f"{ylabel} by layer")


def layer_lines(
    runs: Sequence[Run], key: str, groups: Sequence[str], ylabel: str, *, log: bool = False, mark: float | None = None
) -> list[str]:
    """``key`` of every group over layers 1..L; ``mark`` draws a dashed line across. "" where no group has it."""
    values = [
        value
        for _, analysis in runs
        for group in groups
        for value in analysis["groups"].get(group, {}).get(key) or []
        if not log or value > 0
    ]
    if not values:
        return [""] * len(runs)
    low, high = min(values), max(values)
    pictures = []
    for name, analysis in runs:
        with styled():
            figure, (axis,) = panels(height=3.0 + 0.2 * (len(groups) // 3))
            _draw_lines(axis, analysis, key, groups)
            if mark is not None:
                axis.axhline(mark, color="#8a8a8a", linestyle="--", linewidth=1.0)
            if log:
                axis.set_yscale("log")
                axis.set_ylim(low / 1.3, high * 1.3)
            else:
                margin = 0.04 * (high - low or 1.0)
                axis.set_ylim(min(low, 0.0) - margin, high + margin)
            axis.set_ylabel(ylabel)
            legend_below(figure, axis)
            pictures.append(to_svg(figure, f"{name}: {ylabel} by layer, a line for each kind of token"))
    return pictures


def _draw_lines(axis: Axes, analysis: dict[str, Any], key: str, groups: Sequence[str]) -> None:
    for colour, group in zip(cycle(COLOURS), groups, strict=False):
        values = analysis["groups"].get(group, {}).get(key)
        if values:
            axis.plot(range(1, len(values) + 1), values, label=token_label(group), color=colour, linewidth=1.8)
    axis.set_xlabel("layer")


def positions(runs: Sequence[Run]) -> list[str]:
    """Sink rate, raw and corrected, by absolute position."""
    pictures = []
    for name, analysis in runs:
        rows = analysis["positions"]
        with styled():
            figure, (axis,) = panels()
            for key, label, colour in (
                ("sink_rate", "raw", COLOURS[0]),
                ("sink_rate_corrected", "corrected", COLOURS[1]),
            ):
                points = [(row["position"], row[key]) for row in rows if row[key] is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", label=label, color=colour, markersize=3, linewidth=1.2)
            axis.set_ylim(-0.03, 1.03)
            axis.set_xlabel("position (0 = BOS)")
            axis.set_ylabel("sink rate")
            legend_below(figure, axis)
            pictures.append(to_svg(figure, f"{name}: sink rate by position"))
    return pictures


def heat_by_token(runs: Sequence[Run], key: str, groups: Sequence[str]) -> list[str]:
    """``key`` (0 to 1) by group (rows) and layer (columns); "" for a run that has none."""
    pictures = []
    for name, analysis in runs:
        rows = [(group, analysis["groups"].get(group, {}).get(key)) for group in groups]
        shown = [(group, values) for group, values in rows if values]
        if not shown:
            pictures.append("")
            continue
        with styled():
            figure, (axis,) = panels(height=0.26 * len(shown) + 1.3)
            _heat(axis, [values for _, values in shown], "layer")
            axis.set_yticks(range(1, len(shown) + 1), [token_label(group) for group, _ in shown])
            pictures.append(to_svg(figure, f"{name}: {key} by token and layer"))
    return pictures


def heat_by_head(run: Run, group: str) -> str:
    """Sink rate of one group by head (rows) and layer (columns)."""
    name, analysis = run
    by_head = [list(heads) for heads in zip(*analysis["heads"][group], strict=True)]
    with styled():
        figure, (axis,) = panels(height=min(0.14 * len(by_head) + 1.6, 4.6))
        _heat(axis, by_head, "layer")
        axis.set_ylabel("head")
        axis.set_title(token_label(group))
        return to_svg(figure, f"{name}: share of tokens in which {group} is a sink, by layer and head")


def _heat(axis: Axes, rows: Sequence[Sequence[float]], xlabel: str) -> None:
    """Columns count from 1, and so do rows, from the top."""
    extent = (0.5, len(rows[0]) + 0.5, len(rows) + 0.5, 0.5)
    image = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axis.set_xlabel(xlabel)
    if axis.figure is not None:
        axis.figure.colorbar(image, ax=axis, pad=0.02)


def mass(runs: Sequence[Run], groups: Sequence[str]) -> list[str]:
    """The share of the text queries' attention that goes to every group, stacked to 1, by layer."""
    pictures = []
    for name, analysis in runs:
        table, layers = analysis["groups"], range(1, analysis["layers"] + 1)
        named = [group for group in groups if group in table]
        others = [table[group]["mass"] for group in table if group not in named]
        shares = [table[group]["mass"] for group in named]
        labels = [token_label(group) for group in named]
        colours = list(islice(cycle(COLOURS), len(named)))
        if others:
            shares.append([sum(values) for values in zip(*others, strict=True)])
            labels.append("other prompt tokens")
            colours.append("#606060")
        with styled():
            figure, (axis,) = panels(height=3.0 + 0.2 * (len(labels) // 3))
            bottom = [0.0] * len(layers)
            for label, colour, share in zip(labels, colours, shares, strict=True):
                axis.bar(layers, share, bottom=bottom, width=1.0, color=colour, label=label)
                bottom = [low + value for low, value in zip(bottom, share, strict=True)]
            axis.set_ylim(0, 1)
            axis.set_xlim(0.5, len(layers) + 0.5)
            axis.set_xlabel("layer")
            axis.set_ylabel("share of attention")
            legend_below(figure, axis)
            pictures.append(to_svg(figure, f"{name}: where the text's attention goes, by layer"))
    return pictures


def activation_bars(runs: Sequence[Run]) -> list[str]:
    """max |h| of every token of one row in the layer of the largest activation."""
    top = max(max(analysis["example"]["activation"]["max_abs"]) for _, analysis in runs)
    low = min(min(analysis["example"]["activation"]["max_abs"]) for _, analysis in runs)
    pictures = []
    for name, analysis in runs:
        example = analysis["example"]
        shown, labels = example["activation"], [token_label(token) for token in example["tokens"]]
        with styled():
            figure, (axis,) = panels(width=max(4.6, _PITCH * len(labels) + 1.0), height=3.4)
            axis.bar(range(len(labels)), shown["max_abs"], color=COLOURS[0], width=0.8)
            axis.axhline(1000 * shown["median"], color="#8a8a8a", linestyle="--", linewidth=1.0)
            axis.set_yscale("log")
            axis.set_ylim(low / 2, max(top, 1000 * shown["median"]) * 1.5)
            axis.set_xlim(-0.8, len(labels) - 0.2)
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
            axis.set_ylabel("max |h|")
            axis.set_title(f"layer {shown['layer']}", loc="left")
            pictures.append(to_svg(figure, f"{name}: largest activation of every token in layer {shown['layer']}"))
    return pictures


def attention_maps(run: Run) -> list[str]:
    """Queries down, keys across, with token names; a figure for every map."""
    name, analysis = run
    labels = [token_label(token) for token in analysis["example"]["tokens"]]
    side = _CELL * len(labels) + 0.8
    pictures = []
    for shown in analysis["example"]["maps"]:
        what = "mean over heads" if shown["head"] is None else f"head {shown['head']}"
        with styled():
            figure, (axis,) = panels(width=max(side, 2.6), height=max(side, 2.6) + 0.3)
            axis.imshow(shown["weights"], cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
            axis.set_yticks(range(len(labels)), labels, fontsize=6)
            axis.set_title(f"layer {shown['layer']}, {what}", fontsize=10, loc="left")
            pictures.append(to_svg(figure, f"{name}: attention map of layer {shown['layer']}, {what}"))
    return pictures
