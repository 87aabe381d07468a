"""Rows survive the process that wrote them, and a result is replaced only by a whole one."""

from __future__ import annotations

import json
import logging
import math
import resource
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from avsr.errors import HIDDEN, UserError
from avsr.runtime.folders import write_durably, write_whole
from avsr.runtime.rows import Rows, StoredRows, append_row, as_lines, read_rows


def by_id(row: Any) -> str:
    return str(row["id"])


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


KILLED = """
    import sys, time
    from pathlib import Path
    from avsr.runtime.rows import Rows

    rows = Rows(Path(sys.argv[1]), lambda row: row["id"])
    for number in range(3):
        rows.add({"id": f"u{number}", "text": "a\\nb\u2028 \\udcff"})
    print("ready", flush=True)
    time.sleep(60)
"""


def test_rows_survive_a_kill_and_the_rest_is_added(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(path)], stdout=-1)
    assert process.stdout and process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = Rows(path, by_id)
    assert list(rows.held) == ["u0", "u1", "u2"] and rows.held["u1"]["text"] == "a\nb\u2028 \udcff"
    rows.add({"id": "u3", "score": -math.inf})
    rows.add({"id": "u1", "text": "again"})
    again = Rows(path, by_id)
    assert again.held == rows.held and again.held["u1"]["text"] == "again" and again.held["u3"]["score"] == -math.inf
    assert not [line for line in path.read_text().splitlines() if not line]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_last_line_is_dropped_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    for name in ("a", "b"):
        Rows(path, by_id).add({"id": name, "text": "ü" * 20})
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    with caplog.at_level(logging.WARNING):
        rows = Rows(path, by_id)
    assert list(rows.held) == ["a"] and f"{path}: its last line was cut short" in caplog.text
    rows.add({"id": "b", "text": "ü" * 20})
    assert path.read_bytes() == data


def test_lines_that_are_no_rows_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n\nno row\n[1]\n{"name": 1}\n\xff\n{"id": "b"}\n' + b"[" * 100_000 + b"\n")
    assert list(Rows(path, by_id).held) == ["a", "b"]
    assert f"{path}: line 3 is no row, left out (5 in all)" in caplog.text


def test_what_other_settings_began_begins_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, settings = tmp_path / "rows.jsonl", {"beams": 1, "snr": [math.inf], "file": "a\udcff"}
    Rows(path, by_id, settings).add({"id": "a"})
    Rows(path, by_id, settings).add({"id": "b"})
    assert list(Rows(path, by_id, settings).held) == ["a", "b"] and not caplog.text
    other = Rows(path, by_id, {**settings, "beams": 2})
    assert not other.held and f"{path} was begun with other settings" in caplog.text
    other.add({"id": "c"})
    assert list(Rows(path, by_id, {**settings, "beams": 2}).held) == ["c"]
    path.write_text('{"made_by"')  # killed in its first line
    assert not Rows(path, by_id, settings).held and path.read_bytes() == b""


def test_a_full_disk_keeps_whole_rows_and_the_old_result(tmp_path: Path) -> None:
    path, place = tmp_path / "rows.jsonl", tmp_path / "result.jsonl"
    place.write_text("the old result\n")
    rows = Rows(path, by_id)
    rows.add({"id": "a" * 100})
    whole = path.read_bytes()
    with limited_files(150):
        with pytest.raises(UserError, match=rf"cannot write {path}: No space left on device; the rows before are kept"):
            rows.add({"id": "b" * 100})
        with pytest.raises(OSError, match="result"):
            rows.publish(place, [{"id": "c" * 200}])
        with pytest.raises(OSError, match=r"text\.part"):
            write_whole(tmp_path / "text", bytes(200))
    assert path.read_bytes() == whole and list(rows.held) == ["a" * 100]
    assert place.read_text() == "the old result\n" and list(tmp_path.glob("result*")) == [place]
    rows.publish(place, [{"id": "ü"}])
    assert json.loads(place.read_text()) == {"id": "ü"} and not path.exists()
    write_durably(place, b"new")
    assert place.read_bytes() == b"new"


@pytest.mark.parametrize("cut", [1, 2, 9, 21])
def test_torn_lines_cost_themselves_alone_and_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    """A kill or a full disk cuts the end of a file, to which the next process appends."""
    path = tmp_path / "rows.jsonl"
    assert read_rows(path, by_id) == []
    for name in ("a", "b"):
        append_row(path, {"id": name, "text": "ü" * 10})
    path.write_bytes(path.read_bytes()[:-cut])
    whole = cut == 1  # without its end a row is whole
    assert [row["id"] for row in read_rows(path, by_id)] == (["a", "b"] if whole else ["a"])
    append_row(path, {"id": "c"})
    append_row(path, {"name": "of another kind"})
    caplog.clear()
    assert [row["id"] for row in read_rows(path, by_id)] == (["a", "b", "c"] if whole else ["a", "c"])
    first, count = (4, 1) if whole else (2, 2)
    assert caplog.messages == [f"{path}: line {first} is no row, left out ({count} in all)"]


def test_what_would_act_on_a_terminal_is_escaped_and_comes_back() -> None:
    every = "".join(map(chr, [*range(0x100), *range(0x2000, 0x2070), 0xD800, 0x20, 0xDFFF, 0xFEFF, 0x1F600]))
    text = as_lines([{every: every}]).decode()
    assert not HIDDEN.search(text.removesuffix("\n")) and "\U0001f600" in text and "\xe4" in text
    assert json.loads(text) == {every: every}


# Rows that stay on disk


def test_stored_rows_are_found_by_their_key_and_survive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The keys -1 and -2 have the same hash, as any two may."""
    path, settings = tmp_path / "rows.jsonl", {"beams": 1}
    rows = StoredRows(path, lambda row: row["id"], settings)
    places = [rows.add({"id": "a", "text": "ü\n"})]
    assert rows.place("a") == places[0]  # after the header
    places += [rows.add({"id": name, "text": "ü\n"}) for name in ("b", -1)]
    places.append(rows.add({"id": "a", "text": "later"}))
    assert places == sorted(set(places)) and not rows.held
    with path.open("ab") as file:
        file.write(b'no row\n{"id": "c')
    again = StoredRows(path, lambda row: row["id"], settings)
    assert "line 6 is no row" in caplog.text and "cut short" in caplog.text
    for found in (rows, again):
        assert [found.place(key) for key in ("a", "b", -1, -2, "c")] == [places[3], places[1], places[2], None, None]
    assert [(row["id"], row["text"]) for row in again.read([places[3], places[0]])] == [("a", "later"), ("a", "ü\n")]
    again.publish(tmp_path / "whole", again.read([places[1], places[3]]))
    assert [json.loads(line)["id"] for line in (tmp_path / "whole").read_text().splitlines()] == ["b", "a"]
    assert not path.exists()
    assert StoredRows(path, lambda row: row["id"], settings).place("a") is None


def test_stored_rows_take_no_memory(tmp_path: Path) -> None:
    """10 MB of them."""
    rows = StoredRows(tmp_path / "rows.jsonl", by_id)
    tracemalloc.start()
    try:
        places = [rows.add({"id": str(number), "text": "a" * 2000}) for number in range(5000)]
        StoredRows(rows.path, by_id)
        rows.publish(tmp_path / "whole", rows.read(places))
        assert tracemalloc.get_traced_memory()[1] < 2.5e6
    finally:
        tracemalloc.stop()
    assert (tmp_path / "whole").stat().st_size > 10e6
