"""Conversion into the cache: once, whoever else is at it."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from avsr.errors import UserError
from avsr.models.sources import convert_once

SOURCE = Path("model.pt")


def fill(folder: Path, text: str = "mine") -> None:
    (folder / "weights").write_text(text)
    (folder / "done").write_text("")


def test_it_is_written_once(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    assert convert_once(SOURCE, target, "done", fill) == target
    assert convert_once(SOURCE, target, "done", lambda folder: fill(folder, "again")) == target
    assert (target / "weights").read_text() == "mine"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_what_another_process_finished_meanwhile_stays(tmp_path: Path) -> None:
    """It may be open there: neither replaced nor deleted, not even for a moment."""
    target = tmp_path / "model"

    def slow(folder: Path) -> None:
        fill(folder)
        target.mkdir()
        fill(target, "theirs")

    assert convert_once(SOURCE, target, "done", slow) == target
    assert (target / "weights").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_another_process_mended_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target)
    (target / "x.safetensors").write_bytes(b"damaged")

    def slow(folder: Path) -> None:
        fill(folder)
        (target / "x.safetensors").unlink()
        fill(target, "theirs")

    assert convert_once(SOURCE, target, "done", slow) == target
    assert (target / "weights").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _reads(target: Path, start: float) -> None:
    def write(folder: Path) -> None:
        time.sleep(max(0.0, start - time.monotonic()))
        fill(folder)

    convert_once(SOURCE, target, "done", write)
    for _ in range(300):
        assert (target / "weights").read_text() == "mine"


def test_ranks_that_start_together_all_read_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = time.monotonic() + 0.5
    ranks = [context.Process(target=_reads, args=(tmp_path / "model", start)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 6
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failures_name_both_and_leave_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise ValueError("no such tensor\nmore")

    with pytest.raises(UserError, match=r"model\.pt: cannot convert to .*target: no such tensor$"):
        convert_once(SOURCE, tmp_path / "target", "done", broken)
    assert not list(tmp_path.iterdir())
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "weights").write_text("of somebody")
    with pytest.raises(UserError, match=r"cannot convert to .*target: .*not empty"):
        convert_once(SOURCE, tmp_path / "target", "done", fill)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["weights"]
