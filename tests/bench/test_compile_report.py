"""The compile report in a process of its own: tests run under TRITON_INTERPRET=1, which keeps Triton from compiling."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile_report import read_log

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(table=None, *options, planted="sound"):
    """The committed table and cases are checked if ``table`` is None, else the toy kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "kernels", ROOT, HERE)))
    environment["PLANTED"] = planted
    own = ["--check"] if table is None else ["--cases", "toy_kernels", "--table", str(table)]
    command = [sys.executable, "-m", "bench.compile_report", *own, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2900)


def test_a_sound_table_is_written_and_checked(tmp_path):
    table = tmp_path / "table.csv"
    done = run(table, "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    text = table.read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["sm"] for row in rows if row["case"] == "product"] == ["80", "86", "89", "90", "100", "120"]
    by_place = {(row["case"], row["sm"]): row for row in rows}
    assert int(by_place["product", "80"]["mma"]) > 0 and by_place["product", "80"]["wgmma"] == "0"
    assert int(by_place["product", "90"]["wgmma"]) > 0
    assert int(by_place["product", "100"]["tcgen05"]) > 0
    assert all(8 <= int(row["registers"]) <= 255 and row["spills"] == "0" for row in rows)
    # a stride that is not 1 is an argument, and loads are no longer wide: more registers
    assert by_place["scale", "90"]["registers"] < by_place["scale strided", "90"]["registers"]

    assert run(table, "--check", "--processes", "2").returncode == 0
    assert run(table, "--check", "--every", "3", "--processes", "1").returncode == 0
    table.write_text(text.replace(by_place["product", "90"]["shared"], "1"))
    done = run(table, "--check", "--processes", "1")
    assert done.returncode == 1 and "no longer true: product" in done.stdout and "new: product" in done.stdout
    assert "1" in table.read_text(), "--check must not write"


def test_planted_faults_are_found(tmp_path):
    done = run(tmp_path / "table.csv", "--check", planted="faults")
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert done.returncode == 1
    for case, fault in (("spill", "spills"), ("shared", "bytes of shared memory"), ("wgmma", "without wgmma")):
        assert any(line.startswith(f"FAULT {case} ") and fault in line for line in faults), done.stdout


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.slow)])
def test_the_committed_table_holds(every):
    """No spill, no more shared memory than the device has, wgmma on Hopper. After a change of a kernel:
    ``python -m bench.compile_report``."""
    done = run(None, "--every", str(every))
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert done.returncode == 0, "\n".join(faults) or done.stderr


def test_the_log_of_ptxas():
    log = "ptxas info    : 0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\nUsed 40 registers, used 1"
    assert read_log(log) == (40, 12)
    with pytest.raises(ValueError, match="registers"):
        read_log("nothing")
