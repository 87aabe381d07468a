"""Tables and figures of the settled study: SETTLED.md, settled-*.svg, from the rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from avsr.tools.analysis.plots import COLOURS, panels, styled, to_svg
from bench.study import human, settled
from bench.study.grid import INFERENCE, SEEDS, Arm
from bench.study.rows import marks, massive_mark, read_rows, strongest
from bench.study.statistics import Difference, compare, holm
from bench.study.tables import UTTERANCES, table
from bench.svg import GREY, write

HERE = Path(__file__).parent
PAPER = settled.CORE[1]
NAMES = {
    settled.OFF.name: "off",
    PAPER.name: f"paper's form, lambda {PAPER.weight:g}",
    settled.MARGIN_FORM.name: f"margin form, lambda {settled.MARGIN_FORM.weight:g}",
    settled.NORM.name: f"norm penalty, lambda {settled.NORM.weight:g}",
    settled.ANCHORED.name: f"anchored form, margin, lambda {settled.ANCHORED.weight:g}",
    settled.ANCHORED_WHOLE.name: f"anchored form, no margin, lambda {settled.ANCHORED_WHOLE.weight:g}",
}

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """One arm against off on a test; ``difference`` is None without a pair of seeds."""

    name: str
    test: str
    seeds: int
    difference: Difference | None


def comparisons(rows: Rows) -> list[Comparison]:
    """The primary comparison first, then the secondary ones of PLAN.md."""
    wanted = [(arm, "texts", "") for arm in settled.CORE[1:]]
    wanted += [(settled.OFF, "texts", INFERENCE)]
    wanted += [(arm, test, "") for test in list(human.TESTS)[1:] for arm in settled.CORE[1:]]
    return [_comparison(rows, arm, test, prefix) for arm, test, prefix in wanted]


def _comparison(rows: Rows, arm: Arm, test: str, prefix: str) -> Comparison:
    keys = [(replace(settled.OFF, seed=s).key, prefix + replace(arm, seed=s).key) for s in SEEDS]
    keys = [both for both in keys if all(key in rows for key in both)]
    difference = None
    if keys:
        base, other = ([rows[both[side]]["scores"][test]["errors"] for both in keys] for side in (0, 1))
        held = json.loads(UTTERANCES.read_text(encoding="utf-8"))[f"settled {test}"]
        difference = compare(base, other, held["words"], held["speakers"])
    return Comparison("ACT (beta 0.4) on off" if prefix else NAMES[arm.name], test, len(keys), difference)


def comparison_table(found: Sequence[Comparison]) -> str:
    """With Holm's correction of all but the first, once every comparison has all seeds."""
    complete = all(one.seeds == len(SEEDS) for one in found)
    adjusted = holm([one.difference.p for one in found[1:] if one.difference]) if complete else []
    lines = []
    for index, one in enumerate(found):
        head = [one.name, one.test, str(one.seeds)]
        if one.difference is None:
            lines.append([*head, *[""] * 7])
            continue
        d = one.difference
        tested = one.seeds > 1  # one pair of seeds says nothing about others
        corrected = "primary" if index == 0 else f"{adjusted[index - 1]:.3f}" if complete else ""
        interval = f"{d.low:+.3f} to {d.high:+.3f}" if tested else ""
        ends = [interval, f"{d.p:.4f}" if tested else "", corrected, f"{d.smallest:.3f}" if tested else ""]
        lines.append([*head, f"{d.base:.3f}", f"{d.other:.3f}", f"{d.delta:+.3f}", *ends])
    columns = (
        "against off",
        "test",
        "seeds",
        "off",
        "with",
        "difference",
        "95% interval",
        "p",
        "Holm",
        "smallest seen",
    )
    return table(columns, lines)


def arm_table(rows: Rows, arms: Sequence[Arm], seeds: Sequence[int]) -> str:
    """Means over the seeds that are there."""
    lines = []
    for arm in arms:
        found = [rows[key] for key in (replace(arm, seed=seed).key for seed in seeds) if key in rows]
        name = NAMES.get(arm.name, f"paper's form, lambda {arm.weight:g}")
        lines.append([name, str(len(found)), *(_cells(found) if found else [""] * 12)])
    head = (
        "arm", "seeds", *human.TESTS, "validation CE", "massive mark", "strongest mark", "its peak", "its sink rate",
        "BOS peak", "cos2", "perplexity",
    )  # fmt: skip
    return table(head, lines)


def _cells(found: list[dict[str, Any]]) -> list[str]:
    strong = [strongest(row["sinks"]) for row in found]
    mark = [row["sinks"]["groups"][name] for row, name in zip(found, strong, strict=True)]
    return [
        *(f"{mean(row['scores'][test]['wer'] for row in found):.3f}" for test in human.TESTS),
        f"{mean(row['validation'][-1][1] for row in found):.3f}",
        f"{sum(massive_mark(row['sinks']) for row in found)} of {len(found)}",
        ", ".join(f"`{name}`" for name in dict.fromkeys(strong)),
        f"{mean(group['peak'] for group in mark):,.0f}",
        f"{mean(group.get('sink_rate_corrected', 0.0) for group in mark):.2f}",
        f"{mean(row['sinks']['groups']['BOS']['peak'] for row in found):,.0f}",
        f"{mean(row['sinks']['cos2'] for row in found):.3f}",
        f"{mean(row['perplexity'] for row in found):.1f}",
    ]


def removed(row: dict[str, Any], off: dict[str, Any]) -> bool:
    """Whether the row's arm has removed the sinks: marks below a tenth of off's largest, BOS above half of its own."""
    limit = max(group["peak"] for group in marks(off["sinks"]).values()) / 10
    kept = row["sinks"]["groups"]["BOS"]["peak"] > off["sinks"]["groups"]["BOS"]["peak"] / 2
    return kept and all(group["peak"] < limit for group in marks(row["sinks"]).values())


def removal_table(rows: Rows) -> str:
    """In how many seeds each arm removes the sinks that off has."""
    lines = []
    for arm in settled.CORE[1:]:
        pairs = [(replace(arm, seed=s).key, replace(settled.OFF, seed=s).key) for s in SEEDS]
        held = [(rows[on], rows[off]) for on, off in pairs if on in rows and off in rows]
        asked = [pair for pair in held if massive_mark(pair[1]["sinks"])]
        lines.append([NAMES[arm.name], str(len(asked)), str(sum(removed(*pair) for pair in asked))])
    return table(("arm", "seeds whose off has a massive mark", "removed in"), lines)


def curves(rows: Rows, path: Path) -> None:
    """Validation cross entropy over steps, a line a seed."""
    with styled():
        figure, (axis,) = panels(1, width=6.0, share=False)
        for colour, arm in zip(COLOURS, settled.CORE, strict=False):
            found = [rows[key] for key in (replace(arm, seed=seed).key for seed in SEEDS) if key in rows]
            for index, row in enumerate(found):
                label = NAMES[arm.name] if index == 0 else None
                axis.plot(*zip(*row["validation"], strict=True), color=colour, label=label, linewidth=1)
        axis.set(xlabel="step", ylabel="validation cross entropy (nats)")
        if axis.has_data():
            axis.legend(fontsize=8)
        write(path, to_svg(figure, "validation cross entropy of the core arms over steps"))


def differences(found: Sequence[Comparison], path: Path) -> None:
    """Differences of WER to off with their intervals."""
    shown = [(one, one.difference) for one in found if one.difference is not None and one.seeds > 1]
    with styled():
        figure, (axis,) = panels(1, width=6.0, share=False)
        for place, (one, d) in enumerate(reversed(shown)):
            colour = COLOURS[list(human.TESTS).index(one.test)]
            ends = [[d.delta - d.low], [d.high - d.delta]]
            axis.errorbar(d.delta, place, xerr=ends, fmt="o", color=colour, markersize=3)
        axis.set_yticks(range(len(shown)), [f"{one.name}: {one.test}" for one, _ in reversed(shown)], fontsize=7)
        axis.axvline(0, color=GREY, linewidth=0.5)
        axis.set_xlabel("difference of the word error rate to off")
        write(path, to_svg(figure, "differences of the word error rate to off, with 95% intervals"))


def write_settled(path: Path = HERE / "SETTLED.md") -> None:
    """Writes the page and its figures."""
    rows = read_rows()
    found = comparisons(rows)
    sweep = [settled.OFF, *map(settled.paper, settled.PAPER_SWEEP), settled.ANCHORED, settled.ANCHORED_WHOLE]
    done = sum(key in rows for key in settled.ARMS)
    parts = [
        "# Results of the settled study\n",
        f"Written by `python -m bench.study --tables`; {done} of {len(settled.ARMS)} trainings are in. Columns with "
        "the name of a test are word error rates. Terms are those of RESULTS.md.\n",
        "## Against off\n", comparison_table(found),
        f"## Arms, rate 32, seeds {SEEDS[0]} to {SEEDS[-1]}\n", arm_table(rows, settled.CORE, SEEDS),
        "## Are the sinks removed?\n", removal_table(rows),
        f"## Sweep, rate 32, seed {settled.SWEEP_SEED}\n", arm_table(rows, sweep, (settled.SWEEP_SEED,)),
        "![Validation cross entropy](settled-curves.svg)\n\n![Differences](settled-differences.svg)\n",
    ]  # fmt: skip
    path.write_text("\n".join(parts), encoding="utf-8")
    curves(rows, path.parent / "settled-curves.svg")
    differences(found, path.parent / "settled-differences.svg")
