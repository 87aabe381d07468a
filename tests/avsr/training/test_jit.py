"""What DeepSpeed compiles at the start of a training, and what it waits for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avsr.config import load_config
from avsr.errors import UserError
from avsr.training import jit
from avsr.training.engine import import_deepspeed
from avsr.training.metrics import read_metrics
from avsr.training.run import train

pytestmark = pytest.mark.integration

Recipe = Callable[..., Path]
ADAM = '{"optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": false}}}'


def test_a_start_needs_no_compiler_and_waits_for_no_lock(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Neither c++ nor ninja, and what a kill left where DeepSpeed once compiled an op for every start."""
    nothing, built = tmp_path / "bin", tmp_path / "built"
    nothing.mkdir()
    (nothing / "python").symlink_to(sys.executable)  # the real one has ninja next to it
    lock = built / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    recipe = tiny_recipe(tmp_path, **{"training.steps": 1})
    code = f"import sys; sys.executable = {str(nothing / 'python')!r}; from avsr.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(recipe)],
        env={**os.environ, "PATH": str(nothing), "TORCH_EXTENSIONS_DIR": str(built), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "run")) == 1 and [path.name for path in built.iterdir()] == [lock.parent.name]


def test_an_op_that_has_to_be_compiled_without_a_compiler_is_one_line(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text(ADAM)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=r"deepspeed\.config: DeepSpeed has to compile (cpu|fused)_adam and finds no .*none:"
    ):
        train(load_config(str(tiny_recipe(tmp_path, **{"deepspeed.config": str(tmp_path / "ds.json")}))))


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an op, where both tools seem to be there."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    monkeypatch.setattr(jit.shutil, "which", lambda tool: tool)
    (tmp_path / "ops" / "cpu_adam").mkdir(parents=True)
    return tmp_path / "ops" / "cpu_adam"


@pytest.mark.parametrize("own", [True, False])
def test_a_lock_that_a_kill_left_goes_and_the_compiling_is_said(
    built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own: bool
) -> None:
    """In a folder of the user's, which other hosts may share, only when nothing has changed there for long."""
    if own:
        monkeypatch.setattr(jit, "own_folder", lambda: built.parent)
    lock = built / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); input()", str(lock)],
        stdin=subprocess.PIPE,
    )
    while not lock.exists():
        time.sleep(0.01)
    jit.make_ready("cpu_adam")
    assert lock.exists() and "waiting for another process that compiles DeepSpeed's cpu_adam" in caplog.text
    holder.kill()
    holder.wait()
    if not own:
        jit.make_ready("cpu_adam")
        assert lock.exists()
        for path in (lock, built):
            os.utime(path, (time.time() - 700,) * 2)
    caplog.clear()
    jit.make_ready("cpu_adam")
    assert not lock.exists() and f"{lock} was left behind" in caplog.text
    assert "compiling DeepSpeed's cpu_adam (once" in caplog.text
    (built / "cpu_adam.so").touch()
    caplog.clear()
    jit.make_ready("cpu_adam")
    assert not caplog.text


def test_every_op_of_deepspeed_passes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler comes after it, in a folder of this environment."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    import_deepspeed()
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
    from torch.utils import cpp_extension

    came: list[Any] = []
    monkeypatch.setattr(jit, "make_ready", came.append)
    monkeypatch.setattr(cpp_extension, "verify_ninja_availability", lambda: None)
    monkeypatch.setattr(cpp_extension, "load", lambda name, **_: came.append(name) or SimpleNamespace())
    CPUAdamBuilder().jit_load()
    assert came == ["cpu_adam", "cpu_adam"]
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(jit.own_folder())


def test_a_damaged_op_is_one_line(built: Path) -> None:
    class Builder:
        name = "cpu_adam"

        def jit_load(self, verbose: bool = True) -> None:
            raise ImportError(f"{built}/cpu_adam.so: file too short\nand more")

    jit.supervise(Builder)
    with pytest.raises(UserError, match=rf"cpu_adam cannot be loaded \(.*file too short\): delete {built}$"):
        Builder().jit_load()
