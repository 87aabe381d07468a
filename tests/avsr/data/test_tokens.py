"""Numbers of tokens: kept in an index by tokenizer where it can be written, and counted anew where not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from avsr.data.index import make_index, open_manifest
from avsr.data.tokens import count_tokens


class Letters:
    """Tokens are letters; records the texts that were tokenised."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.seen: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.seen.append(text)
        return list(text.encode())


@pytest.mark.parametrize("writable", [True, False])
def test_counts(
    make_corpus: Callable[..., Path], tmp_path: Path, writable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_corpus(tmp_path / "corpus")
    index = make_index(path)
    rows = open_manifest(path).utterances[2:7]
    expected = [len(row.text) for row in rows]
    first, other = Letters("first"), Letters("other")
    assert count_tokens(rows, index, first).tolist() == expected and len(first.seen) == 8
    (kept,) = index.folder.glob("tokens-*.npy")
    if not writable:  # stands for a folder that only others may write: tests may run as root
        kept.unlink()
        (index.folder / f".{kept.name}.lock").write_text("no lock")
    with caplog.at_level(logging.WARNING):
        assert count_tokens(rows, index, first).tolist() == expected
    assert len(first.seen) == (8 if writable else 16) and ("not kept" in caplog.text) == (not writable)
    assert count_tokens(rows, index, other).tolist() == expected and len(other.seen) == 8
