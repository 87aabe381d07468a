"""Ends all ranks when one fails, or when one hangs, which it names with its stage long before a collective's time-out.

Ranks go through the stages of a step together, so one rank that stays in a stage too long is enough. During the start
and in an evaluation one rank may be busy for hours while others wait for it: then all ranks have to be stuck, and
progress on a progress bar counts as a sign of life.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from avsr.errors import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_USER, Interrupted, UserError
from avsr.runtime.locks import release_all
from avsr.runtime.progress import ProgressBar
from avsr.training.meeting import FAREWELL, NOTICE, Place, connect

logger = logging.getLogger("avsr")

_STARTING = {
    "process group": "joins the process group",
    "run folder": "locks and reads the run folder",
    "model": "loads the model",
    "manifests": "reads the manifests",
    "engine": "makes the engine",
}
_EVALUATING = {"decoding": "decodes its share", "results": "brings the results together"}
_ALONE = {**_STARTING, **_EVALUATING}  # stages in which a rank may be busy for long while others wait for it
START = tuple(_STARTING)
# in the order of a step: the others wait for the rank that is in the earliest stage. The data of a step is read after
# the backward of the one before
STAGES = (*_ALONE, "counts", "forward", "backward", "data", "metrics", "optimizer", "validation", "checkpoint")
_AHEAD = "data"
START_LEAST = 30.0  # seconds that a stage of the start may always take
_ABORT, _LEFT = "abort", "left"
_GRACE = 2.0  # seconds after which a rank that has not ended by itself is ended


class Watchdog:
    """A thread per rank that reports its stage to the others every second, once :meth:`connect` was called. A rank that
    fails inside this context ends the others too, with its message: they may wait for it in a collective.

    Args:
        timeout: seconds that a rank may spend in one stage; 0 = forever.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._rank, self._ranks = 0, 1
        self._step, self._stage, self._since = 0, STAGES[0], time.monotonic()
        self._noticed = self._since
        self._over = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}  # by rank: its last count, and when it arrived
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        ProgressBar.moved.append(self.move)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        ProgressBar.moved.remove(self.move)
        if self._store is not None:
            with suppress(dist.DistError):  # another rank was faster
                failed = None if isinstance(value, Interrupted) else value  # on a signal all ranks agree
                if failed is not None:
                    self._abort(self._store, _reason(self._rank, failed), _status(failed))
                self._take_leave(self._store, wait=failed is not None)

    @property
    def patience(self) -> float:
        """Seconds that a stage of the start may take; 0 = forever."""
        return max(self.timeout, START_LEAST) if self.timeout else 0.0

    def connect(self, place: Place) -> None:
        """Connects this rank to the others."""
        self._rank, self._ranks = place.rank, place.ranks
        if self._thread is not None and place.ranks > 1:
            self._store = connect(place)

    def enter(self, stage: str, step: int) -> None:
        """Records that this rank begins ``stage`` of ``step``."""
        self._step, self._stage, self._since = step, stage, time.monotonic()

    def move(self) -> None:
        """Records a sign of life in this stage."""
        self._since = time.monotonic()

    def _watch(self) -> None:
        count = 0
        while not self._over.wait(min(1.0, self.timeout / 4) if self.timeout else 1.0):
            count += 1
            age, store = time.monotonic() - self._since, self._store
            if store is None:
                places = [(*_moment(self._step, self._stage), -age, self._rank)]
                self._notice(places)
                if age > self._patience(self._stage):
                    _leave(self._describe(places))
                continue
            try:
                store.set(f"rank/{self._rank}", json.dumps([count, self._step, self._stage, age]))
                if store.check([_ABORT]):
                    self._follow(store)
                    return
                problem = self._judge(store) if self._rank == 0 else ""
                if problem:
                    self._abort(store, problem, EXIT_HUNG)
                    self._take_leave(store)
                    _leave(problem)
            except dist.DistError:
                if not self._over.is_set():
                    _leave(f"rank 0 does not answer while rank {self._rank} is in {self._stage} of step {self._step}")
                return

    def _abort(self, store: dist.Store, problem: str, status: int) -> None:
        store.compare_set(_ABORT, "", json.dumps([problem, status]))

    def _follow(self, store: dist.Store) -> None:
        """Ends this rank because another one has failed, unless it is about to end by itself: most refusals are
        collective."""
        problem, status = json.loads(store.get(_ABORT))
        if not self._over.wait(_GRACE):
            self._take_leave(store)
            _leave(problem, status)

    def _take_leave(self, store: dist.Store, *, wait: bool = False) -> None:
        """Ends this rank's part. Rank 0, which keeps the store, and a rank that failed leave when the others have read
        why, if these still answer: a connection that ends would look like another failure."""
        until = time.monotonic() + _GRACE + FAREWELL
        store.add(_LEFT, 1)
        while (wait or self._rank == 0) and store.add(_LEFT, 0) < self._ranks and time.monotonic() < until:
            time.sleep(0.05)

    def _notice(self, places: list[tuple[int, int, float, int]]) -> None:
        """Says from time to time what the start waits for; ``places`` as in :meth:`_describe`."""
        now = time.monotonic()
        if all(STAGES[stage] in _ALONE for _, stage, _, _ in places) and now - max(self._since, self._noticed) > NOTICE:
            self._noticed = now
            _, stage, age, rank = places[0]
            waiting = sum(other > stage for _, other, _, _ in places)
            rest = f"; {waiting} of {self._ranks} ranks wait for it" if waiting else ""
            logger.warning("rank %d %s, for %.0f s so far%s", rank, _ALONE[STAGES[stage]], -age, rest)

    def _judge(self, store: dist.Store) -> str:
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
            places.append((*_moment(step, stage), -age, rank))
        self._notice(sorted(places))
        late = [-age > self._patience(STAGES[stage]) for _, stage, age, _ in places]
        alone = any(STAGES[stage] in _ALONE for _, stage, _, _ in places)
        hung = bool(late) and all(late) if alone else any(late)
        return self._describe(sorted(places)) if hung else ""

    def _patience(self, stage: str) -> float:
        return (self.patience if stage in _ALONE else self.timeout) or math.inf

    def _describe(self, places: list[tuple[int, int, float, int]]) -> str:
        """``places`` are (*moment, -seconds, rank), the earliest first."""

        def where(step: int, stage: int, age: float) -> str:
            name = STAGES[stage]
            part = name if name in _EVALUATING else f"{name} of step {step + (name == _AHEAD)}"
            part = f"the start ({name})" if name in START else part
            return f"{part} for {-age:.0f} s"

        step, stage, age, rank = places[0]
        rest = ", ".join(f"rank {r} in {where(s, g, a)}" for s, g, a, r in places[1:6])
        shown = f"rank {rank} hangs in {where(step, stage, age)} (training.timeout = {self.timeout:g} s)"
        return f"{shown}; {rest}" if rest else shown


def _moment(step: int, stage: str) -> tuple[int, int]:
    """Orders what ranks do: the step in which they do it, and the place of the stage in a step."""
    return step - (stage == _AHEAD), STAGES.index(stage)


def _reason(rank: int, error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"rank {rank}: {error}"
    if isinstance(error, SystemExit):  # of an evaluation, whose SIGTERM does not wait for a step to end
        return f"rank {rank} was stopped"
    text = (str(error).splitlines() or [""])[0]
    return f"rank {rank} failed: {type(error).__name__}" + (f": {text}" if text else "")


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return EXIT_USER if isinstance(error, UserError) else 1


def _leave(problem: str, status: int = EXIT_HUNG) -> None:
    print(f"avsr: {problem}", file=sys.stderr, flush=True)
    if status == EXIT_HUNG:
        faulthandler.dump_traceback(all_threads=True)
    release_all()
    os._exit(status)
