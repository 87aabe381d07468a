"""A complete recipe, to which tests add keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

COMPLETE = """
run: runs/x
model: {audio: {encoder: {name: e}}, llm: {name: l}}
data: {train: t.jsonl, validation: v.jsonl, test: {a: a.jsonl}}
"""


@pytest.fixture
def complete() -> str:
    """What every recipe has to say."""
    return COMPLETE


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    def write(text: str = "", name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(COMPLETE + text, encoding="utf-8")
        return str(path)

    return write
