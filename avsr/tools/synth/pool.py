"""Runs every job in a fresh process, a few at a time, and fails with a message when one dies or hangs."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from avsr.errors import UserError

# An utterance takes well under a second; the rest is for a cold start of the interpreter on a busy disk.
STALL_SECONDS = 120.0


@dataclass
class _Running:
    index: int
    process: BaseProcess
    heard: float  # time.monotonic() of its last message


def run_jobs(
    work: Callable[[Any, Callable[[], None]], Any],
    jobs: list[Any],
    workers: int,
    on_tick: Callable[[], None],
    stall_seconds: float = STALL_SECONDS,
) -> list[Any]:
    """Calls ``work(job, tick)`` for each job in a new interpreter and returns the results in the jobs' order.

    New interpreters import the program's main module, so a script that calls this needs the usual
    ``if __name__ == "__main__"``.

    Args:
        work: a function of an importable module. A ``UserError`` it raises is raised here.
        jobs: its arguments; they and the results travel between processes.
        workers: processes at a time, at least 1.
        on_tick: called here whenever a job calls its ``tick``.
        stall_seconds: a process that says nothing for so long has hung.

    Raises:
        UserError: a job raised, died or hung. The other processes are ended.
    """
    context = multiprocessing.get_context("spawn")
    results: list[Any] = [None] * len(jobs)
    waiting = list(enumerate(jobs))
    running: dict[Any, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, job = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, job, theirs), daemon=True)
                try:
                    process.start()
                except OSError as error:
                    raise UserError(f"cannot start a speech process ({error}): try workers=1") from error
                theirs.close()  # so that the end of the process is seen as the end of the pipe
                running[ours] = _Running(index, process, time.monotonic())
            for connection in wait(list(running), timeout=min(1.0, stall_seconds)):
                _receive(connection, running, results, on_tick)
            for job_running in running.values():
                if time.monotonic() - job_running.heard > stall_seconds:
                    raise UserError(
                        f"a speech process did nothing for {stall_seconds:.0f} s and was ended: run the same"
                        " command again, with workers=1 if the machine is short of memory"
                    )
    finally:
        _end_all(running)
    return results


def _receive(connection: Any, running: dict[Any, _Running], results: list[Any], on_tick: Callable[[], None]) -> None:
    job = running[connection]
    try:
        kind, value = connection.recv()
    except (EOFError, OSError):
        job.process.join(10)
        raise UserError(
            f"a speech process died (exit status {job.process.exitcode}): run the same command again,"
            " with workers=1 if the machine is short of memory"
        ) from None
    job.heard = time.monotonic()
    if kind == "tick":
        on_tick()
    elif kind == "done":
        results[job.index] = value
        del running[connection]
        connection.close()
        job.process.join(10)
    else:
        raise UserError(value)


def _end_all(running: dict[Any, _Running]) -> None:
    for job in running.values():
        job.process.kill()
    for connection, job in running.items():
        job.process.join(10)
        connection.close()


def _child(work: Callable[[Any, Callable[[], None]], Any], job: Any, connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its children
    with suppress(BrokenPipeError):  # the parent is gone, nobody needs the rest
        try:
            result = work(job, lambda: connection.send(("tick", None)))
        except UserError as error:
            connection.send(("error", str(error)))
        except BrokenPipeError:
            raise
        except Exception:
            connection.send(("error", f"a speech process failed:\n{traceback.format_exc()}"))
        else:
            connection.send(("done", result))
    connection.close()
