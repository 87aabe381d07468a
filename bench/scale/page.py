"""Tables and figure of "Scale on paper"."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from avsr.tools.analysis.plots import panels, styled, to_svg
from avsr.tools.estimate.memory import Way, largest
from bench.runner import ledger, report
from bench.scale.check import TABLE
from bench.scale.model import Cluster, Link, Step, llama, needed, step
from bench.svg import GREY, write

FIGURE = ledger.RESULTS / "scale.svg"
PEAK = 989e12  # dense bf16 of an H100 or H200 (data sheet)
ASSUMED_MFU = 0.40
MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
TOKENS = (512, 2048, 8192)  # a rank and step
FREE = 0.1  # share of the memory
FITTED = ((2, 8, "false"), (3, 8, "false"), (3, 64, "false"), (2, 8, "selective"), (2, 8, "true"))
ETHERNET = Link(25e9 / 8 * 0.8 / 8, 50e-6)  # 25 Gb/s per node, shared by its eight devices


def cluster() -> tuple[Cluster, str]:
    """Nodes of eight 80 GB GPUs with NVLink and one 400 Gb/s adapter per GPU, and the source of the GPUs' speed.

    Links: data sheets (450 GB/s and 50 GB/s one way), of which rings reach about 80%. Latencies of 5 and 15 us, and
    30 ms of a step that do not depend on its batch, are assumptions.
    """
    share, source = _measured_mfu()
    return Cluster("8 x H100 a node", share * PEAK, 80e9, 8, Link(360e9, 5e-6), Link(40e9, 15e-6), fixed=0.03), source


def _measured_mfu() -> tuple[float, str]:
    rows = [row for row in ledger.read() if row["metric"] == "MFU" and "flashsink" in row["provider"] and row["ratio"]]
    if rows:
        return float(rows[-1]["ratio"]), f"measured on one {rows[-1]['device']}, {rows[-1]['date']}"
    return ASSUMED_MFU, "assumed, since no GPU has been measured yet"


def frames_table() -> str:
    """The largest packed batches by model, stage and ranks."""
    where, _ = cluster()
    lines = ["| tokens a rank that fit in 80 GB | " + " | ".join(MODELS) + " |", "|---|---:|---:|---:|"]
    for stage, ranks, checkpointing in FITTED:
        cells = []
        for name in MODELS:
            way, sizes = Way(ranks, stage, checkpointing=checkpointing), llama(name)
            most = largest(lambda n, s=sizes, w=way: needed(s, w, n) <= (1 - FREE) * where.memory)
            cells.append(f"{most:,}")
        kind = "" if checkpointing == "false" else f", gradient_checkpointing={checkpointing}"
        lines.append(f"| stage {stage}, {ranks} ranks{kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps_table() -> str:
    """Steps by model, stage, ranks and network."""
    where, _ = cluster()
    slow = replace(where, between=ETHERNET)
    titles = [f"{tokens:,} tokens a rank" for tokens in TOKENS]
    lines = ["| model | ZeRO, ranks | " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(TOKENS)]
    for name in MODELS:
        for stage, ranks, net, note in ((2, 8, where, ""), (2, 64, where, ""), (3, 64, where, ""), (3, 64, slow, "*")):
            taken = [step(llama(name), Way(ranks, stage), net, tokens) for tokens in TOKENS]
            cells = [f"{_milliseconds(one)}, {one.compute / one.seconds:.0%}" for one in taken]
            lines.append(f"| {name} | {stage}, {ranks}{note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _milliseconds(taken: Step) -> str:
    parts = [taken.compute, taken.waiting, taken.communication]
    return f"{taken.seconds * 1e3:,.0f} ms ({' + '.join(f'{1e3 * part:,.0f}' for part in parts)})"


def newest_rows(path: Path = TABLE) -> dict[tuple[str, str], dict[str, str]]:
    """The check's newest row of every (ranks, stage)."""
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["ranks"], row["stage"]): row for row in csv.DictReader(file)}


def check_table(path: Path = TABLE) -> str:
    """Predicted and measured seconds by ranks and stage."""
    newest = newest_rows(path)
    stages = sorted({stage for _, stage in newest})
    lines = ["| seconds a step, predicted / measured | " + " | ".join(f"stage {s}" for s in stages) + " |"]
    lines.append("|---|" + "---:|" * len(stages))
    for ranks in sorted({ranks for ranks, _ in newest}, key=int):
        cells = []
        for stage in stages:
            row = newest[ranks, stage]
            one, other = float(row["predicted_s"]), float(row["measured_s"])
            cells.append(f"{one:.2f} / {other:.2f} ({one / other - 1:+.0%})")
        lines.append(f"| {ranks} ranks | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path = FIGURE) -> None:
    """Memory over tokens, share of computing over tokens, and the check."""
    where, source = cluster()
    with styled():
        figure, (memory, computing, check) = panels(3, width=4.3, height=3.8, share=False)
        colors = dict(zip(MODELS, ("#0072b2", "#d55e00", "#009e73"), strict=True))
        tokens = [512 * 2**n for n in range(7)]
        kinds = ((2, "-", where, ""), (3, "--", where, ""), (3, ":", replace(where, between=ETHERNET), "25 Gb/s"))
        for name, color in colors.items():
            for stage, line, net, note in kinds:
                sizes, way = llama(name), Way(8, stage)
                if not note:
                    label = name if stage == 2 else None
                    memory.plot(tokens, [needed(sizes, way, n) / 1e9 for n in tokens], line, color=color, label=label)
                steps = [step(sizes, replace(way, ranks=64), net, n) for n in tokens]
                computing.plot(tokens, [one.compute / one.seconds for one in steps], line, color=color)
        memory.axhline(where.memory / 1e9, color=GREY, linewidth=0.8)
        memory.set(xscale="log", yscale="log", xlabel="tokens a rank and step", ylabel="GB a rank, 8 ranks")
        memory.set_title(f"solid: stage 2, dashed: stage 3; the line is {where.memory / 1e9:.0f} GB", fontsize=10)
        memory.legend(fontsize=8)
        computing.set(
            xscale="log", xlabel="tokens a rank and step", ylabel="share of the step that computes", ylim=(0, 1)
        )
        mfu = f"MFU {where.flops / PEAK:.0%} {source.split(',')[0]}"
        computing.set_title(f"64 ranks, {mfu}; solid: stage 2, dashed: 3,\ndotted: 3 over 25 Gb/s a node", fontsize=10)
        rows = list(newest_rows().values())
        for count, marker in zip(("1", "2", "4"), "os^", strict=True):
            points = [(float(row["measured_s"]), float(row["predicted_s"])) for row in rows if row["ranks"] == count]
            check.plot(*zip(*points, strict=True), marker, color=GREY, label=f"{count} CPU ranks", fillstyle="none")
        top = 1.1 * max(float(row[key]) for row in rows for key in ("measured_s", "predicted_s"))
        check.plot([0, top], [0, top], color=GREY, linewidth=0.8)
        check.set(xlabel="measured, seconds a step", ylabel="predicted", xlim=(0, top), ylim=(0, top))
        check.set_title("the check: stages 0, 2 and 3", fontsize=10)
        check.legend(fontsize=8)
        write(path, to_svg(figure, "scale on paper"))


def update() -> None:
    """Updates the tables of ``bench/README.md`` and draws the figure."""
    where, source = cluster()
    said = f"One GPU reaches {where.flops / 1e12:,.0f} TFLOP/s in a step ({where.flops / PEAK:.0%} MFU, {source})."
    report.write("scale", "\n\n".join([said, frames_table(), steps_table(), check_table()]))
    draw()
