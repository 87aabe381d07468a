"""Figures of an analysis, each of one run but for :func:`lines_by_layer`; ``Run`` is a name with its analysis.

Functions over several runs return a figure for each, with axes of the same range, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from avsr.tools.analysis.groups import BOS
from avsr.tools.analysis.plots import COLOURS, drawing, legend_below, panels, styled, to_svg, token_label

Run = tuple[str, dict[str, Any]]
LABELS = 3  # whose origin is drawn; the table has all
_PITCH, _CELL = 0.11, 0.085  # inches for one token: of a bar, of a map
_GREY = "#8a8a8a"


def lines_by_layer(runs: Sequence[Run], key: str, groups: Sequence[str], ylabel: str, *, log: bool = False) -> str:
    """One figure with a panel for each run: ``key`` of every group over layers 1..L."""
    with styled():
        figure, axes = panels(len(runs), width=4.9)
        for axis, (name, analysis) in zip(axes, runs, strict=True):
            _draw_lines(axis, analysis, key, groups)
            axis.set_xlabel("layer")
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
        for value in _of(analysis, group, key) or []
        if not log or value > 0
    ]
    if not values:
        return [""] * len(runs)
    low, high = min(values), max(values)
    margin = 0.04 * (high - low or 1.0)
    pictures: list[str] = []
    for name, analysis in runs:
        title = f"{name}: {ylabel} by layer, a line for each kind of token"
        with drawing(pictures, title, "layer", ylabel, height=_height(len(groups))) as axis:
            _draw_lines(axis, analysis, key, groups)
            if mark is not None:
                axis.axhline(mark, color=_GREY, linestyle="--", linewidth=1.0)
            if log:
                axis.set_yscale("log")
                axis.set_ylim(low / 1.3, high * 1.3)
            else:
                axis.set_ylim(min(low, 0.0) - margin, high + margin)
    return pictures


def _of(analysis: dict[str, Any], group: str, key: str) -> list[float] | None:
    return analysis["groups"].get(group, {}).get(key)


def _height(entries: int) -> float:
    """Of a figure whose legend has so many entries."""
    return 3.0 + 0.2 * (entries // 3)


def _draw_lines(axis: Axes, analysis: dict[str, Any], key: str, groups: Sequence[str]) -> None:
    for color, group in zip(cycle(COLOURS), groups, strict=False):
        if values := _of(analysis, group, key):
            axis.plot(range(1, len(values) + 1), values, label=token_label(group), color=color, linewidth=1.8)


def positions(runs: Sequence[Run]) -> list[str]:
    """Sink rate, raw and corrected, by absolute position."""
    pictures: list[str] = []
    for name, analysis in runs:
        with drawing(pictures, f"{name}: sink rate by position", "position (0 = BOS)", "sink rate") as axis:
            for color, key, label in zip(
                COLOURS, ("sink_rate", "sink_rate_corrected"), ("raw", "corrected"), strict=False
            ):
                points = [(row["position"], row[key]) for row in analysis["positions"] if row[key] is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", label=label, color=color, markersize=3, linewidth=1.2)
            axis.set_ylim(-0.03, 1.03)
    return pictures


def heat_by_token(runs: Sequence[Run], key: str, groups: Sequence[str]) -> list[str]:
    """``key`` (0 to 1) by group (rows) and layer (columns); "" for a run that has none."""
    pictures: list[str] = []
    for name, analysis in runs:
        shown = [(token_label(group), values) for group in groups if (values := _of(analysis, group, key))]
        if not shown:
            pictures.append("")
            continue
        title, height = f"{name}: {key} by token and layer", 0.26 * len(shown) + 1.3
        with drawing(pictures, title, "layer", height=height, legend=False) as axis:
            heat(axis, [values for _, values in shown])
            axis.set_yticks(range(1, len(shown) + 1), [label for label, _ in shown])
    return pictures


def heat_by_head(run: Run, group: str) -> str:
    """Sink rate of one group by head (rows) and layer (columns)."""
    name, analysis = run
    by_head = [list(heads) for heads in zip(*analysis["heads"][group], strict=True)]
    title = f"{name}: share of tokens in which {group} is a sink, by layer and head"
    pictures: list[str] = []
    with drawing(pictures, title, "layer", "head", height=min(0.14 * len(by_head) + 1.6, 4.6), legend=False) as axis:
        heat(axis, by_head)
        axis.set_title(token_label(group))
    return pictures[0]


def heat(axis: Axes, rows: Sequence[Sequence[float]], norm: Normalize | None = None) -> None:
    """Columns count from 1, and so do rows, from the top; colors are 0 to 1, or as ``norm`` says."""
    extent = (0.5, len(rows[0]) + 0.5, len(rows) + 0.5, 0.5)
    norm = norm or Normalize(0, 1)
    image = axis.imshow(rows, aspect="auto", cmap="viridis", norm=norm, extent=extent, interpolation="nearest")
    if axis.figure is not None:
        axis.figure.colorbar(image, ax=axis, pad=0.02)


def mass(runs: Sequence[Run], groups: Sequence[str], whose: str = "the text's") -> list[str]:
    """The share of ``whose`` attention that goes to every group, stacked to 1, by layer."""
    pictures: list[str] = []
    for name, analysis in runs:
        table, layers = analysis["groups"], range(1, analysis["layers"] + 1)
        bars = [
            (token_label(group), color, table[group]["mass"])
            for group, color in zip([group for group in groups if group in table], cycle(COLOURS), strict=False)
        ]
        others = [table[group]["mass"] for group in table if group not in groups]
        if others:
            bars.append(("other prompt tokens", "#606060", [sum(values) for values in zip(*others, strict=True)]))
        title = f"{name}: where {whose} attention goes, by layer"
        with drawing(pictures, title, "layer", "share of attention", height=_height(len(bars))) as axis:
            bottom = [0.0] * len(layers)
            for label, color, share in bars:
                axis.bar(layers, share, bottom=bottom, width=1.0, color=color, label=label)
                bottom = [low + value for low, value in zip(bottom, share, strict=True)]
            axis.set_ylim(0, 1)
            axis.set_xlim(0.5, len(layers) + 0.5)
    return pictures


def activation_bars(runs: Sequence[Run]) -> list[str]:
    """max |h| of every token of one row in the layer of the largest activation."""
    sizes = [value for _, analysis in runs for value in analysis["example"]["activation"]["max_abs"]]
    pictures: list[str] = []
    for name, analysis in runs:
        example = analysis["example"]
        shown, labels = example["activation"], [token_label(token) for token in example["tokens"]]
        title = f"{name}: largest activation of every token in layer {shown['layer']}"
        width = max(4.6, _PITCH * len(labels) + 1.0)
        with drawing(pictures, title, "", "max |h|", width=width, height=3.4, legend=False) as axis:
            axis.bar(range(len(labels)), shown["max_abs"], color=COLOURS[0], width=0.8)
            axis.axhline(1000 * shown["median"], color=_GREY, linestyle="--", linewidth=1.0)
            axis.set_yscale("log")
            axis.set_ylim(min(sizes) / 2, max(*sizes, 1000 * shown["median"]) * 1.5)
            axis.set_xlim(-0.8, len(labels) - 0.2)
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
            axis.set_title(f"layer {shown['layer']}", loc="left")
    return pictures


def attention_maps(run: Run) -> list[str]:
    """Queries down, keys across, with token names; a figure for every map."""
    name, analysis = run
    labels = [token_label(token) for token in analysis["example"]["tokens"]]
    side = max(_CELL * len(labels) + 0.8, 2.6)
    pictures: list[str] = []
    for shown in analysis["example"]["maps"]:
        what = "mean over heads" if shown["head"] is None else f"head {shown['head']}"
        title = f"{name}: attention map of layer {shown['layer']}, {what}"
        with drawing(pictures, title, "", width=side, height=side + 0.3, legend=False) as axis:
            axis.imshow(shown["weights"], cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
            axis.set_yticks(range(len(labels)), labels, fontsize=6)
            axis.set_title(f"layer {shown['layer']}, {what}", fontsize=10, loc="left")
    return pictures


def contributions(run: Run) -> list[str]:
    """What attention and MLP of every layer add at the massive feature, and the residual stream after both: a figure
    for each of the labels with most massive tokens, BOS first."""
    name, analysis = run
    tokens = analysis["origin"]["tokens"]
    massive = [label for label in tokens if tokens[label]["massive"]]
    pictures: list[str] = []
    for label in sorted(massive, key=lambda label: (label != BOS, -tokens[label]["massive"]))[:LABELS]:
        found = tokens[label]
        layers = range(1, len(found["residual"]) + 1)
        title = f"{name}: origin of the massive activation of {label}"
        with drawing(pictures, title, "layer", f"feature {found['feature']}") as axis:
            for shift, key, text, color in ((-0.2, "attention", "attention", 1), (0.2, "mlp", "MLP", 0)):
                places = [layer + shift for layer in layers]
                axis.bar(places, found[key], 0.4, color=COLOURS[color], label=f"{text} adds")
            axis.plot(layers, found["residual"], color=COLOURS[6], linewidth=1.4, label="state after the layer")
            axis.set_title(token_label(label))
    return pictures


def rotations(run: Run) -> list[str]:
    """Largest activation and sink rate over the fraction by which states are rotated: a line for every sink, rotated
    away from BOS, and a dashed one for ordinary tokens, rotated toward it. Nothing when nothing was rotated."""
    name, analysis = run
    causal = analysis["causal"]
    lines = [(label, table, "-") for label, table in causal["sinks"].items() if table is not None]
    if causal["normal"] is not None:
        lines.append(("ordinary, toward BOS", causal["normal"], "--"))
    pictures: list[str] = []
    for key, ylabel in (("activation", "largest |h| in later layers"), ("sink_rate", "sink rate in later layers")):
        if not lines:
            continue
        title = f"{name}: {ylabel} by fraction of the rotation"
        with drawing(pictures, title, "fraction of the rotation", ylabel) as axis:
            for color, (label, table, style) in zip(cycle(COLOURS), lines, strict=False):
                values = table[key]
                axis.plot(
                    causal["fractions"], values, style, color=color, marker="o", label=token_label(label), linewidth=1.6
                )
            if key == "activation":
                axis.set_yscale("log")
    return pictures
