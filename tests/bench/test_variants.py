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
    of_attention = {f"{name}_kernel" for name in ("forward", "gradient_kv", "gradient_q", "received")}
    of_states = {"activation_max", "bos_gradient"}
    of_states |= {f"{name}_{part}" for name in ("norm", "decorrelation") for part in ("forward", "backward")}
    of_one_kind = {("packed", "segments_kernel"), ("dense", "calibrate_kernel")}
    assert (
        set(found) == {(kind, name) for kind in ("packed", "dense") for name in of_attention | of_states} | of_one_kind
    )
    # tiles for short and for long rows; the forward of ACT, for dense rows alone, has no sink logits
    assert found.pop(("dense", "forward_kernel")) <= 4
    assert max(found.values()) <= 2, {key: count for key, count in found.items() if count > 2}
