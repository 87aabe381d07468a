"""Says which rank hangs, in which stage, and ends all of them: a hung collective would wait for its own time-out."""

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

# in the order of a step: the rank that is furthest behind is the one that the others wait for
STAGES = ("data", "counts", "forward", "backward", "optimizer", "metrics", "validation", "checkpoint")
_ABORT = "abort"


class Watchdog:
    """A thread a rank that tells the others every second where its training stands.

    Args:
        timeout: seconds that a rank may spend in one stage; 0 switches the watchdog off.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._step, self._stage, self._since = 0, STAGES[0], time.monotonic()
        self._over = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}  # by rank: its last count, and when it came
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """All ranks call it."""
        if not self.timeout:
            return
        store = self._connect()
        self._thread = threading.Thread(target=self._watch, args=(store,), name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, stage: str, step: int) -> None:
        """Says that this rank begins ``stage`` of ``step``."""
        self._step, self._stage, self._since = step, stage, time.monotonic()

    def stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _connect(self) -> dist.TCPStore:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        patience = timedelta(seconds=max(self.timeout, 30))
        own: Any = dist.TCPStore(host, 0, None, True, patience, wait_for_workers=False) if self._rank == 0 else None
        port = [own.port if own is not None else 0]
        dist.broadcast_object_list(port, src=0)
        return own or dist.TCPStore(host, port[0], None, False, patience, wait_for_workers=False)

    def _watch(self, store: dist.TCPStore) -> None:
        count = 0
        while not self._over.wait(min(1.0, self.timeout / 4)):
            count += 1
            age = time.monotonic() - self._since
            try:
                store.set(f"rank/{self._rank}", json.dumps([count, self._step, self._stage, age]))
                if store.check([_ABORT]):
                    _leave(store.get(_ABORT).decode())
                problem = self._judge(store) if self._rank == 0 else ""
            except dist.DistError:
                if not self._over.is_set():  # at the end rank 0 takes its store along
                    _leave(f"rank 0 does not answer while rank {self._rank} is in {self._stage} of step {self._step}")
                return
            if problem:
                store.set(_ABORT, problem)
                self._over.wait(3.0)  # the others read it
                _leave(problem)

    def _judge(self, store: dist.TCPStore) -> str:
        """Rank 0: which rank hangs, or ""."""
        now = time.monotonic()
        places, hung = [], False
        for rank in range(self._ranks):
            key = f"rank/{rank}"
            if not store.check([key]):
                continue
            count, step, stage, age = json.loads(store.get(key))
            if self._heard.get(rank, (0, 0.0))[0] != count:
                self._heard[rank] = (count, now)
            age += now - self._heard[rank][1]  # a stopped process counts no more
            places.append((step, STAGES.index(stage), -age, rank))
            hung = hung or age > self.timeout
        if not hung:
            return ""
        step, stage, age, rank = min(places)
        rest = ", ".join(f"rank {r} in {STAGES[g]} of step {s} for {-a:.0f} s" for s, g, a, r in sorted(places)[1:6])
        return (
            f"rank {rank} hangs in {STAGES[stage]} of step {step} for {-age:.0f} s (training.timeout = "
            f"{self.timeout:g} s)" + (f"; {rest}" if rest else "")
        )


def _leave(problem: str) -> None:
    print(f"avsr: {problem}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_HUNG)
