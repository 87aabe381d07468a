"""The kernels' machine code, and mutants of it, in processes of their own: the tests' one interprets kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
# kinds of change whose every mutant does harm; of the others some have no effect
DEADLY = ("no mask", "accumulators exchanged", "fragment exchanged", "another swizzle", "another stride")


def call(script: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.slow) for sm in (80, 100, 120))])
def test_every_kernel_of_a_few_problems(tmp_path, sm):
    call("prove.py", "--quick", "--sm", str(sm), "--rows", str(tmp_path / "rows.jsonl"), "--workers", "2")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["sm"] for row in rows} == {sm}
    assert all(row["verdict"] == "right" and not row["races"] and row["instructions"] > 1000 for row in rows)
    ran = {kernel for row in rows for kernel, _ in row["kernels"]}
    assert {"forward_kernel", "gradient_kv_kernel", "gradient_q_kernel", "received_kernel"} <= ran
    assert {"norm_forward", "norm_backward", "decorrelation_forward", "decorrelation_backward", "activation_max"} <= ran


def test_the_committed_proof_is_of_these_sources():
    """After a change of a kernel: ``python tests/ptx/prove.py``."""
    assert "0 problems are left" in call("prove.py", "--check")


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_mutants_are_caught(sm):
    caught = json.loads(call("mutants.py", str(sm)))["caught"]
    deadly = {80: DEADLY[:3], 90: DEADLY, 100: ()}[sm]  # on sm_100 some of the code does not run in this problem
    assert all(caught[kind][0] == caught[kind][1] > 0 for kind in deadly), caught
    assert all(caught[kind][0] > 0 for kind in caught), caught
    found, tried = caught["no barrier"]
    assert found >= tried // (3 if sm == 100 else 2) > 0, caught
