"""Child processes whose output lands in files: several side by side, or one under a watch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import ledger

PAUSE = 0.2  # seconds between two looks


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or None and why it was killed; and all that it wrote."""

    code: int | None
    reason: str
    text: str


def together(commands: Mapping[str, Sequence[str]], folder: Path, seconds: float) -> dict[str, Ended]:
    """Runs all commands at once, each with a log ``NAME.log`` in ``folder``; what is not done after ``seconds`` is
    killed."""
    end = time.monotonic() + seconds
    running = {name: start(command, folder / f"{name}.log") for name, command in commands.items()}
    reasons = dict.fromkeys(commands, "")
    try:
        while any(process.poll() is None for process in running.values()) and time.monotonic() < end:
            time.sleep(PAUSE)
    finally:
        for name, process in running.items():
            if process.poll() is None:
                kill(process)
                reasons[name] = f"stopped after {seconds:.0f} s"
    return {name: _ended(process, reasons[name], folder / f"{name}.log") for name, process in running.items()}


def watched(command: Sequence[str], log: Path, seconds: float, quiet: float) -> Ended:
    """Runs one command and shows what it writes; killed after ``seconds``, or ``quiet`` seconds without output."""
    process, shown = start(command, log), log.stat().st_size
    began = heard = time.monotonic()
    reason = ""
    try:
        while not reason and process.poll() is None:
            time.sleep(PAUSE)
            shown, before = show(log, shown), shown
            now = time.monotonic()
            heard = now if shown > before else heard
            if now - heard > quiet:
                reason = f"no output for {quiet:.0f} s"
            elif now - began > seconds:
                reason = f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            kill(process)
    show(log, shown)
    return _ended(process, reason, log)


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """In a group of its own, so that its children end with it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ledger.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """``process`` and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(log: Path, shown: int) -> int:
    """Prints what stands in ``log`` behind ``shown`` bytes; returns where it ends."""
    with log.open("rb") as file:
        file.seek(shown)
        new = file.read()
    if new:
        print(new.decode(errors="replace"), end="", flush=True)
    return shown + len(new)


def _ended(process: subprocess.Popen[bytes], reason: str, log: Path) -> Ended:
    return Ended(None if reason else process.returncode, reason, log.read_text(encoding="utf-8", errors="replace"))
