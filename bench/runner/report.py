"""The claim table as Markdown, from the ledger.

``python -m bench.runner.report`` prints it, ``--write`` updates it in ``bench/README.md``, ``--add FILE`` first appends
the rows of a run on another machine to the ledger.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from bench.claims import MODULES, Claim
from bench.runner import ledger
from bench.runner.ledger import HOST_BOUND, Row

README = ledger.ROOT / "bench" / "README.md"
CLAIMS = "claims"  # name of the block in the page
NOT_MEASURED = "not measured"
DEVICES = {"cpu": "CPU", "gpu": "H200"}  # by a part of the device's name


def claims() -> list[Claim]:
    """All claims in the order of the table."""
    return [claim for name in MODULES for claim in importlib.import_module(f"bench.claims.{name}").CLAIMS]


def table(rows: Sequence[Row]) -> str:
    """Two columns per device: the target, and the latest ratios with their verdict."""
    lines = ["| claim, ratio in one run | CPU target | CPU, 2 cores | H200 target | H200 |", "|---|---|---|---|---|"]
    for claim in claims():
        cells = [claim.text]
        for target, column in ((claim.cpu, "cpu"), (claim.gpu, "gpu")):
            cells += [target, "-" if target == "-" else measured(rows, claim.name, column)]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def measured(rows: Sequence[Row], claim: str, column: str) -> str:
    """The newest row of every shape, as a range of ratios for each metric and target."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["claim"] == claim and row["verdict"] and DEVICES[column] in row["device"]:
            note = row["note"].removesuffix(HOST_BOUND).removesuffix("; ")
            key = (*(row[field] for field in ("metric", "target", "shape", "dtype")), note)
            if row["ratio"] and "flashsink" in row["provider"]:
                newest[key] = row
    # rows without a target count only where no row of the claim has one
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


def replaced(text: str, name: str, block: str) -> str:
    """``text`` with the content of its block ``name`` (between ``<!-- name: ... -->`` and ``<!-- name end -->``)
    replaced by ``block``.

    Raises:
        ValueError: there is no such block.
    """
    before, begin, rest = text.partition(f"<!-- {name}: ")
    how, arrow, old = rest.partition(" -->\n")
    _, end, after = old.partition(f"<!-- {name} end -->")
    if not (begin and arrow and end):
        raise ValueError(f"README: expected a block <!-- {name}: ... --> ... <!-- {name} end -->")
    return f"{before}{begin}{how}{arrow}{block}\n{end}{after}"


def write(name: str, block: str) -> None:
    """Updates a block of ``bench/README.md``."""
    README.write_text(replaced(README.read_text(encoding="utf-8"), name, block), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update the table in bench/README.md")
    parser.add_argument("--add", type=Path, metavar="FILE", help="a rows.csv of make gpu, to append to the ledger")
    arguments = parser.parse_args()
    if arguments.add is not None:
        ledger.append(ledger.read(arguments.add))
    text = table(ledger.read())
    print(text)
    if arguments.write:
        write(CLAIMS, text)


if __name__ == "__main__":
    main()
