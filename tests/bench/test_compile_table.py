"""Every shipped configuration compiles for sm_80, sm_90 and sm_100 as the committed table says: no spill, no more
shared memory than there is, wgmma where Hopper has it. After a change of a kernel: ``python -m bench.compile_report``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.ledger import ROOT


@pytest.mark.timeout(3000)
def test_the_compile_table_holds():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    command = [sys.executable, "-m", "bench.compile_report", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert done.returncode == 0, "\n".join(faults) or done.stderr
