"""The study's pictures: validation curves of the main arms, and both forms over lambda."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from avsr.tools.analysis.figures import COLOURS
from bench.study.arms import HIGH, LOW, SEEDS, Arm
from bench.study.rows import strongest

matplotlib.use("Agg")
_INK = "#808080"  # reads on white and on black
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",
    **{name: _INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

Rows = dict[str, dict[str, Any]]


def curves(rows: Rows, arms: Sequence[Arm], path: Path) -> None:
    """Validation cross entropy over steps, a line a seed."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        for axis, rate in zip(figure.subplots(1, 2), (HIGH, LOW), strict=True):
            for colour, arm in zip(COLOURS, arms, strict=False):
                found = [rows[k] for k in (Arm(arm.name, rate, s).key for s in SEEDS) if k in rows]
                for index, row in enumerate(found):
                    label = arm.name if index == 0 else None
                    axis.plot(*zip(*row["validation"], strict=True), color=colour, label=label, linewidth=1)
            axis.set_title(f"rate {rate}")
            axis.set_xlabel("step")
            axis.set_yscale("log")
            if axis.has_data():
                axis.legend()
        figure.axes[0].set_ylabel("validation cross entropy (nats)")
        _save(figure, path)


def sweep(rows: Rows, weights: Sequence[float], margins: Sequence[float], seed: int, path: Path) -> None:
    """Over lambda, one seed: WER and the largest activations of BOS and of the marks."""
    forms = [("paper", weights), ("margin", margins)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        wer, activation = figure.subplots(1, 2)
        for colour, (form, values) in zip(COLOURS, forms, strict=False):
            found = [(w, rows[k]) for w in values if (k := Arm(f"{form}-{w:g}", seed=seed).key) in rows]
            if not found:
                continue
            at = [weight for weight, _ in found]
            wer.plot(at, [row["scores"]["sentences"]["wer"] for _, row in found], "o-", color=colour, label=form)
            held = [row["sinks"] for _, row in found]
            activation.plot(at, [s["groups"]["BOS"]["peak"] for s in held], "o--", color=colour, label=f"{form}: BOS")
            others = [s["groups"][strongest(s)]["peak"] for s in held]
            activation.plot(at, others, "o-", color=colour, label=f"{form}: strongest mark")
        off = rows.get(Arm("off", seed=seed).key)
        if off:
            wer.axhline(off["scores"]["sentences"]["wer"], color=_INK, linestyle=":", label="off")
        for axis, label in ((wer, "word error rate"), (activation, "largest activation")):
            axis.set_xscale("log")
            axis.set_xlabel("lambda")
            axis.set_ylabel(label)
            if axis.has_data():
                axis.legend(fontsize=8)
        activation.set_yscale("log")
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.patch.set_alpha(0)
    for axis in figure.axes:
        axis.patch.set_alpha(0)
    figure.savefig(path, format="svg", metadata={"Date": None})
