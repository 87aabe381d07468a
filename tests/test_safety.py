"""Nothing in the source runs the content of a file, or writes outside the folder that it was given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INERT = ROOT / "avsr" / "data" / "mouth" / "inert.py"  # the one unpickler, which knows only its own stand-ins

# What each rule catches, so that none of them can go blind
CAUGHT = {
    "unpickles": [
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "np.load('x', allow_pickle=True)",
        "numpy.load('x')",
        "np.load('x', **options)",
        "import pickle\npickle.loads(b'')",
        "from pickle import Unpickler",
        "import dill",
        "import shelve",
        "from joblib import load",
        "import marshal",
        "pandas.read_pickle('x')",
    ],
    "remote code": ["AutoModel.from_pretrained('x', trust_remote_code=True)", "f(trust_remote_code=flag)"],
    "unsafe YAML": [
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "yaml.full_load_all(text)",
        "yaml.parse(text)",
        "from yaml import UnsafeLoader",
    ],
    "a shell": [
        "subprocess.run('x', shell=True)",
        "subprocess.Popen('x', shell=flag)",
        "os.system('x')",
        "os.popen('x')",
        "subprocess.getoutput('x')",
    ],
    "runs text": ["eval('1')", "exec(text)"],
    "unpacks": ["archive.extractall(folder)", "archive.extract('x')", "shutil.unpack_archive('x', 'y')"],
}
FINE = [
    "torch.load('x', weights_only=True)",
    "np.load('x', allow_pickle=False)",
    "model.eval()",
    "yaml.safe_load(text)",
    "yaml.parse(text, Loader=yaml.SafeLoader)",
    "OmegaConf.load('x')",
    "archive.extractall(folder, filter='data')",
    "subprocess.run(['x'])",
    "import pickletools",
    "f(trust_remote_code=False)",
]
_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib", "marshal"}
_SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}


def rules_broken(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(rule, line) of everything that the source must not do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            roots = {(getattr(node, "module", None) or name).partition(".")[0] for name in names}
            if roots & _MODULES:
                yield "unpickles", node.lineno
            if "yaml" in roots and any("Loader" in name and "Safe" not in name for name in names):
                yield "unsafe YAML", node.lineno
        elif isinstance(node, ast.Call):
            for rule in _call(node):
                yield rule, node.lineno


def _call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    base, _, last = name.rpartition(".")
    given = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "unpickles"
    if base in ("np", "numpy") and last == "load" and given.get("allow_pickle") != "False":
        yield "unpickles"
    if last == "read_pickle" and base:
        yield "unpickles"
    if given.get("trust_remote_code", "False") != "False":
        yield "remote code"
    if base == "yaml" and last not in ("safe_load", "safe_load_all", "safe_dump", "dump") and "Safe" not in str(given):
        yield "unsafe YAML"
    if name in _SHELLS or given.get("shell", "False") != "False":
        yield "a shell"
    if name in ("eval", "exec"):
        yield "runs text"
    if last in ("extract", "extractall", "unpack_archive") and given.get("filter") != "'data'":
        yield "unpacks"


@pytest.mark.parametrize(("rule", "code"), [(rule, code) for rule, codes in CAUGHT.items() for code in codes])
def test_every_rule_sees_what_it_is_for(rule: str, code: str) -> None:
    assert rule in {found for found, _ in rules_broken(ast.parse(code))}


@pytest.mark.parametrize("code", FINE)
def test_what_is_fine_is_let_through(code: str) -> None:
    assert not list(rules_broken(ast.parse(code)))


def test_the_source_keeps_the_rules() -> None:
    paths = [path for folder in ("avsr", "kernels", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 150
    found = [
        f"{path.relative_to(ROOT)}:{line}: {rule}"
        for path in (*paths, ROOT / "setup.py")
        for rule, line in rules_broken(ast.parse(path.read_text(encoding="utf-8")))
        if not (path == INERT and rule == "unpickles")
    ]
    assert not found
