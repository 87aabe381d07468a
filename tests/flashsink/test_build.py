"""What is built and installed, and what happens without the compiled library."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashsink
from flashsink.cpu import library as native

backends = importlib.import_module("flashsink.dispatch")  # the package's attribute is the function

ROOT = Path(__file__).resolve().parents[2]
BUILT = native.available() == "usable"
REQUIRED = os.environ.get("FLASHSINK_REQUIRE_NATIVE") == "1"

needs_library = pytest.mark.skipif(not BUILT and not REQUIRED, reason=native.available())


@pytest.fixture
def fresh():
    """Whatever the test makes of the library, the next one loads it anew."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@needs_library
def test_one_openmp_runtime():
    """A second runtime would compete with torch's for the cores."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    native.library()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) <= 1, runtimes


def test_a_missing_library_is_named_and_the_reference_takes_over(fresh, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native, "_PATH", tmp_path / "_native.so")
    backends._log_once.cache_clear()
    reason = flashsink.backends()["cpu"]
    assert "compiler" in reason and flashsink.backends()["reference"] == "usable"
    hidden = torch.randn(2, 1, 5, 8)
    with caplog.at_level("INFO", logger="flashsink"):
        for _ in range(2):
            loss = flashsink.decorrelation_loss(hidden, torch.tensor([5]))
    assert torch.equal(loss, flashsink.decorrelation_loss(hidden, torch.tensor([5]), backend="reference"))
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(ValueError, match="compiler"):
        flashsink.decorrelation_loss(hidden, torch.tensor([5]), backend="cpu")
    with pytest.raises(RuntimeError, match="compiler"):
        native.library()


@needs_library
def test_a_library_of_another_interface_or_a_broken_one_is_refused(fresh, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
        assert "interface" in flashsink.backends()["cpu"]
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "_PATH", broken)
    assert "does not load" in flashsink.backends()["cpu"]


def install(tmp_path, **environment):
    """A wheel of a copy of the sources, installed into a folder; returns (process, folder)."""
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("avsr", "configs", "csrc", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    options = {"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source)], **options)
    if done.returncode == 0:
        wheel = str(next(wheels.glob("*.whl")))
        done = subprocess.run([*pip, "install", "--no-deps", "--target", str(target), wheel], **options)
    return done, target


def ask(target, code):
    """Runs ``code`` on the installed copy, with nothing of the source tree on the path."""
    site = Path(torch.__file__).parents[1]
    start = f"import sys; sys.path[:0] = [{str(target)!r}]; sys.path.append({str(site)!r}); import flashsink\n"
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", start + code], cwd=target, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


@pytest.mark.slow
def test_a_wheel_carries_library_types_and_recipes(tmp_path):
    if not shutil.which("g++") and not REQUIRED:
        pytest.skip("no compiler here")
    done, target = install(tmp_path, FLASHSINK_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    lines = ask(
        target,
        "from avsr.config.composing import configs_folder\nfrom avsr.config import load_config\n"
        "print(flashsink.__file__); print(flashsink.backends()['cpu']); print(configs_folder())\n"
        "print(load_config('demo').model.task)\n"
        "import avsr.cli, avsr.train, avsr.evaluation.run, avsr.tools.analyze, avsr.tools.doctor, avsr.tools.demo_av",
    )
    assert lines[:4] == [
        str(target / "flashsink" / "__init__.py"),
        "usable",
        str(target / "avsr" / "configs"),
        "audio",
    ]
    assert (target / "flashsink" / "py.typed").is_file() and (target / "avsr" / "py.typed").is_file()


@pytest.mark.slow
def test_without_a_compiler_the_installation_succeeds_unless_it_must_not(tmp_path):
    none = {"CC": "/nonexistent", "CXX": "/nonexistent"}
    done, target = install(tmp_path / "a", **none, FLASHSINK_REQUIRE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert not list(target.rglob("*.so"))
    lines = ask(
        target,
        "import torch\nstate = flashsink.backends(); print(state['reference']); print(state['cpu'])\n"
        "print(flashsink.decorrelation_loss(torch.ones(1, 1, 2, 4), torch.tensor([2])).item())",
    )
    assert lines[0] == "usable" and "compiler" in lines[1] and lines[2] == "1.0"
    done, _ = install(tmp_path / "b", **none, FLASHSINK_REQUIRE_NATIVE="1")
    assert done.returncode != 0
