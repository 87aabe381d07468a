"""Runs jobs in processes of their own: one that dies or hangs is told from the others, and none outlives this one."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from avsr.errors import UserError
from avsr.runtime.machine import cpus

_SPAWN = multiprocessing.get_context("spawn")
_connection: Any = None  # of a worker process to its parent


@dataclass(frozen=True)
class Lost:
    """Takes the place of a result: the process that had the job died or hung. ``reason`` is what it did, for a
    sentence about that process."""

    reason: str


def run_jobs(
    work: Callable[[Any], Any],
    jobs: Iterable[Any],
    workers: int,
    *,
    fresh: bool = False,
    stall_seconds: float = math.inf,
    on_tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Any, Any]]:
    """(job, result or ``Lost``) of each job as it is done.

    The processes are new interpreters, which import the program's main module, so a script that calls this needs the
    usual ``if __name__ == "__main__"``. They end when the iterator is closed or this process ends, however it does.

    Args:
        work: a function of an importable module. A ``UserError`` that it raises is raised here.
        jobs: its arguments; they and the results are pickled.
        workers: processes at a time; 0 means one for each CPU. 1 means this process, which a crash ends too, unless
            ``fresh``.
        fresh: a new process for each job.
        stall_seconds: a process that has neither finished its job nor called ``tick`` for so long has hung.
        on_tick: called here whenever a job calls ``tick``.

    Raises:
        UserError: a job raised one, or a process cannot be started.
        RuntimeError: a job raised something else; the message is its traceback.
    """
    if workers == 1 and not fresh:
        for job in jobs:
            yield job, work(job)
        return
    waiting = deque(jobs)
    crew: dict[Any, _Worker] = {}
    try:
        while waiting or crew:
            while waiting and len(crew) < (workers or cpus()):
                worker = _Worker(work, waiting.popleft())
                crew[worker.connection] = worker
            for connection in wait(list(crew), timeout=min(1.0, stall_seconds)):
                worker = crew[connection]
                kind, value = worker.receive()
                if kind == "tick":
                    on_tick()
                    continue
                job = worker.job
                if kind == "done" and waiting and not fresh:
                    worker.start(waiting.popleft())
                else:
                    crew.pop(connection).close()
                yield job, value
            for worker in [worker for worker in crew.values() if time.monotonic() - worker.heard > stall_seconds]:
                crew.pop(worker.connection).close(kill=True)
                yield worker.job, Lost(f"did nothing for {stall_seconds:.0f} s and was ended")
    finally:
        for worker in crew.values():
            worker.process.kill()
        for worker in crew.values():
            worker.close()


def tick() -> None:
    """Called by a job: the process is alive and has done another part of it. Does nothing outside of ``run_jobs``."""
    if _connection is not None:
        _connection.send(("tick", None))


class _Worker:
    """A process and the job that it has."""

    def __init__(self, work: Callable[[Any], Any], job: Any) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.job, self.heard = job, time.monotonic()
        self.process = _SPAWN.Process(target=_serve, args=(work, job, theirs), daemon=True)
        try:
            self.process.start()
        except OSError as error:
            raise UserError(f"cannot start a worker process ({error}): try workers=1") from error
        theirs.close()  # the end of the process is then the end of the pipe

    def start(self, job: Any) -> None:
        self.job, self.heard = job, time.monotonic()
        with suppress(OSError):  # it has died since: the end of the pipe tells
            self.connection.send(job)

    def receive(self) -> tuple[str, Any]:
        """("tick", None), ("done", the result) or ("lost", ``Lost``); what the job raised is raised."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return "lost", Lost(f"died (exit status {self.process.exitcode})")
        self.heard = time.monotonic()
        if kind == "refused":
            raise UserError(value)
        if kind == "failed":
            raise RuntimeError(f"a worker process failed:\n{value}")
        return kind, value

    def close(self, *, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        self.connection.close()  # an idle process ends by that
        self.process.join(10)


def _serve(work: Callable[[Any], Any], job: Any, connection: Connection) -> None:
    global _connection
    _connection = connection
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError):  # the parent needs no more
        while True:
            message: tuple[str, Any]
            try:
                message = ("done", work(job))
            except UserError as error:
                message = ("refused", str(error))
            except Exception:
                message = ("failed", traceback.format_exc())
            connection.send(message)
            job = connection.recv()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
