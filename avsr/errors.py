"""Errors for users, and the exit status of commands."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_USER = 2
EXIT_PREEMPTED = 75  # SIGTERM, after writing a checkpoint: run the same command again (EX_TEMPFAIL)
EXIT_HUNG = 124  # ended by the watchdog
EXIT_INTERRUPTED = 130

# Control characters, ends of lines of Unicode, those that turn the direction of what follows, and halves of pairs
HIDDEN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # of a URL, with the user name before it


def visible(text: str, keep: str = "") -> str:
    """``text`` on one line for a terminal or a page: characters that would act instead of being seen are escaped as in
    Python, except those in ``keep``. Names of files and transcripts may hold any."""
    return HIDDEN.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


class UserError(Exception):
    """Bad input: the message names the file, line, key or value and what to do.

    A command prints it without a traceback and exits with status 2. It may quote files, so passwords of URLs are
    removed and control characters are escaped, except those in ``kept``.
    """

    kept = "\n\t"

    def __init__(self, message: str) -> None:
        super().__init__(visible(PASSWORD.sub("***", message), self.kept))


def at(where: str) -> str:
    """The start of a message about ``where``, such as "file:line"; "" where that is not known."""
    return f"{where}: " if where else ""


class ClipError(UserError):
    """The clip of one utterance cannot be used; others can. The message has one line, whatever its files are called."""

    kept = ""


class Interrupted(Exception):
    """The signal ``number`` stopped training; a checkpoint has been written."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def stopped(number: int, frame: Any) -> None:
    """What SIGTERM does, except between the steps of a training."""
    print("avsr: stopped by SIGTERM; what is done is kept, the same command continues", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_PREEMPTED)


@contextmanager
def guarded() -> Iterator[None]:
    """Ends the process with one line on stderr and an exit status for everything that is not a fault of the code.

    SIGTERM unwinds, unless there are other ranks: one that waits for them in native code would not get to do so.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    if alone:
        signal.signal(signal.SIGTERM, stopped)
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
