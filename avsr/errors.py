"""What a user is meant to read, and how a command ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input: the message names the file, line, key or value and what to do.

    A command prints it without a traceback and exits with status 2.
    """


class Interrupted(Exception):
    """Training was stopped by a signal; a checkpoint has been written."""


@contextmanager
def guarded() -> Iterator[None]:
    """Ends the process with one line on stderr and an exit status for everything that is no fault of the code."""
    try:
        yield
    except UserError as error:
        print(f"avsr: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None
    except Interrupted:
        print("avsr: stopped, a checkpoint is written; continue with resume=true", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except KeyboardInterrupt:
        print("avsr: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
