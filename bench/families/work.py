"""Processes that judge one class at a time; one that dies or takes too long is replaced."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from bench.families import store
from bench.families.build import Entry
from bench.families.store import Row

CLASSES = 60  # that a process judges before a fresh one takes its place, since modules and caches pile up


def rows(entries: Sequence[Entry], workers: int, limit: float, compile: bool) -> Iterator[tuple[Entry, Row]]:
    """(entry, row) of every entry as they come; ``limit`` in seconds for one class."""
    queue, running = list(reversed(entries)), [_Worker(compile) for _ in range(min(workers, len(entries)))]
    try:
        for worker in running:
            worker.begin(queue.pop())
        while any(worker.entry for worker in running):
            wait([worker.pipe for worker in running if worker.entry], timeout=1.0)
            for place, worker in enumerate(running):
                if worker.entry is None:
                    continue
                row = worker.answer(limit)
                if row is None:
                    continue
                yield worker.entry, row
                if worker.done >= CLASSES or not worker.process.is_alive():
                    worker.stop()
                    worker = running[place] = _Worker(compile)
                worker.entry = None
                if queue:
                    worker.begin(queue.pop())
    finally:
        for worker in running:
            worker.stop()


class _Worker:
    def __init__(self, compile: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, compile), daemon=True)
        self.process.start()
        other.close()
        self.entry: Entry | None = None
        self.phase, self.done, self.since = "", 0, 0.0

    def begin(self, entry: Entry) -> None:
        self.entry, self.phase, self.since = entry, "starting", time.monotonic()
        self.pipe.send(entry)

    def answer(self, limit: float) -> Row | None:
        """The row, or None as long as there is none."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, dict):
                    self.done += 1
                    return message
                if self.phase == "starting":
                    self.since = time.monotonic()  # importing does not count
                self.phase = message
        except (EOFError, OSError):
            self.process.join()
            return self._failed(f"the process ended with {self.process.exitcode}")
        if time.monotonic() - self.since > limit + 60 * (self.phase == "starting"):
            self.stop()
            return self._failed(f"no answer in {limit:.0f} s")
        return None

    def _failed(self, what: str) -> Row:
        ours = self.phase == "attached"
        return {"verdict": store.CRASH if ours else store.LEFT_OUT, "reason": f"{what} ({self.phase})"}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, compile: bool) -> None:
    for entry in iter(pipe.recv, None):
        pipe.send(_answer(entry, pipe, compile))


def _answer(entry: Entry, pipe: Any, compile: bool) -> Row:
    prepare()
    from bench.families import build, judge

    began = time.monotonic()
    pipe.send("plain")
    try:
        row = store.row_of(judge.judge(entry, compile=compile, phase=pipe.send))
    except build.LeftOut as error:
        row = {"verdict": store.LEFT_OUT, "reason": str(error)}
    except Exception as error:
        row = {"verdict": store.LEFT_OUT, "reason": f"the sweep itself failed: {build.line(error)}"}
    return row | {"seconds": round(time.monotonic() - began, 1)}


def prepare() -> None:
    """One thread, nothing from the network, no warnings."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
