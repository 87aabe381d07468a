"""The study's figures: validation curves of the main arms, and both forms of the loss over lambda."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avsr.tools.analysis.plots import COLOURS, panels, styled, to_svg
from bench.study.grid import HIGH, LOW, SEEDS, Arm
from bench.study.rows import strongest
from bench.svg import GREY, write

Rows = dict[str, dict[str, Any]]


def curves(rows: Rows, arms: Sequence[Arm], path: Path) -> None:
    """Validation cross entropy over steps, one line per seed."""
    with styled():
        figure, axes = panels(2, width=4.5, share=False)
        for axis, rate in zip(axes, (HIGH, LOW), strict=True):
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
        axes[0].set_ylabel("validation cross entropy (nats)")
        write(path, to_svg(figure, "validation cross entropy of the main arms over steps"))


def sweep(rows: Rows, weights: Sequence[float], margins: Sequence[float], seed: int, path: Path) -> None:
    """Over lambda, one seed: WER and the largest activations of BOS and of the strongest mark."""
    forms = [("paper", weights), ("margin", margins)]
    with styled():
        figure, (wer, activation) = panels(2, width=4.5, share=False)
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
            wer.axhline(off["scores"]["sentences"]["wer"], color=GREY, linestyle=":", label="off")
        for axis, label in ((wer, "word error rate"), (activation, "largest activation")):
            axis.set_xscale("log")
            axis.set_xlabel("lambda")
            axis.set_ylabel(label)
            if axis.has_data():
                axis.legend(fontsize=8)
        activation.set_yscale("log")
        write(path, to_svg(figure, "word error rate and largest activations over lambda"))
