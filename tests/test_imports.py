"""Imports go strictly downward, and the source tree can be the working directory."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"flashsink": ROOT / "kernels" / "flashsink", "avsr": ROOT / "avsr"}

# From the bottom up: a package (or module next to the packages) imports only from earlier lines and from itself.
LAYERS = {
    "flashsink": [
        "types versions operators",
        "checks reference",
        "cpu triton",
        "selfcheck",
        "verdicts",
        "sdpa",
        "dispatch",
        "functional",
        "hf",
        "__main__",
    ],
    "avsr": [
        "errors",
        "runtime",
        "config",
        "data",
        "models",
        "training evaluation",
        "tools",
        "train evaluate",
        "commands",
        "cli",
    ],
}
LEVEL = {
    f"{top}.{name}": level for top, lines in LAYERS.items() for level, line in enumerate(lines) for name in line.split()
}
ALIASES = {"flashsink.gpu"}  # an old name, kept for those who import it


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(path: Path) -> set[str]:
    known = modules().keys()
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else node.module)
    return names & known


def room(module: str) -> str:
    """The top-level subpackage of a module: avsr.data.audio -> avsr.data."""
    return ".".join(module.split(".")[:2])


def test_every_package_has_its_place() -> None:
    assert {room(name) for name in modules()} - set(LAYERS) - ALIASES == LEVEL.keys()


def test_imports_go_downward() -> None:
    wrong = []
    for name, path in modules().items():
        own = room(name)
        if name in LAYERS or own in ALIASES:
            continue
        for other in imported(path):
            if own.startswith("flashsink") and other.startswith("avsr"):
                wrong.append(f"{name} imports {other}")
            same_top = own.split(".")[0] == other.split(".")[0]
            if other not in LAYERS and same_top and room(other) != own and LEVEL[room(other)] >= LEVEL[own]:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_training_and_scoring_name_no_tool() -> None:
    """Not even by a string that something imports later."""
    for name, path in modules().items():
        if name.startswith("avsr.") and LEVEL[room(name)] < LEVEL["avsr.tools"]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = node.value if isinstance(node, ast.Constant) else None
                assert not (isinstance(text, str) and text.startswith("avsr.tools")), f"{name} names {text}"


def test_files_stay_small() -> None:
    for name, path in modules().items():
        limit = 500 if name.startswith("flashsink") else 400
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.integration
def test_transformers_imports_from_the_repository_root(with_kernels: bool, tmp_path: Path) -> None:
    """The folder ``kernels`` must not be taken for Hugging Face's package of that name."""
    search = [str(ROOT)]
    if with_kernels:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text(
            "__version__ = '99.0.0'\n"
            "def __getattr__(name):\n    return type(name, (), {'__init__': lambda self, *a, **k: None})\n"
        )
        info = tmp_path / "kernels-99.0.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0.0\n")
        search.insert(0, str(tmp_path))
    code = (
        f"import sys; sys.path[:0] = {search!r}\n"
        "import transformers\nfrom transformers import LlamaForCausalLM\nimport flashsink, avsr\nprint('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("fine"), done.stderr
