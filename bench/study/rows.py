"""The committed rows, one a finished arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "rows.jsonl"


def read_rows(path: Path = ROWS) -> dict[str, dict[str, Any]]:
    """By key; the last row of a key counts."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["key"]: row for row in rows}
