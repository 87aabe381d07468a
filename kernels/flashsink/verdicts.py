"""Whether the Triton kernels compute rightly on this device: checked when they are first used, and remembered.

``FLASHSINK_CHECK=0`` trusts them unseen; ``FLASHSINK_CHECK=1`` checks them in Triton's interpreter too. Verdicts are
kept in the user's cache folder for a device, a driver, and the releases and sources that make the kernels. Of several
processes that need the same one the first checks and the others wait for it.

A check runs in a thread of its own: nothing of the caller's (autocast, inference mode, dispatch modes, hooks on saved
tensors) reaches it, and it leaves no trace in the caller's graph. Nothing is checked while a CUDA graph is captured, in
a graph being compiled, on fake tensors, and inside a backward, whose thread autograd would wait for: there only
verdicts that are known already count.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from flashsink import selfcheck
from flashsink.selfcheck import Kernel
from flashsink.triton import backend as triton
from flashsink.triton import launch

logger = logging.getLogger("flashsink")

VARIABLE = "FLASHSINK_CHECK"
MODE = os.environ.get(VARIABLE, "")
WAIT = 300.0  # seconds for another process's check

# what has to be right where a backend is asked for these: the statistics may be read from any attention
_NEEDS = {
    "attention": ("attention", "statistics"),
    "ACT": ("attention", "ACT"),
    "patterns": ("attention", "statistics", "patterns"),
    "segments": ("attention", "statistics", "segments"),
}

_verdicts: dict[tuple[torch.device, Kernel], str] = {}
_lock = threading.Lock()
_inside = threading.local()


def refusal(family: str, x: Tensor) -> str:
    """Why the Triton kernels of ``family`` (of :data:`selfcheck.FAMILIES`) are not used for x (..., D or C), or "".

    What fails is logged once. The first call for a device, dtype and size takes seconds, or minutes where every kernel
    has to be compiled on a busy machine.
    """
    checkable = x.device.type == "cuda" or (MODE == "1" and launch.INTERPRETED)
    if MODE == "0" or not checkable or x.dtype not in selfcheck.LIMITS:
        return ""
    needs = _NEEDS.get(family, (family,))
    if torch.compiler.is_compiling():
        for size, reason in _failed(x.device, x.dtype, needs):
            if size == x.shape[-1]:
                return reason
        return ""
    if family not in selfcheck.ATTENTION and x.shape[-1] > triton.MAX_FEATURES:
        return ""  # refused in its own words
    return next(filter(None, (_verdict(x, Kernel(name, x.dtype, x.shape[-1])) for name in needs)), "")


def _verdict(x: Tensor, kernel: Kernel) -> str:
    key = x.device, kernel
    if key in _verdicts:
        return _verdicts[key]
    if _unable(x):
        return _known(x.device, kernel)
    with _lock:
        if key not in _verdicts:
            _in_a_thread(x.device, kernel)
        return _verdicts.get(key, "")


def _unable(x: Tensor) -> bool:
    """Whether this is no place to run kernels."""
    if getattr(_inside, "check", False) or torch._C._current_graph_task_id() != -1:
        return True
    if torch._guards.detect_fake_mode((x,)) is not None:
        return True
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiler takes the result of ``function`` as a constant. ``torch.compiler.assume_constant_result`` does the
    same, but imports the compiler: two seconds for every process."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _failed(device: torch.device, dtype: torch.dtype, families: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Sizes, of which the caller's may be symbolic, at which kernels are known to fail, and why."""
    kernels = {kernel for where, kernel in _verdicts if where == device}
    for family in families:
        path = place(device, Kernel(family, dtype, 0))
        names = path.parent.glob(path.name.replace("0.json", "*.json")) if path is not None else []
        kernels |= {Kernel(family, dtype, int(name.stem.rpartition("-")[2])) for name in names}
    wanted = [kernel for kernel in kernels if kernel.dtype == dtype and kernel.family in families]
    if not wanted:
        _say_unchecked(families[0], dtype)
    return tuple((kernel.size, reason) for kernel in wanted if (reason := _known(device, kernel)))


@functools.cache
def _say_unchecked(family: str, dtype: torch.dtype) -> None:
    logger.warning("%s of %s is compiled unchecked; `python -m flashsink check` checks the kernels", family, dtype)


def _known(device: torch.device, kernel: Kernel) -> str:
    """The verdict of an earlier check, of this process or another; "" without one."""
    if (device, kernel) not in _verdicts:
        reason = remembered(device, kernel)
        if reason is None:
            return ""
        _accept(device, kernel, reason)
    return _verdicts[device, kernel]


def _in_a_thread(device: torch.device, kernel: Kernel) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        _inside.check = True
        try:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                _settle(device, kernel)
        except BaseException as error:  # raised again in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=work, name="flashsink check", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _settle(device: torch.device, kernel: Kernel) -> None:
    """Makes the verdict known: another process's, else one's own."""
    with _alone(device, kernel):
        reason = remembered(device, kernel)
        if reason is None:
            logger.info("checking the Triton kernels: %s; once on this machine", kernel)
            began = time.monotonic()
            try:
                reason = selfcheck.wrong(triton, kernel, device)
            except torch.OutOfMemoryError:
                return  # says nothing of the kernels: the next use tries again
            logger.info("checked in %.1f s: %s", time.monotonic() - began, kernel)
            remember(device, kernel, reason)
    _accept(device, kernel, reason)


def _accept(device: torch.device, kernel: Kernel, reason: str) -> None:
    if reason:
        reason = f"its {kernel}, failed the check on this device: {reason}"
        logger.warning("backend triton is not used: %s (%s=0 uses it unchecked)", reason, VARIABLE)
    _verdicts[device, kernel] = reason


# ---- on disk: a file for every kernel, so that processes that check different ones neither wait nor overwrite


def remember(device: torch.device, kernel: Kernel, reason: str) -> None:
    """Writes a verdict. A folder that cannot be written to keeps none."""
    path = place(device, kernel)
    if path is None:
        return
    part = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**environment(device), "kernel": str(kernel), "wrong": reason}), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        logger.debug("a verdict is not kept: %s", error)


def remembered(device: torch.device, kernel: Kernel) -> str | None:
    """The verdict on disk; None where the file is missing, damaged or another environment's."""
    path = place(device, kernel)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError, RecursionError):
        return None
    expected = {**environment(device), "kernel": str(kernel)}
    reason = content.pop("wrong", None) if isinstance(content, dict) else None
    return reason if isinstance(reason, str) and content == expected else None


@contextlib.contextmanager
def _alone(device: torch.device, kernel: Kernel) -> Iterator[None]:
    """Holds the lock of a verdict, which ends with the process that holds it. Where there can be none, or not within
    :data:`WAIT`, every process checks for itself."""
    path, lock = place(device, kernel), None
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock", timeout=WAIT)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # too late is an OSError as well
        logger.debug("no lock for the check: %s", error)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def place(device: torch.device, kernel: Kernel) -> Path | None:
    """The file of a verdict, or None where there is no home."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashsink"
    except RuntimeError:
        return None
    digest = hashlib.sha256(json.dumps(environment(device), sort_keys=True).encode()).hexdigest()
    return folder / f"check-{digest[:16]}" / f"{kernel.family}-{kernel.dtype}-{kernel.size}.json"


@functools.cache
def environment(device: torch.device) -> dict[str, str]:
    """What a verdict depends on beside the kernel."""
    found = {"device": "interpreter", "torch": torch.__version__, "triton": triton.version, "sources": _sources()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"device": f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}", "driver": _driver()}
    return found


def _sources() -> str:
    """A digest of flashsink's own, which says more than its release."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("triton/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return str(getattr(torch._C, "_cuda_getDriverVersion", int)())
