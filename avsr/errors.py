"""Errors for users, and the exit status of commands."""

from __future__ import annotations

import errno
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER = 2
EXIT_PREEMPTED = 75  # SIGTERM, after writing a checkpoint: run the same command again (EX_TEMPFAIL)
EXIT_HUNG = 124  # ended by the watchdog
EXIT_INTERRUPTED = 130

PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # of a URL, with the user name before it


class UserError(Exception):
    """Bad input: the message names the file, line, key or value and what to do.

    A command prints it without a traceback and exits with status 2. It may quote files, so passwords of URLs are
    removed and control characters are escaped, except tabs and line ends.
    """

    def __init__(self, message: str) -> None:
        shown = PASSWORD.sub("***", message)
        super().__init__("".join(c if c >= " " and c != "\x7f" or c in "\n\t" else repr(c)[1:-1] for c in shown))


def at(where: str) -> str:
    """The start of a message about ``where``, such as "file:line"; "" where that is not known."""
    return f"{where}: " if where else ""


class ClipError(UserError):
    """The clip of one utterance cannot be used; others can."""


class Interrupted(Exception):
    """The signal ``number`` stopped training; a checkpoint has been written."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def guarded() -> Iterator[None]:
    """Ends the process with one line on stderr and an exit status for everything that is not a fault of the code."""
    try:
        yield
    except UserError as error:
        print(f"avsr: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None
    except Interrupted as error:
        print("avsr: stopped, a checkpoint is written; continue with resume=true", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED if error.number == signal.SIGTERM else EXIT_INTERRUPTED) from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"avsr: {error.strerror}: {str(error.filename)[:80]!r}...", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None
    except KeyboardInterrupt:
        print("avsr: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
