"""Tables and figures of the short study: RESULTS.md, curves.svg, sweep.svg, from the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from avsr.evaluation.wer import plain
from bench.study import corpus, human
from bench.study.figures import curves, sweep
from bench.study.grid import (
    ARMS,
    BEYOND,
    CONTROLS,
    FROZEN,
    HIGH,
    INFERENCE,
    LOW,
    MAIN,
    MARGIN_SWEEP,
    ORIGINS,
    PAPER_SWEEP,
    PEERS,
    RIVALS,
    SEEDS,
    START,
    SWEEP_SEED,
    Arm,
    margin,
    paper,
)  # fmt: skip
from bench.study.interventions import KINDS
from bench.study.rows import marks, massive_mark, read_rows, strongest
from bench.study.statistics import Difference, compare, holm

HERE = Path(__file__).parent
UTTERANCES = HERE / "utterances.json"
_SIDE = (
    "seeds", "WER", "INT8", "validation CE", "massive mark", "strongest mark", "its peak", "its sink rate", "cos2",
    "BOS peak", "BOS sink rate", "attention BOS", "marks", "speech", "text", "perplexity", "gradients", "their cosine",
)  # fmt: skip

Rows = dict[str, dict[str, Any]]


def keep_utterances() -> None:
    """Keeps words and speakers of the test sets for the statistics, since the corpus is not committed."""
    held = json.loads(UTTERANCES.read_text(encoding="utf-8")) if UTTERANCES.is_file() else {}
    paths = {**corpus.SETS}
    paths |= {f"settled {name}": human.FOLDER / f"settled_{name}.jsonl" for name in human.TESTS}
    for name, path in paths.items():
        if not path.is_file():
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        held[name] = {
            "words": [len(plain(line["text"]).split()) for line in lines],
            "speakers": [line["speaker"] for line in lines],
        }
    UTTERANCES.write_text(json.dumps(held) + "\n", encoding="utf-8")


def side_effects(rows: Rows, arm: Arm, seeds: Sequence[int] = SEEDS) -> list[str]:
    """The cells of ``_SIDE``, means over the available seeds."""
    found = [rows[k] for k in (Arm(arm.name, rate=arm.rate, seed=s).key for s in seeds) if k in rows]
    if not found:
        return ["0"] + [""] * (len(_SIDE) - 1)
    logged = [point for row in found for point in row["curve"] if "grad_norm_decorrelation" in point]
    cells = [
        str(len(found)),
        _mean((row["scores"]["sentences"]["wer"] for row in found), "{:.3f}"),
        _mean((row["scores"]["sentences int8"]["wer"] for row in found), "{:.3f}"),
        _mean((row["validation"][-1][1] for row in found), "{:.3f}"),
        *_sink_cells([row["sinks"] for row in found if "sinks" in row]),
        _mean((row["perplexity"] for row in found), "{:.1f}"),
    ]
    if logged:
        ratio = mean(p["grad_norm_decorrelation"] / p["grad_norm_ce"] for p in logged)
        return [*cells, f"{ratio:.2g}", f"{mean(p['grad_cosine'] for p in logged):.2f}"]
    return [*cells, "", ""]


def _sink_cells(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return [""] * 11
    names = [strongest(sinks) for sinks in found]
    mark = [sinks["groups"][name] for sinks, name in zip(found, names, strict=True)]
    bos = [sinks["groups"]["BOS"] for sinks in found]
    shares = [_shares(sinks) for sinks in found]
    return [
        str(sum(massive_mark(sinks) for sinks in found)),
        ", ".join(f"`{name}`" for name in dict.fromkeys(names)),
        _mean((m["peak"] for m in mark), "{:,.0f}"),
        _mean((m.get("sink_rate_corrected", 0.0) for m in mark), "{:.2f}"),
        _mean((sinks["cos2"] for sinks in found), "{:.3f}"),
        _mean((b["peak"] for b in bos), "{:,.0f}"),
        _mean((b.get("sink_rate_corrected", 0.0) for b in bos), "{:.2f}"),
        *(_mean((share[part] for share in shares), "{:.2f}") for part in ("BOS", "marks", "speech", "text")),
    ]


def _shares(sinks: dict[str, Any]) -> dict[str, float]:
    groups = sinks["groups"]
    shares = {name: groups[name]["mass"] for name in ("BOS", "speech", "text")}
    return {**shares, "marks": sum(group["mass"] for group in marks(sinks).values())}


def _mean(values: Iterable[float], form: str) -> str:
    return form.format(mean(values))


def origin_table(rows: Rows) -> str:
    """Sinks before and after training, by initialization of the delimiter tokens."""
    lines = []
    for arm in ORIGINS:
        before = [rows[k]["sinks"] for k in (START + Arm(FROZEN[arm.name], seed=s).key for s in SEEDS) if k in rows]
        after = [rows[k]["sinks"] for k in (Arm(arm.name, seed=s).key for s in SEEDS) if k in rows]
        name = "marks-normal-frozen-first (off)" if arm.name == "off" else arm.name
        lines.append([name, _state(before), _state(after)])
    return table(("delimiters", "before training", "after training"), lines)


def _state(found: list[dict[str, Any]]) -> str:
    """The strongest mark of every draw: names, and ranges of peak and sink rate."""
    if not found:
        return ""
    names = [strongest(sinks) for sinks in found]
    groups = [sinks["groups"][name] for sinks, name in zip(found, names, strict=True)]
    peaks = sorted(group["peak"] for group in groups)
    rates = sorted(group.get("sink_rate_corrected", 0.0) for group in groups)
    shown = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
    massive = sum(massive_mark(sinks) for sinks in found)
    return f"{shown} {_range(peaks, '{:,.0f}')}, {_range(rates, '{:.2f}')}; massive in {massive} of {len(found)}"


def _range(values: list[float], form: str) -> str:
    low, high = form.format(values[0]), form.format(values[-1])
    return low if low == high else f"{low}..{high}"


def comparisons(rows: Rows) -> list[tuple[str, Difference | None, int]]:
    """The primary comparison, then the secondary ones of PLAN.md: title, difference (None without a pair of seeds),
    number of seeds."""
    utterances = json.loads(UTTERANCES.read_text(encoding="utf-8"))
    _, paper_arm, margin_arm = MAIN
    wanted = []
    for rate, name, tests in ((HIGH, "high", ("sentences", "unseen_voices")), (LOW, "low", ("sentences",))):
        for test in tests:
            where = f"{name} rate" + (", unseen voices" if test != "sentences" else "")
            wanted += [
                (f"paper's form, {where}", rate, test, paper_arm.name, ""),
                (f"margin form, {where}", rate, test, margin_arm.name, ""),
                (f"ACT, {where}", rate, test, "off", INFERENCE),
            ]
    found = []
    for title, rate, test, name, prefix in wanted:
        pairs = [
            (rows[off]["scores"][test]["errors"], rows[on]["scores"][test]["errors"])
            for off, on in ((Arm("off", rate, s).key, prefix + Arm(name, rate, s).key) for s in SEEDS)
            if off in rows and on in rows
        ]
        held = utterances[test]
        difference = None
        if pairs:
            base, other = zip(*pairs, strict=True)
            difference = compare(base, other, held["words"], held["speakers"])
        found.append((title, difference, len(pairs)))
    return found


def main_table(rows: Rows) -> str:
    found = comparisons(rows)
    complete = all(seeds == len(SEEDS) for _, _, seeds in found)
    adjusted = holm([d.p for _, d, _ in found[1:] if d is not None]) if complete else []
    lines = []
    for index, (title, d, seeds) in enumerate(found):
        if d is None:
            lines.append([title, "0", *[""] * 8])
            continue
        corrected = "primary" if index == 0 else f"{adjusted[index - 1]:.3f}" if complete else ""
        interval = f"{d.low:+.4f} to {d.high:+.4f}"
        p_values = [f"{p:.4f}" if seeds == len(SEEDS) else "" for p in (d.p_bootstrap, d.p_seeds)]
        values = [f"{d.base:.4f}", f"{d.other:.4f}", f"{d.delta:+.4f}", interval, *p_values, corrected]
        lines.append([title, str(seeds), *values, f"{d.smallest:.4f}"])
    numbers = ("off", "with", "difference", "95% interval", "p bootstrap", "p seeds", "Holm", "smallest seen")
    return table(("against off", "seeds", *numbers), lines)


def side_table(rows: Rows, arms: Sequence[Arm], seeds: Sequence[int] = SEEDS) -> str:
    return table(("arm", *_SIDE), [[arm.name, *side_effects(rows, arm, seeds)] for arm in arms])


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    parts = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*parts, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def at_inference(rows: Rows) -> str:
    """The models of off changed without training: ACT, mean over seeds; changed massive activations, first seed."""
    lines = []
    for rate in (HIGH, LOW):
        keys = [Arm("off", rate, seed).key for seed in SEEDS]
        keys = [key for key in keys if key in rows and INFERENCE + key in rows]
        if not keys:
            continue
        changed = [rows[INFERENCE + key]["scores"] for key in keys]
        heads = rows[INFERENCE + keys[0]]["act_heads"]
        cells = [f"{mean(scores['sentences']['wer'] for scores in changed):.3f}"]
        cells += [f"{changed[0][f'massive {kind}']['wer']:.3f}" for kind in KINDS]
        off = mean(rows[key]["scores"]["sentences"]["wer"] for key in keys)
        lines.append([str(rate), str(len(keys)), f"{off:.3f}", str(len(heads)), *cells])
    changes = [f"seed {SEEDS[0]}, massive to {kind}" for kind in KINDS]
    head = ("rate", "seeds", "WER off", "ACT heads", "ACT", *changes)
    return table(head, lines)


def write_results(path: Path = HERE / "RESULTS.md") -> None:
    """Writes the page and its figures."""
    rows = read_rows()
    low = [Arm(arm.name, rate=LOW) for arm in MAIN]
    base = [key for key, arm in ARMS.items() if not arm.full]
    base_model = rows.get(START + Arm("off").key, {}).get("perplexity")
    unadapted = f" Perplexity of the model without adapters: {base_model:.1f}." if base_model else ""
    parts = [
        "# Results of the study\n",
        f"Written by `python -m bench.study --tables`; {sum(key in rows for key in base)} of {len(base)} "
        "trainings of the base grid are in. Terms are those of PLAN.md; marks are delimiters and prompt tokens; "
        "sink rates are the corrected ones; shares of attention are those of the text queries; both are means over "
        "layers 1..29 and heads. A peak is the largest mean over the utterances of any of these layers."
        f"{unadapted}\n",
        "## Main comparison\n", main_table(rows),
        "## Side effects, high rate\n", side_table(rows, MAIN),
        "## Side effects, low rate\n", side_table(rows, low),
        f"## Lambda sweep, high rate, seed {SWEEP_SEED}\n",
        side_table(rows, [Arm("off"), *map(paper, PAPER_SWEEP), *map(margin, MARGIN_SWEEP)], (SWEEP_SEED,)),
        "## Where sinks come from\n", origin_table(rows),
        "## Controls, high rate, seed 1, whose off ends without a massive mark\n",
        side_table(rows, [*MAIN, *CONTROLS], (1,)),
        f"## Controls and peers, high rate, seed {SWEEP_SEED}, whose off ends with one\n",
        side_table(rows, [*MAIN, *RIVALS, *PEERS], (SWEEP_SEED,)),
        "## At inference alone, on the models of off\n", at_inference(rows),
        f"## Beyond the paper, high rate, seed {SWEEP_SEED}\n", side_table(rows, [*MAIN, *BEYOND], (SWEEP_SEED,)),
    ]  # fmt: skip
    path.write_text("\n".join(parts), encoding="utf-8")
    curves(rows, MAIN, HERE / "curves.svg")
    sweep(rows, PAPER_SWEEP, MARGIN_SWEEP, SWEEP_SEED, HERE / "sweep.svg")
