"""The table of families: totals, a row a class, what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.families import store
from bench.families.build import MAPPINGS
from bench.families.store import CRASH, EXACT, LEFT_OUT, REFUSED, WRONG, Row

TITLES = {
    "causal": "causal",
    "multimodal": "image, audio and video with text",
    "speech": "speech to text",
    "seq2seq": "other sequence to sequence",
    "auto": "AutoModel: encoders and what has no class above",
}


def markdown(rows: Sequence[Row], stale: int) -> str:
    """``rows`` of one transformers version; ``stale`` of them are of other sources than now."""
    tested = [row for row in rows if row["verdict"] != LEFT_OUT]
    version = rows[0]["transformers"] if rows else "none"
    lines = [
        "# flashsink on the classes of transformers",
        "",
        f"transformers {version}, made by `python -m bench.families`. A class is **exact** if logits, attention "
        "received, loss, largest activations and gradients are those of the class without flashsink, with no mask, "
        "all ones, left and right padding and in `generate`, and every other cell is exact or refused by name; "
        "**refused** if one of these is refused; **wrong** if a cell is silently different, **crash** if an error does "
        "not say what is wrong.",
        "",
    ]
    if stale:
        lines += [f"{stale} rows are of other sources of flashsink than these.", ""]
    lines += ["| classes | left out | testable | exact | refused | wrong | crash | exact of testable |"]
    lines += ["|---|" + "---:|" * 7]
    for group in [*MAPPINGS, "all"]:
        lines.append(_total(group, [row for row in rows if group in (row["group"], "all")]))
    lines += ["", *_cells(tested), ""]
    for group in MAPPINGS:
        chosen = sorted((row for row in tested if row["group"] == group), key=lambda row: row["class"])
        if chosen:
            lines += [
                f"## {TITLES[group][0].upper()}{TITLES[group][1:]}",
                "",
                "| class | verdict | norms fused | reason |",
            ]
            lines += ["|---|---|---|---|", *(_row(row) for row in chosen), ""]
    out = sorted((row for row in rows if row["verdict"] == LEFT_OUT), key=lambda row: row["class"])
    lines += ["## Left out", ""]
    lines += [f"- {row['class']}: {_cell(row['reason'])}" for row in out]
    return "\n".join(lines) + "\n"


def _total(group: str, rows: Sequence[Row]) -> str:
    count = Counter(row["verdict"] for row in rows)
    testable = len(rows) - count[LEFT_OUT]
    percent = f"{100 * count[EXACT] / testable:.1f}%" if testable else "-"
    numbers = [count[LEFT_OUT], testable, *(count[kind] for kind in (EXACT, REFUSED, WRONG, CRASH))]
    return f"| {TITLES.get(group, group)} | " + " | ".join(map(str, numbers)) + f" | {percent} |"


def _cells(rows: Sequence[Row]) -> list[str]:
    """How often a cell was what."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for kind, _, names in store.cells_of(row):
            for name in names:
                counts.setdefault(name, Counter())[kind] += 1
    kinds = (EXACT, REFUSED, WRONG, CRASH)
    lines = ["| cell | exact | refused | wrong | crash |", "|---|" + "---:|" * 4]
    return lines + [
        f"| {name} | " + " | ".join(str(count[kind]) for kind in kinds) + " |" for name, count in counts.items()
    ]


def _row(row: Row) -> str:
    reason = row["reason"]
    if row["verdict"] == EXACT:
        refused = [f"{', '.join(names)}: {why}" for kind, why, names in store.cells_of(row) if kind == REFUSED]
        reason = "refused: " + "; ".join(refused) if refused else ""
    unchecked = f" (not checked: {', '.join(row['unchecked'])})" if row.get("unchecked") else ""
    return f"| {row['class']} | {row['verdict']} | {row.get('fused', '')} | {_cell(reason)}{unchecked} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
