"""Child processes that log to files: several at once, or one that is watched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.runner import ledger

POLL = 0.2  # seconds
STOPPED = "stopped after"


@dataclass(frozen=True)
class Ended:
    """A process's exit code, or None and the reason why it was killed; and its whole output."""

    code: int | None
    reason: str
    text: str

    @property
    def why(self) -> str:
        return self.reason or f"exit code {self.code}"

    @property
    def late(self) -> bool:
        """Whether it was killed at the end of its time."""
        return self.reason.startswith(STOPPED)

    def tail(self, lines: int) -> str:
        return "\n".join(self.text.splitlines()[-lines:])


def together(commands: Mapping[str, Sequence[str]], folder: Path, seconds: float) -> dict[str, Ended]:
    """Runs all commands at once, each with a new log ``NAME.log`` in ``folder``; kills what runs after ``seconds``."""
    end = time.monotonic() + seconds
    for name in commands:
        (folder / f"{name}.log").unlink(missing_ok=True)
    running = {name: start(command, folder / f"{name}.log") for name, command in commands.items()}
    reasons = dict.fromkeys(commands, "")
    try:
        while any(process.poll() is None for process in running.values()) and time.monotonic() < end:
            time.sleep(POLL)
    finally:
        for name, process in running.items():
            if process.poll() is None:
                kill(process)
                reasons[name] = f"{STOPPED} {seconds:.0f} s"
    return {name: _ended(process, reasons[name], folder / f"{name}.log") for name, process in running.items()}


def watched(command: Sequence[str], log: Path, seconds: float, quiet: float) -> Ended:
    """Runs one command and prints its output; kills it after ``seconds``, or ``quiet`` seconds without output."""
    process, shown = start(command, log), log.stat().st_size
    began = heard = time.monotonic()
    reason = ""
    try:
        while not reason and process.poll() is None:
            time.sleep(POLL)
            shown, before = show(log, shown), shown
            now = time.monotonic()
            heard = now if shown > before else heard
            if now - heard > quiet:
                reason = f"no output for {quiet:.0f} s"
            elif now - began > seconds:
                reason = f"{STOPPED} {seconds:.0f} s"
    finally:
        if process.poll() is None:
            kill(process)
    show(log, shown)
    return _ended(process, reason, log)


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a process group, which can be killed with all its children."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ledger.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills ``process`` and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(log: Path, shown: int) -> int:
    """Prints what ``log`` contains after its first ``shown`` bytes; returns its size."""
    with log.open("rb") as file:
        file.seek(shown)
        new = file.read()
    if new:
        print(new.decode(errors="replace"), end="", flush=True)
    return shown + len(new)


def _ended(process: subprocess.Popen[bytes], reason: str, log: Path) -> Ended:
    return Ended(None if reason else process.returncode, reason, log.read_text(encoding="utf-8", errors="replace"))
