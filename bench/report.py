"""The claim table as Markdown, from the ledger: ``python bench/report.py`` prints it, ``--write`` puts it into
``bench/README.md`` between its marks, ``--add FILE`` first appends the rows that a run on another machine kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the repository root is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import ledger
from bench.ledger import HOST_BOUND, Row

README = ledger.ROOT / "bench" / "README.md"
BEGIN, END = "<!-- claims: made by bench/report.py -->", "<!-- claims end -->"
NOT_MEASURED = "not measured"
COLUMNS = {"CPU, 2 cores": "cpu", "H200": "gpu"}
# devices of a column, by a part of their name
DEVICES = {"cpu": ("CPU",), "gpu": ("H200",)}


def claims() -> list[tuple[str, str, str, str]]:
    """(name, text, target on the CPU, target on an H200) in the order of the table."""
    import importlib

    from bench.claims import MODULES

    found = []
    for name in MODULES:
        module = importlib.import_module(f"bench.claims.{name}")
        found += [(claim.name, claim.text, claim.cpu, claim.gpu) for claim in module.CLAIMS]
    return found


def table(rows: Sequence[Row]) -> str:
    """Two columns a device: the target, and the latest ratios with their verdict."""
    lines = ["| claim, ratio in one run | CPU target | CPU, 2 cores | H200 target | H200 |", "|---|---|---|---|---|"]
    for name, text, cpu, gpu in claims():
        cells = [text]
        for target, column in ((cpu, "cpu"), (gpu, "gpu")):
            cells += [target, "-" if target == "-" else measured(rows, name, column)]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def measured(rows: Sequence[Row], claim: str, column: str) -> str:
    """The newest verdict of every shape: a span of ratios for those of one metric and target."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["claim"] == claim and row["verdict"] and any(part in row["device"] for part in DEVICES[column]):
            # peers stand in the ledger too; what has no target counts where nothing of the claim has one
            note = row["note"].removesuffix(HOST_BOUND).removesuffix("; ")
            key = (*(row[field] for field in ("metric", "target", "shape", "dtype")), note)
            if row["ratio"] and "flashsink" in row["provider"]:
                newest[key] = row
    with_target = {key: row for key, row in newest.items() if row["target"]}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in (with_target or newest).values():
        groups.setdefault((row["metric"], row["target"]), []).append(row)
    return (
        "<br>".join(_cell(metric, target, group) for (metric, target), group in sorted(groups.items())) or NOT_MEASURED
    )


def _cell(metric: str, target: str, group: list[Row]) -> str:
    ratios = sorted(float(row["ratio"]) for row in group)
    span = f"{ratios[0]:.3g}" if len(ratios) == 1 else f"{ratios[0]:.3g}..{ratios[-1]:.3g}"
    met = sum(row["verdict"] == "met" for row in group)
    name = "" if metric == "time" else f"{metric} "
    if not target:
        return f"{name}{span}"
    word = "met" if met == len(group) else "missed" if met == 0 else f"met in {met} of {len(group)}"
    return f"{name}{span} ({target}: {word})"


def block(rows: Sequence[Row]) -> str:
    return f"{BEGIN}\n{table(rows)}\n{END}"


def replaced(text: str, rows: Sequence[Row]) -> str:
    """``text`` with its marked block made anew.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected the marks {BEGIN} and {END}")
    return before + block(rows) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the block in bench/README.md")
    parser.add_argument("--add", type=Path, metavar="FILE", help="a rows.csv of make gpu, to append to the ledger")
    arguments = parser.parse_args()
    if arguments.add is not None:
        ledger.append(ledger.read(arguments.add))
    rows = ledger.read()
    print(table(rows))
    if arguments.write:
        README.write_text(replaced(README.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
