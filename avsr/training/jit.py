"""DeepSpeed's compiled ops. Training needs none unless the user's DeepSpeed JSON asks for one (CPU Adam, FusedAdam): it
is then compiled at first use by one process, while the others wait for torch's lock file."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from avsr.errors import UserError
from avsr.runtime.folders import cache_folder
from avsr.runtime.locks import now_in

logger = logging.getLogger("avsr")
_FOLDER = "TORCH_EXTENSIONS_DIR"
_QUIET = 600.0  # seconds without a new file after which a build on an unknown host counts as dead


def supervise(builder: Any) -> None:
    """Gives the ops of ``builder``, DeepSpeed's OpBuilder, their own build folder, checks for compiler and ninja before
    each build, and logs that a build takes time.

    torch's default folder is shared by all environments and hosts, whose builds are not interchangeable: DeepSpeed
    compiles for the host's processor. A folder set by the user is kept.
    """
    os.environ.setdefault(_FOLDER, str(own_folder()))
    compile_op = builder.jit_load
    if hasattr(compile_op, "__wrapped__"):
        return

    @functools.wraps(compile_op)
    def jit_load(self: Any, verbose: bool = True) -> Any:
        make_ready(self.name)
        try:
            return compile_op(self, verbose)
        except (ImportError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            place = Path(os.environ[_FOLDER]) / self.name
            raise UserError(
                f"deepspeed.config: the compiled {self.name} cannot be loaded ({reason}): delete {place}"
            ) from error

    builder.jit_load = jit_load


def own_folder() -> Path:
    """The build folder of this environment on this host."""
    versions = torch.__version__, importlib.metadata.version("deepspeed"), sys.version, sys.prefix, platform.node()
    return cache_folder() / "torch_extensions" / hashlib.sha256(" ".join(versions).encode()).hexdigest()[:16]


def make_ready(name: str) -> None:
    """Called before the op ``name`` is compiled or loaded.

    Raises:
        UserError: there is no compiler, or no ninja.
    """
    compiler = (os.environ.get("CXX") or "c++").split()[0]  # "ccache g++"
    missing = [tool for tool in (compiler, "ninja") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"deepspeed.config: DeepSpeed has to compile {name} and finds no {' and no '.join(missing)}: install a C++ "
            "compiler and ninja, or choose an optimizer that needs none (leave it out for the recipe's AdamW)"
        )
    folder = Path(os.environ[_FOLDER]) / name
    remove_stale(folder / "lock", local=folder.parent == own_folder())
    if (folder / "lock").exists():
        logger.warning("waiting for another process that compiles DeepSpeed's %s", name)
    elif not (folder / f"{name}.so").exists():
        logger.warning("compiling DeepSpeed's %s (once, 1 to 3 minutes)", name)


def remove_stale(lock: Path, *, local: bool) -> None:
    """Removes torch's lock of a build whose process has died: others would wait for it forever.

    Args:
        lock: the file; its holder keeps it open.
        local: whether only processes of this host can hold it. Otherwise nothing in its folder may have changed for a
            while.
    """
    first = _identity(lock)
    if first is None or _is_open(lock):
        return
    if not local and now_in(lock.parent) - max(_changed(path) for path in (lock, *lock.parent.iterdir())) < _QUIET:
        return
    time.sleep(1.0)  # a holder closes the file before it removes it
    if _identity(lock) == first and not _is_open(lock):
        logger.warning("%s was left behind by a process that no longer exists: removed", lock)
        lock.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_open(path: Path) -> bool:
    """Whether a process of this host has the file open, as far as /proc shows."""
    identity = _identity(path)
    for process in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with suppress(OSError):
            for handle in os.listdir(f"/proc/{process}/fd") if process.isdecimal() else []:
                with suppress(OSError):
                    if identity is not None and _identity(Path(f"/proc/{process}/fd/{handle}")) == identity:
                        return True
    return False
