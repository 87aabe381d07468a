"""The file of results, one JSON line a class, and what it was measured with."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.families import judge
from bench.families.judge import CRASH, EXACT, NONE, REFUSED, WRONG, Result, Verdict

LEFT_OUT = "left out"
SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "flashsink"
Row = dict[str, Any]


def source_hash() -> str:
    """Of flashsink's own Python files, 12 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def row_of(result: Result) -> Row:
    """Cells by verdict and reason: {"exact": {"": ["none", ...]}, "refused": {"softcap: ...": [...]}}."""
    cells: dict[str, dict[str, list[str]]] = defaultdict(_lists)
    for name, verdict in result.verdicts.items():
        cells[verdict.kind]["" if verdict.kind == NONE else verdict.note].append(name)
    kind, reason = of_class(result.verdicts)
    return {
        "verdict": kind,
        "reason": reason,
        "fused": result.fused,
        "observed": result.observed,
        "unchecked": sorted(result.unchecked),
        "cells": {kind: dict(reasons) for kind, reasons in cells.items()},
    }


def _lists() -> defaultdict[str, list[str]]:
    return defaultdict(list)


def of_class(verdicts: dict[str, Verdict]) -> tuple[str, str]:
    """(verdict, reason): the worst of any cell; exact needs the main ones, as far as transformers can do them."""
    for kind in (WRONG, CRASH):
        for name, verdict in verdicts.items():
            if verdict.kind == kind:
                return kind, f"{name}: {verdict.note}"
    for name in judge.cells.MAIN:
        if name in verdicts and verdicts[name].kind == REFUSED:
            return REFUSED, verdicts[name].note
    return EXACT, ""


def read(path: Path) -> dict[str, Row]:
    """The newest row of every class by "class, transformers version"."""
    rows = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # a line that was cut off when the machine stopped
                continue
            rows[f"{row['class']}, {row['transformers']}"] = row
    return rows


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def compact(path: Path) -> None:
    """One line a class, in order."""
    rows = read(path)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)), encoding="utf-8")
    os.replace(part, path)


def cells_of(row: Row) -> Iterator[tuple[str, str, list[str]]]:
    """(verdict, reason, names of cells) of a row."""
    for kind, reasons in row.get("cells", {}).items():
        for reason, names in reasons.items():
            yield kind, reason, names
