"""The report's sections on causes: where massive activations are made, in which features, and whether direction alone
makes a sink. They draw what ``trace_origin``, ``feature_sets`` and ``causal_test`` return."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes

from avsr.tools.analysis.plots import COLOURS, legend_below, panels, styled, to_svg, token_label

Run = tuple[str, dict[str, Any]]
LABELS = 3  # whose origin is drawn; the table has all


def origin_labels(origin: dict[str, Any]) -> list[str]:
    """The labels with massive tokens, BOS first; those with most of them."""
    tokens = origin["tokens"]
    found = [name for name in tokens if tokens[name]["massive"]]
    return sorted(found, key=lambda name: (name != "BOS", -tokens[name]["massive"]))[:LABELS]


def contributions(run: Run) -> list[str]:
    """For each of ``origin_labels`` a figure: what attention and MLP of every layer add at the massive feature, and the
    residual after both."""
    name, analysis = run
    pictures = []
    for label in origin_labels(analysis["origin"]):
        found = analysis["origin"]["tokens"][label]
        layers = range(1, len(found["residual"]) + 1)
        with styled():
            figure, (axis,) = panels()
            axis.bar(
                [layer - 0.2 for layer in layers], found["attention"], 0.4, color=COLOURS[1], label="attention adds"
            )
            axis.bar([layer + 0.2 for layer in layers], found["mlp"], 0.4, color=COLOURS[0], label="MLP adds")
            axis.plot(layers, found["residual"], color=COLOURS[6], linewidth=1.4, label="state after the layer")
            axis.set_xlabel("layer")
            axis.set_ylabel(f"feature {found['feature']}")
            axis.set_title(token_label(label))
            legend_below(figure, axis)
            pictures.append(to_svg(figure, f"{name}: origin of the massive activation of {label}"))
    return pictures


def turning(run: Run) -> list[str]:
    """Largest activation and sink rate over the fraction by which states are turned: a line for every sink, turned away
    from BOS, and a dashed one for ordinary tokens, turned towards it. Nothing when nothing was turned."""
    name, analysis = run
    causal = analysis["causal"]
    tables = [(label, table, "-") for label, table in causal["sinks"].items() if table is not None]
    if causal["normal"] is not None:
        tables.append(("ordinary, towards BOS", causal["normal"], "--"))
    pictures: list[str] = []
    if not tables:
        return pictures
    for key, title in (("activation", "largest |h| in later layers"), ("sink_rate", "sink rate in later layers")):
        with styled():
            figure, (axis,) = panels()
            _draw(axis, causal["fractions"], tables, key)
            axis.set_ylabel(title)
            if key == "activation":
                axis.set_yscale("log")
            legend_below(figure, axis)
            pictures.append(to_svg(figure, f"{name}: {title} by fraction of the turn"))
    return pictures


def _draw(axis: Axes, fractions: Sequence[float], tables: Sequence[tuple[str, dict[str, Any], str]], key: str) -> None:
    for colour, (label, table, style) in zip(cycle(COLOURS), tables, strict=False):
        axis.plot(fractions, table[key], style, color=colour, marker="o", label=token_label(label), linewidth=1.6)
    axis.set_xlabel("fraction of the turn")
