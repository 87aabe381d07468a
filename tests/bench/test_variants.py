"""Batches of other sizes start compiled kernels. In a process of its own: see test_compile_report.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def test_sixty_batches_compile_no_kernel_more_than_twice():
    """Before the arguments of ``launch.VARYING`` were exempt, a kernel of the norm was compiled 22 times."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "kernels", ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "bench.variants"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = {(kind, kernel): int(count) for kind, kernel, count in map(str.split, done.stdout.splitlines())}
    assert len(found) == 23  # calibration in dense rows only
    assert max(found.values()) <= 2, {key: count for key, count in found.items() if count > 2}
