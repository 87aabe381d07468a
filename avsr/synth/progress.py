"""Progress on stderr: a bar with the time left on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 5.0


def note(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Counts utterances: ``with Progress(total) as progress: progress.advance()``."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._bar: Any = None
        self._task: Any = None
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("speaking", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            note(f"synth: {self._done} utterances in {time.monotonic() - self._began:.0f} s")

    def advance(self) -> None:
        """One more utterance is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._began) / self._done * (self._total - self._done)
            note(f"synth: {self._done} of {self._total} utterances, about {left:.0f} s left")


def _rich_bar() -> Any:
    """A bar of rich, or None if rich is not installed."""
    try:
        from rich import progress as rich_progress
        from rich.console import Console
    except ImportError:
        return None
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
