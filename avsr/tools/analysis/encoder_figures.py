"""Figures of the analysis of speech encoders; ``Run`` is a name with its analysis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from avsr.tools.analysis.encoder_collect import CLIP, END, PADDING_END, PADDING_START, START
from avsr.tools.analysis.figures import Run, heat
from avsr.tools.analysis.plots import COLOURS, drawing

LINES = 6  # layers that are drawn, at even distances, the last one among them
WINDOWS = {  # with the labels of their axes
    CLIP: "share of the clip",
    START: "seconds from the clip's beginning",
    END: "seconds before the clip's end",
    PADDING_START: "seconds of padding after the clip",
    PADDING_END: "seconds before 30 s",
}


def multiples_by_head(runs: Sequence[Run]) -> list[str]:
    """The largest multiple of uniform attention by head (rows) and layer (columns), mean over clips; one scale."""
    most = max(value for _, analysis in runs for heads in analysis["heads"]["multiple"] for value in heads)
    norm = LogNorm(1.0, max(most, 1.1))
    return [_by_head(run, "multiple", "largest multiple", norm=norm) for run in runs]


def shares_by_head(runs: Sequence[Run], key: str, what: str) -> list[str]:
    """A share by head and layer; "" for a run that has none."""
    return [_by_head(run, key, what) if run[1]["heads"][key] else "" for run in runs]


def _by_head(run: Run, key: str, what: str, norm: LogNorm | None = None) -> str:
    name, analysis = run
    rows = [list(heads) for heads in zip(*analysis["heads"][key], strict=True)]
    pictures: list[str] = []
    title, height = f"{name}: {what} by layer and head", min(0.2 * len(rows) + 1.4, 4.6)
    with drawing(pictures, title, "layer", "head", height=height, legend=False) as axis:
        heat(axis, rows, norm)
        axis.set_title(what)
        axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return pictures[0]


def over_time(runs: Sequence[Run], window: str) -> list[str]:
    """The mean multiple of uniform attention in a window, a line for each of a few layers; axes of the same range. ""
    for a run without it."""
    values = [
        value
        for _, analysis in runs
        for line in analysis["time"].get(window, [])
        for value in line
        if value is not None
    ]
    pictures: list[str] = []
    for name, analysis in runs:
        lines: list[list[Any]] = analysis["time"].get(window, [])
        if not lines:
            pictures.append("")
            continue
        bins, rate = len(lines[0]), analysis["identity"]["frames_per_second"]
        reach = 1.0 if window == CLIP else bins / rate
        backwards = window in (END, PADDING_END)
        shown = [(place + 0.5) / bins * reach for place in range(bins)]
        shown = [x - reach for x in shown] if backwards else shown
        with drawing(pictures, f"{name}: {window}, attention by time", WINDOWS[window], "multiple") as axis:
            for color, layer in zip(cycle(COLOURS), _few(len(lines)), strict=False):
                points = [(x, y) for x, y in zip(shown, lines[layer], strict=True) if y]
                axis.plot(*zip(*points, strict=True), color=color, label=f"layer {layer + 1}", linewidth=1.5)
            axis.axhline(1.0, color=COLOURS[6], linestyle="--", linewidth=1.0)
            axis.set_yscale("log")
            axis.set_ylim(min(value for value in values if value) / 1.2, max(values) * 1.2)
    return pictures


def _few(layers: int) -> list[int]:
    count = min(layers, LINES)
    return [round((n + 1) * layers / count) - 1 for n in range(count)]
