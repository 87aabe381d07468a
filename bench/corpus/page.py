"""``python -m bench.corpus.page``: the section "Large corpora" of ``bench/README.md`` and its figure, from
``bench/results/corpus.csv``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from avsr.tools.analysis.plots import panels, styled, to_svg
from bench.corpus.run import RANKS, RESULTS
from bench.runner import ledger, report
from bench.svg import write

FIGURE = ledger.RESULTS / "corpus.svg"
LARGEST = "1700000"
BEFORE = "6ce3c91"  # the last commit that read manifests line by line
Rows = dict[tuple[str, str], dict[str, str]]
# a line of the table: what is measured, the rows' name, a field, its unit, and the aim
LINES = (
    ("the first start: an index is made, tokens are counted", "first start", "seconds", "s", ""),
    ("rows of the manifest", "read", "seconds", "s", "5 s"),
    ("", "read", "mb", "MB", "shared"),
    ("everything up to the first batch: rows, tokens, lengths, order, overlaps", "start", "seconds", "s", "15 s"),
    ("", "start", "mb", "MB", "200 MB"),
    ("order of an epoch", "order", "seconds", "s", "1 s"),
    ("", "order", "mb", "MB", ""),
    ("a loader process, of four", "loader", "mb", "MB", "100 MB"),
)


def newest(path: Path = RESULTS) -> dict[bool, Rows]:
    """The newest row of every line and number of rows: of ``BEFORE``, and of all else."""
    found: dict[bool, Rows] = {True: {}, False: {}}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["commit"].startswith(BEFORE)][row["line"], row["rows"]] = row
    return found


def table(found: dict[bool, Rows]) -> str:
    lines = [f"| 1.7 million rows, one core | {BEFORE} | now | aim |", "|---|---:|---:|---:|"]
    for title, name, field, unit, aim in LINES:
        cells = [_cell(found[before], name, field, unit) for before in (True, False)]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {aim} |")
    few, many = (found[False].get((f"{RANKS} ranks", count)) for count in ("100", LARGEST))
    each = "-" if few is None or many is None else f"{(float(many['mb']) - float(few['mb'])) / RANKS:,.0f} MB"
    lines.append(f"| {RANKS} ranks on one node, more than with 100 rows, each | - | {each} | 200 MB |")
    cached = [{line: row for (line, _), row in found[before].items()} for before in (True, False)]
    counts = [next((row["rows"] for row in part.values() if row["line"] == "cached start"), "0") for part in cached]
    lines += [
        "",
        f"| feature cache | {int(counts[0]):,} clips, {BEFORE} | {int(counts[1]):,} clips, now |",
        "|---|---:|---:|",
    ]
    for line, title in (
        ("measure all clips", "`avsr index` measures every clip, two cores"),
        ("fill the cache", "filled, without decoding"),
        ("files of the cache", "files"),
        ("cached start", "a start"),
        ("cached start, slow", "a start where every open and stat takes 1 ms"),
    ):
        cells = []
        for part in cached:
            row = part.get(line, {})
            seconds = f"{float(row['seconds']):,.1f} s" if row.get("seconds") else ""
            cells.append(", ".join(filter(None, [seconds, row.get("note", "")])) or "-")
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _cell(rows: Rows, name: str, field: str, unit: str) -> str:
    """A number of the largest manifest; where that was not measured, by a line through the smallest and the largest."""
    counts = sorted(int(count) for line, count in rows if line == name)
    if not counts or not rows[name, str(counts[-1])][field]:
        return "-"
    low, high = (float(rows[name, str(count)][field]) for count in (counts[0], counts[-1]))
    value = high
    if counts[-1] != int(LARGEST):
        value = low + (high - low) * (int(LARGEST) - counts[0]) / (counts[-1] - counts[0])
    shown = f"{value:,.3f} {unit}" if value < 1 else f"{value:,.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return shown if counts[-1] == int(LARGEST) else f"~ {shown}"


def draw(found: dict[bool, Rows], path: Path = FIGURE) -> None:
    """Seconds and memory of a start over the number of rows."""
    with styled():
        figure, axes = panels(3, width=4.2, height=3.6, share=False)
        for axis, (line, field, label) in zip(
            axes,
            (
                ("start", "seconds", "seconds of a start"),
                ("start", "mb", "MB of a start"),
                ("loader", "mb", "MB of a loader process"),
            ),
            strict=True,
        ):
            for before, color, name in ((True, "#d55e00", BEFORE), (False, "#0072b2", "now")):
                points = sorted(
                    (int(rows), float(row[field])) for (key, rows), row in found[before].items() if key == line
                )
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=color, label=name)
            axis.set(xscale="log", yscale="log", xlabel="rows of the manifest", ylabel=label)
            axis.minorticks_off()
            axis.legend(fontsize=8)
        write(path, to_svg(figure, "large corpora"))


def main() -> int:
    found = newest()
    report.write("corpora", table(found))
    draw(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
