"""Figures as inline SVG that follow the page's text colour, in light and in dark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK = "#010203"  # becomes the page's text colour
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#b8860b")

matplotlib.use("Agg")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def lines_by_layer(
    runs: Sequence[tuple[str, dict[str, Any]]],
    key: str,
    groups: Sequence[str],
    ylabel: str,
    *,
    log: bool = False,
) -> str:
    """A panel a run: ``key`` of every group over layers 1..L."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(runs))
        for axis, (name, analysis) in zip(axes, runs, strict=True):
            for colour, group in zip(COLOURS, groups, strict=False):
                if group in analysis["groups"]:
                    values = analysis["groups"][group][key]
                    axis.plot(range(1, len(values) + 1), values, label=group, color=colour, linewidth=1.8)
            axis.set_title(name)
            axis.set_xlabel("layer")
            if log:
                axis.set_yscale("log")
        axes[0].set_ylabel(ylabel)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
        return _svg(figure, f"{key} by layer")


def lines_over(labels: Sequence[str], curves: Sequence[tuple[str, Sequence[float]]], xlabel: str, ylabel: str) -> str:
    """One panel: every named curve over the same labelled points, from 0 up."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(1)
        for colour, (name, values) in zip(COLOURS, curves, strict=False):
            axes[0].plot(labels, values, label=name, color=colour, linewidth=1.8, marker="o")
        axes[0].set_ylim(bottom=0)
        axes[0].set_xlabel(xlabel)
        axes[0].set_ylabel(ylabel)
        axes[0].legend()
        return _svg(figure, f"{ylabel} by {xlabel}")


def heatmap_by_position(runs: Sequence[tuple[str, dict[str, Any]]], key: str, groups: Sequence[str]) -> str:
    """A panel a run: ``key`` by token (rows) and layer (columns), 0 to 1."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(runs), height=0.28 * len(groups) + 1.0)
        for axis, (name, analysis) in zip(axes, runs, strict=True):
            rows = [analysis["groups"][g][key] for g in groups if g in analysis["groups"]]
            image = axis.imshow(
                rows,
                aspect="auto",
                cmap="viridis",
                vmin=0,
                vmax=1,
                extent=(0.5, len(rows[0]) + 0.5, len(rows), 0),
            )
            axis.set_title(name)
            axis.set_xlabel("layer")
            axis.set_yticks([i + 0.5 for i in range(len(rows))], [g for g in groups if g in analysis["groups"]])
        figure.colorbar(image, ax=list(axes), label="share of heads")
        return _svg(figure, f"{key} by token and layer")


def attention_maps(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A panel a run: queries down, keys across, with token names."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(runs), height=4.6)
        for axis, (name, analysis) in zip(axes, runs, strict=True):
            shown = analysis["attention_map"]
            axis.imshow(shown["weights"], cmap="magma", vmin=0, vmax=1)
            ticks = range(len(shown["tokens"]))
            labels = [token.strip() or "_" for token in shown["tokens"]]
            axis.set_xticks(ticks, labels, rotation=90, fontsize=5)
            axis.set_yticks(ticks, labels, fontsize=5)
            axis.set_title(f"{name}, layer {shown['layer']}")
        return _svg(figure, "attention map")


def curves(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """Cross entropy, decorrelation and gradient norm over steps, a line a run."""
    keys = [
        ("ce", "cross entropy (nats)"),
        ("decorrelation", "decorrelation loss"),
        ("grad_norm", "gradient norm"),
    ]
    keys = [(key, label) for key, label in keys if any(key in row for _, rows in runs for row in rows)]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(keys), share=False)
        for axis, (key, label) in zip(axes, keys, strict=True):
            for colour, (name, rows) in zip(COLOURS, runs, strict=False):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.0, label=name)
                if key == "ce":
                    validated = [(r["step"], r["validation_ce"]) for r in rows if "validation_ce" in r]
                    if validated:
                        axis.plot(*zip(*validated, strict=True), "o", color=colour, label=f"{name}, validation")
            axis.set_yscale("log")
            axis.set_xlabel("step")
            axis.set_title(label)
        axes[0].legend(fontsize=8)
        return _svg(figure, "training curves")


def _panels(count: int, *, height: float = 3.2, share: bool = True) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4.6 * count + 0.6, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, sharey=share)[0]
    return figure, list(axes)


def _svg(figure: Figure, title: str) -> str:
    figure.patch.set_alpha(0.0)
    for axis in figure.axes:
        axis.patch.set_alpha(0.0)
    out = io.StringIO()
    # ids inside the page must differ from figure to figure, and not from day to day
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Title": title})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
