"""Runs jobs in a few long-lived processes; one that dies takes only its own job with it."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from typing import Any

from avsr.runtime.machine import cpus


def run_jobs(work: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """(job, result) of each job as it is done; the result is None where the process died.

    A video can crash the decoder that reads it. All jobs that were under way are then run again, each in a process
    of its own, so that the one to blame is found.

    Args:
        work: a function of an importable module. What it raises is raised here.
        jobs: its arguments, taken as they are needed.
        workers: processes at a time; 0 means one for each CPU. 1 means this process, which a crash ends too.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(job)
        return
    waiting = iter(jobs)
    while True:
        suspects: deque[Any] = deque()
        yield from _until_a_crash(work, waiting, workers or cpus(), suspects)
        if not suspects:
            return
        for job in suspects:
            alone: deque[Any] = deque()
            yield from _until_a_crash(work, iter([job]), 1, alone)
            if alone:
                yield job, None


def _until_a_crash(
    work: Callable[[Any], Any], jobs: Iterator[Any], workers: int, lost: deque[Any]
) -> Iterator[tuple[Any, Any]]:
    running: dict[Future[Any], Any] = {}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_leave_interrupts)
    try:
        while True:
            with suppress(BrokenProcessPool):  # the futures tell
                for job in islice(jobs, max(0, 2 * workers - len(running))):
                    lost.append(job)  # it is nowhere else if the pool breaks now
                    running[pool.submit(work, job)] = job
                    lost.pop()
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    lost.append(job)
                    continue
                yield job, result
            if lost:
                lost.extend(running.values())
                return
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
