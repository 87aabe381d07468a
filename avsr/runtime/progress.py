"""A progress bar with an ETA for everything that takes long; plain lines when stderr is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_SECONDS = 15.0  # between plain lines


class ProgressBar:
    """``with ProgressBar("features", total) as bar: bar.advance()``; ``shown=False`` prints nothing.

    Every advance of any bar calls all functions in ``moved``.
    """

    moved: ClassVar[list[Callable[[], None]]] = []

    def __init__(self, title: str, total: int, *, done: int = 0, shown: bool = True) -> None:
        self._title, self._total, self._done, self._first = title, total, done, done
        self._shown = shown
        self._note = ""
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = _columns()
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and kind is None:
            self._line()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Advances by ``count``; ``note`` is shown after the numbers."""
        for call in self.moved:
            call()
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=self._note)
        elif self._shown and time.monotonic() - self._last >= PLAIN_SECONDS and self._done < self._total:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        moved = self._done - self._first
        eta = f"{elapsed / moved * (self._total - self._done):.0f}" if moved else "?"
        print(
            f"{self._title} {self._done}/{self._total}  {elapsed:.0f} s, ETA {eta} s  {self._note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


def _columns() -> Progress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
