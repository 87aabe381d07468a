"""Names the rank that hangs and its stage, and ends all ranks, long before a collective's own time-out.

Ranks go through the stages of a step together, so one rank that stays in a stage too long is enough. During the start
one rank may read clips for hours while others wait for it: then all ranks have to be stuck, and progress on a progress
bar counts as a sign of life.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from avsr.errors import EXIT_HUNG
from avsr.runtime.progress import ProgressBar

START = ("process group", "run folder", "model", "manifests", "engine")
# in the order of a step: the others wait for the rank that is in the earliest stage
STAGES = (*START, "data", "counts", "forward", "backward", "optimizer", "metrics", "validation", "checkpoint")
START_LEAST = 30.0  # seconds that a stage of the start may always take
_ABORT = "abort"


class Watchdog:
    """A thread per rank that reports its stage to the others every second, once :meth:`connect` was called.

    Args:
        timeout: seconds that a rank may spend in one stage; 0 disables the watchdog.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._rank, self._ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._step, self._stage, self._since = 0, STAGES[0], time.monotonic()
        self._over = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}  # by rank: its last count, and when it arrived
        self._store: dist.TCPStore | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.timeout:
            ProgressBar.moved.append(self._move)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            ProgressBar.moved.remove(self._move)

    def connect(self) -> None:
        """Connects the ranks. Collective."""
        if self._thread is not None:
            self._store = self._connect()

    def enter(self, stage: str, step: int) -> None:
        """Records that this rank begins ``stage`` of ``step``."""
        self._step, self._stage, self._since = step, stage, time.monotonic()

    def _move(self) -> None:
        self._since = time.monotonic()

    def _connect(self) -> dist.TCPStore:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        patience = timedelta(seconds=max(self.timeout, 30))
        own: Any = dist.TCPStore(host, 0, None, True, patience, wait_for_workers=False) if self._rank == 0 else None
        port = [own.port if own is not None else 0]
        dist.broadcast_object_list(port, src=0)
        return own or dist.TCPStore(host, port[0], None, False, patience, wait_for_workers=False)

    def _watch(self) -> None:
        count = 0
        while not self._over.wait(min(1.0, self.timeout / 4)):
            count += 1
            age, store = time.monotonic() - self._since, self._store
            if store is None:
                if age > self._patience(self._stage):
                    _leave(self._describe([(self._step, STAGES.index(self._stage), -age, self._rank)]))
                continue
            try:
                store.set(f"rank/{self._rank}", json.dumps([count, self._step, self._stage, age]))
                if store.check([_ABORT]):
                    _leave(store.get(_ABORT).decode())
                problem = self._judge(store) if self._rank == 0 else ""
            except dist.DistError:
                if not self._over.is_set():  # at the end rank 0 closes its store first
                    _leave(f"rank 0 does not answer while rank {self._rank} is in {self._stage} of step {self._step}")
                return
            if problem:
                store.set(_ABORT, problem)
                self._over.wait(3.0)  # time for the others to read it
                _leave(problem)

    def _judge(self, store: dist.TCPStore) -> str:
        """On rank 0: which rank hangs, or ""."""
        now = time.monotonic()
        places = []
        for rank in range(self._ranks):
            key = f"rank/{rank}"
            if not store.check([key]):
                continue
            count, step, stage, age = json.loads(store.get(key))
            if self._heard.get(rank, (0, 0.0))[0] != count:
                self._heard[rank] = (count, now)
            age += now - self._heard[rank][1]  # a stopped process no longer counts up
            places.append((step, STAGES.index(stage), -age, rank))
        late = [-age > self._patience(STAGES[stage]) for _, stage, age, _ in places]
        starting = any(STAGES[stage] in START for _, stage, _, _ in places)
        hung = bool(late) and all(late) if starting else any(late)
        return self._describe(sorted(places)) if hung else ""

    def _patience(self, stage: str) -> float:
        return max(self.timeout, START_LEAST) if stage in START else self.timeout

    def _describe(self, places: list[tuple[int, int, float, int]]) -> str:
        """``places`` are (step, stage, -seconds, rank), the earliest first."""

        def where(step: int, stage: int, age: float) -> str:
            name = STAGES[stage]
            part = f"the start ({name})" if name in START else f"{name} of step {step}"
            return f"{part} for {-age:.0f} s"

        step, stage, age, rank = places[0]
        rest = ", ".join(f"rank {r} in {where(s, g, a)}" for s, g, a, r in places[1:6])
        shown = f"rank {rank} hangs in {where(step, stage, age)} (training.timeout = {self.timeout:g} s)"
        return f"{shown}; {rest}" if rest else shown


def _leave(problem: str) -> None:
    print(f"avsr: {problem}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_HUNG)
