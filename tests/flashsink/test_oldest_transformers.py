"""attach with the oldest transformers that an installation allows, with everything else as it is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashsink import versions

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
# additional requirements of that release that the newest releases do not install
BESIDE = ("huggingface_hub<2", "httpx<1", "httpcore==1.*")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_attach_works(tmp_path):
    """Installs it from the package registry into a folder of its own."""
    oldest = ".".join(map(str, versions.TESTED["transformers"][0]))
    wanted = [f"transformers=={oldest}.*", *BESIDE]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(tmp_path)]
    subprocess.run([*pip, *wanted], check=True, timeout=600, env={**os.environ, "PYTHONPATH": ""})
    search = os.pathsep.join([str(tmp_path), str(ROOT / "kernels"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
        )

    found = run("-c", "import transformers; print(transformers.__version__)")
    assert found.stdout.startswith(f"{oldest}."), found.stderr
    folder = ROOT / "tests" / "flashsink"
    files = sorted(str(path) for name in ("attach*", "families", "trainer") for path in folder.glob(f"test_{name}.py"))
    done = run("-m", "pytest", "-q", "-x", "-m", "not slow", *files)
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 100
