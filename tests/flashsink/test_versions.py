"""Releases of other packages outside the tested range are named, once, and used all the same."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import flashsink
from flashsink import versions

pytestmark = pytest.mark.integration

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def installed(monkeypatch):
    """Says which version of every package is installed; None for none."""
    found = {}

    def version(package):
        if found.get(package) is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions.warn.cache_clear()
    yield found
    versions.warn.cache_clear()


@pytest.mark.parametrize(
    ("package", "version", "inside"),
    [
        ("torch", "2.11.0+cu130", True),
        ("torch", "2.10.1", False),
        ("torch", "2.12.0a0+git1234", False),
        ("torch", "3.11.0", False),
        ("triton", "3.6.0", True),
        ("triton", "3.10.0", False),
        ("transformers", "5.17.0", True),
        ("transformers", "5.23.1", True),
        ("transformers", "5.24.0.dev0", False),
        ("transformers", "5.9.0", False),
        ("transformers", "main", False),
        ("transformers", None, True),
        ("peft", "0.1", True),
    ],
)
def test_the_range(installed, package, version, inside):
    installed[package] = version
    said = versions.outside(package)
    assert bool(said) != inside
    assert inside or (version in said and re.search(r"tested are [\d.]+ and later below [\d.]+", said))


def test_what_is_tested_here_is_inside():
    for package in versions.TESTED:
        assert not versions.outside(package), package


def test_the_oldest_are_those_that_an_installation_asks_for():
    text = PYPROJECT.read_text(encoding="utf-8")
    for package, (oldest, _) in versions.TESTED.items():
        assert f'"{package}>={oldest[0]}.{oldest[1]}' in text


def test_attach_names_an_untested_transformers_once(request, tiny):
    model = tiny("llama")  # first: transformers looks for the versions of packages while it is imported
    request.getfixturevalue("installed")["transformers"] = "5.31.0"
    with pytest.warns(UserWarning, match="transformers 5.31.0 is untested"):
        flashsink.attach(model).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashsink.attach(model).detach()


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)


def test_importing_names_an_untested_torch():
    code = (
        "import importlib.metadata as m; old = m.version\n"
        "m.version = lambda name: {'torch': '2.13.0', 'triton': '3.5.1'}.get(name) or old(name)\n"
        "import flashsink; flashsink.backends()"
    )
    said = run_python(code).stderr
    assert said.count("torch 2.13.0 is untested") == 1 and said.count("triton 3.5.1 is untested") == 1
    assert "untested" not in run_python("import flashsink").stderr
