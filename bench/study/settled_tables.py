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
from bench.study.grid import HIGH, INFERENCE, LOW, SEEDS, Arm
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
    """One arm against off on a test, with the seeds that are there of those planned; ``difference`` is None without a
    pair of seeds."""

    name: str
    test: str
    seeds: int
    planned: int
    difference: Difference | None


def comparisons(rows: Rows) -> list[Comparison]:
    """The primary comparison first, then the secondary ones of PLAN.md."""
    wanted = [(arm, "texts", "") for arm in settled.CORE[1:]]
    wanted += [(settled.OFF, "texts", INFERENCE)]
    wanted += [(arm, test, "") for test in list(human.TESTS)[1:] for arm in settled.CORE[1:]]
    wanted += [(arm, "texts", "") for arm in settled.AT_RATES if arm.rate == LOW and arm.name != settled.OFF.name]
    return [_comparison(rows, arm, test, prefix) for arm, test, prefix in wanted]


def _comparison(rows: Rows, arm: Arm, test: str, prefix: str = "") -> Comparison:
    seeds = SEEDS if arm.rate == HIGH else settled.FEWER_SEEDS
    off = replace(settled.OFF, rate=arm.rate)
    keys = [(replace(off, seed=s).key, prefix + replace(arm, seed=s).key) for s in seeds]
    keys = [both for both in keys if all(key in rows for key in both)]
    difference = None
    if keys:
        base, other = ([rows[both[side]]["scores"][test]["errors"] for both in keys] for side in (0, 1))
        held = json.loads(UTTERANCES.read_text(encoding="utf-8"))[f"settled {test}"]
        difference = compare(base, other, held["words"], held["speakers"])
    name = "ACT (beta 0.4) on off" if prefix else NAMES[arm.name]
    name += "" if arm.rate == HIGH else f", rate {arm.rate}"
    return Comparison(name, test, len(keys), len(seeds), difference)


def comparison_table(found: Sequence[Comparison]) -> str:
    """With Holm's correction of all but the first, once every comparison has all seeds."""
    complete = all(one.seeds == one.planned for one in found)
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


def doubled_table(rows: Rows, primary: Comparison) -> str:
    """The primary difference of one seed after N and after 2N steps; settled if it moves by less than its interval."""
    pairs = [tuple(settled.CORE[:2]), tuple(settled.DOUBLED)]
    lines, moved = [], []
    for off, paper in pairs:
        wer = [rows[arm.key]["scores"]["texts"]["wer"] for arm in (off, paper) if arm.key in rows]
        if len(wer) == 2:
            moved.append(wer[1] - wer[0])
        cells = [f"{wer[0]:.3f}", f"{wer[1]:.3f}", f"{wer[1] - wer[0]:+.3f}"] if len(wer) == 2 else [""] * 3
        lines.append([str(off.steps or settled.STEPS), *cells, ""])
    d = primary.difference
    if len(moved) == 2 and d is not None and primary.seeds > 1:
        lines[-1][-1] = "yes" if abs(moved[1] - moved[0]) < d.high - d.low else "no"
    return table(("steps", "off", "paper's form", "difference", "settled"), lines)


def rate_comparisons(rows: Rows) -> list[tuple[int, Comparison]]:
    """The paper's form against off on *texts*, by rate."""
    arms = [arm for arm in settled.AT_RATES if arm.name == PAPER.name]
    found = [(arm.rate, _comparison(rows, arm, "texts")) for arm in [PAPER, *arms]]
    return sorted(found, key=lambda pair: pair[0])


def rate_table(found: Sequence[tuple[int, Comparison]]) -> str:
    lines = []
    for rate, one in found:
        d = one.difference
        numbers = [""] * 4
        if d is not None:
            interval = f"{d.low:+.3f} to {d.high:+.3f}" if one.seeds > 1 else ""
            numbers = [f"{d.base:.3f}", f"{d.other:.3f}", f"{d.delta:+.3f}", interval]
        lines.append([str(rate), f"{one.seeds} of {one.planned}", *numbers])
    return table(("rate", "seeds", "off", "paper's form", "difference", "95% interval"), lines)


def rates(found: Sequence[tuple[int, Comparison]], path: Path) -> None:
    """Differences of WER over the rate, with their intervals as a band."""
    shown = [(rate, one.difference) for rate, one in found if one.difference is not None and one.seeds > 1]
    with styled():
        figure, (axis,) = panels(1, width=6.0, share=False)
        if shown:
            x = [rate for rate, _ in shown]
            axis.fill_between(x, [d.low for _, d in shown], [d.high for _, d in shown], color=COLOURS[0], alpha=0.2)
            axis.plot(x, [d.delta for _, d in shown], "o-", color=COLOURS[0], markersize=3)
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, map(str, x))
        axis.axhline(0, color=GREY, linewidth=0.5)
        axis.set(xlabel="encoder frames per token", ylabel="difference of the word error rate to off")
        write(path, to_svg(figure, "paper's form against off over the compression rate, with 95% intervals"))


def fragile_table(rows: Rows) -> str:
    """One seed an arm."""
    lines = []
    for layernorm in (True, False):
        for rate in settled.LEARNING_RATES:
            keys = [settled.fragile(arm, rate, layernorm).key for arm in settled.CORE[:2]]
            cells = [f"{rows[key]['scores']['texts']['wer']:.3f}" if key in rows else "" for key in keys]
            lines.append([f"{rate:g}", "yes" if layernorm else "no", *cells])
    return table(("learning rate", "LayerNorm", "off", "paper's form"), lines)


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
        f"## Twice {settled.STEPS} steps, seed {SEEDS[0]}\n", doubled_table(rows, found[0]),
        "## Rates: the paper's form against off on *texts*\n", rate_table(rate_comparisons(rows)),
        "## A fragile baseline? WER on *texts*, seed 1, exploratory\n", fragile_table(rows),
        *(f"![{name}](settled-{name.lower()}.svg)\n" for name in ("Curves", "Differences", "Rates")),
    ]  # fmt: skip
    path.write_text("\n".join(parts), encoding="utf-8")
    curves(rows, path.parent / "settled-curves.svg")
    differences(found, path.parent / "settled-differences.svg")
    rates(rate_comparisons(rows), path.parent / "settled-rates.svg")
