"""What a user is meant to read, and how a command ends."""

from __future__ import annotations

import errno
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER = 2
EXIT_PREEMPTED = 75  # SIGTERM, a checkpoint is written: start the same command again (EX_TEMPFAIL)
EXIT_HUNG = 124  # the watchdog ended it
EXIT_INTERRUPTED = 130


PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # of a URL, with the name in front of it


class UserError(Exception):
    """Bad input: the message names the file, line, key or value and what to do.

    A command prints it without a traceback and exits with status 2. What files say may stand in it, so passwords of
    URLs are left out, and of control characters only the ends of lines get to the terminal.
    """

    def __init__(self, message: str) -> None:
        shown = PASSWORD.sub("***", message)
        super().__init__("".join(c if c >= " " and c != "\x7f" or c in "\n\t" else repr(c)[1:-1] for c in shown))


class ClipError(UserError):
    """One utterance's clip cannot be used; others can."""


class Interrupted(Exception):
    """Training was stopped by the signal ``number``; a checkpoint has been written."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def guarded() -> Iterator[None]:
    """Ends the process with one line on stderr and an exit status for everything that is no fault of the code."""
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
