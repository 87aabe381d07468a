"""Inline SVG in the page's text color, light or dark, and plots that know nothing of sinks."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avsr.errors import visible

_INK = "#010203"  # becomes the page's text color
COLOURS = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#b8860b", "#8f6fd1", "#c0334d"),
    *("#5b8a3c", "#a0785a"),
)

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


@contextmanager
def styled() -> Iterator[None]:
    """Everything from the figure to its SVG happens in here."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Glyph.*")  # the browser's fonts draw the text
        yield


def panels(count: int = 1, *, width: float = 4.6, height: float = 3.2, share: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes side by side, each ``width`` x ``height`` inches."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=share)[0])


@contextmanager
def drawing(
    pictures: list[str],
    title: str,
    xlabel: str,
    ylabel: str = "",
    *,
    width: float = 4.6,
    height: float = 3.2,
    legend: bool = True,
) -> Iterator[Axes]:
    """One axis to draw on, ``width`` x ``height`` inches; on leaving, its SVG is appended to ``pictures``."""
    with styled():
        figure, (axis,) = panels(width=width, height=height)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        if xlabel == "layer":
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        yield axis
        if legend:
            legend_below(figure, axis)
        pictures.append(to_svg(figure, title))


def to_svg(figure: Figure, title: str) -> str:
    """The ``<svg>`` element. ``title``, its text alternative, must be unique on a page: the ids inside depend on it."""
    figure.patch.set_alpha(0.0)
    for axis in figure.axes:
        axis.patch.set_alpha(0.0)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids that do not change from day to day
        figure.savefig(out, format="svg", metadata={"Date": None, "Title": title})
    text = out.getvalue()
    marks = f'<svg role="img" aria-label="{html.escape(visible(title))}"'
    return _slim(visible(text[text.index("<svg") :], "\n\t")).replace("<svg", marks, 1).replace(_INK, "currentColor")


def _slim(svg: str) -> str:
    """Without comments, indentation, lists of fonts, and ids that nothing refers to (which would repeat from figure to
    figure)."""
    used = set(re.findall(r"#([\w.]+)", svg))
    svg = re.sub(r"'DejaVu Sans',[^;\"]*sans-serif", "sans-serif", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="([\w.]+)"', lambda found: found[0] if found[1] in used else "", svg)
    return re.sub(r"\n\s*", "\n", svg)


def token_label(name: str) -> str:
    """A token's text as a label: visible where it is blank, and without a meaning for matplotlib."""
    shown = name.strip() if name.strip().isprintable() and name.strip() else repr(name)[1:-1].replace(" ", "_")
    return shown.replace("$", r"\$")


def legend_below(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, handlelength=1.4, columnspacing=1.2)


def lines_over(labels: Sequence[str], curves: Sequence[tuple[str, Sequence[float]]], xlabel: str, ylabel: str) -> str:
    """One panel: every named curve over the same labeled points, from 0 up."""
    pictures: list[str] = []
    with drawing(pictures, f"{ylabel} by {xlabel}", xlabel, ylabel, width=5.2, legend=False) as axis:
        for color, (name, values) in zip(cycle(COLOURS), curves, strict=False):
            axis.plot(labels, values, label=name, color=color, linewidth=1.8, marker="o")
        axis.set_ylim(bottom=0)
        axis.legend()
    return pictures[0]


def training_curves(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    """Cross entropy, decorrelation and gradient norm over steps: a figure each, a line a run."""
    pictures: list[str] = []
    for key, label in (
        ("ce", "cross entropy (nats)"),
        ("decorrelation", "decorrelation loss"),
        ("grad_norm", "gradient norm"),
    ):
        if all(row.get(key) is None for _, rows in runs for row in rows):
            continue
        with drawing(pictures, f"Training: {label} by step", "step", label) as axis:
            for color, (name, rows) in zip(cycle(COLOURS), runs, strict=False):
                if points := _points(rows, key):
                    axis.plot(*zip(*points, strict=True), color=color, linewidth=1.0, label=name)
                if key == "ce" and (points := _points(rows, "validation_ce")):
                    axis.plot(*zip(*points, strict=True), "o", color=color, label=f"{name}, validation")
            axis.set_yscale("log")
    return pictures


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]
