"""The committed rows, one per finished arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "rows.jsonl"


def read_rows(path: Path = ROWS) -> dict[str, dict[str, Any]]:
    """Rows by key; the last one of a key counts."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["key"]: row for row in rows}


def marks(sinks: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The token groups of a row's ``sinks`` that are delimiter or prompt tokens."""
    return {name: group for name, group in sinks["groups"].items() if name.startswith(("<", "prompt "))}


def strongest(sinks: dict[str, Any]) -> str:
    """The mark with the largest activation."""
    return max(marks(sinks).items(), key=lambda item: item[1]["peak"])[0]


def massive_mark(sinks: dict[str, Any]) -> bool:
    """Whether some mark is massive in at least half of the utterances."""
    return any(group["massive"] >= 0.5 for group in marks(sinks).values())


def best_weight(rows: dict[str, dict[str, Any]], off: str, arms: dict[float, str]) -> float | None:
    """The best lambda of a form by PLAN.md's rule, on the validation split.

    Args:
        rows: by key.
        off: the key of the row without the loss.
        arms: by lambda, the keys of the form's rows.

    Returns:
        Of those whose marks all peak below a tenth of off's strongest while BOS keeps half of its peak, the one with
        the lowest validation cross entropy; if there is none, of those below a tenth; if there is none, the one with
        the lowest peak. None while rows are missing.
    """
    if off not in rows or any(key not in rows for key in arms.values()):
        return None
    before = rows[off]["sinks"]
    limit = before["groups"][strongest(before)]["peak"] / 10
    peaks = {w: rows[key]["sinks"]["groups"][strongest(rows[key]["sinks"])]["peak"] for w, key in arms.items()}
    removed = [w for w in arms if peaks[w] < limit]
    kept = [w for w in removed if 2 * _bos(rows[arms[w]]) >= _bos(rows[off])]
    losses = {w: rows[key]["validation"][-1][1] for w, key in arms.items()}
    if removed:
        return min(kept or removed, key=lambda w: losses[w])
    return min(arms, key=lambda w: peaks[w])


def _bos(row: dict[str, Any]) -> float:
    return float(row["sinks"]["groups"]["BOS"]["peak"])
