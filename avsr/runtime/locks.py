"""One writer at a time per output, across hosts, and with takeover from a writer that was killed.

An output is a folder, locked by ``FOLDER/.lock``, or one of several in a folder, locked by ``FOLDER/.NAME.lock``: a run
is evaluated while its training goes on. A lock is a folder with one file. The file's name identifies the holder; its
modification time is the holder's last sign of life. A new holder renames a folder with its own file to the lock's name,
which fails while another one exists. To take over from a dead holder, a process renames that file to its own name,
which only one of several can do. Both are single renames, so they work on network file systems, where flock may not
reach other hosts and where filelock's SoftFileLease never releases the lock of a killed process (it needs to exchange
two names atomically).
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from avsr.errors import EXIT_USER, UserError, at, stopped
from avsr.runtime.folders import drop_dead_parts, part_of, probe
from avsr.runtime.pids import namespace, process_start

logger = logging.getLogger("avsr")
LOCK = ".lock"
STALE = 300.0  # seconds without a sign of life after which a holder counts as dead
_HELD: set[Path] = set()  # the files of this process in its locks
BEAT = 10.0  # seconds between signs of life; on network file systems other hosts see them up to a minute late


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock."""

    host: str
    space: int  # its namespace of process ids, which containers on one host do not share
    pid: int
    born: int  # see process_start; 0 = unknown
    since: int  # seconds since the epoch by its own clock, only for messages
    token: str

    @classmethod
    def own(cls) -> Holder:
        pid = os.getpid()
        return cls(platform.node(), namespace(), pid, process_start(pid), int(time.time()), secrets.token_hex(8))

    @classmethod
    def parse(cls, path: Path) -> Holder:
        """Raises a ``UserError`` for a file that does not belong to a lock."""
        try:
            host, space, pid, born, since, token = path.name.split("@")
            return cls(unquote(host), int(space), int(pid), int(born), int(since), token)
        except ValueError:
            raise UserError(f"{path} does not belong there: delete {path.parent} if nothing writes there") from None

    @property
    def name(self) -> str:
        return "@".join(quote(str(value), safe="") for value in astuple(self))

    @property
    def here(self) -> bool:
        """Whether this process can see that process."""
        return bool(self.born) and (self.host, self.space) == (platform.node(), namespace())

    @property
    def dead(self) -> bool:
        """Whether it has certainly ended; another process may have its id by now."""
        return self.here and process_start(self.pid) != self.born

    def __str__(self) -> str:
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        except (OverflowError, ValueError, OSError):
            since = "?"
        return f"process {self.pid} on {self.host} since {since}"


@contextmanager
def claim(folder: Path, name: str = "", key: str = "") -> Iterator[None]:
    """:func:`hold` for a command: also probes the folder, and lets SIGTERM unwind, so that no lock stays behind for
    which a process on another host would have to wait.

    Raises:
        UserError: as :func:`hold`, or there is no space.
    """
    with hold(folder, name, key), unwinding():
        try:
            probe(folder)
        except OSError as error:
            raise UserError(f"{at(key)}cannot write to {folder}: {error.strerror or error}") from error
        yield


@contextmanager
def hold(folder: Path, name: str = "", key: str = "", *, wait: bool = False) -> Iterator[None]:
    """Creates ``folder`` and holds its lock, or with ``name`` that of this one output in it. Readers do not need it.
    ``key`` is what the user named the folder with, for messages.

    If the holder is on another host and may be dead, this waits for a sign of life, for at most :data:`STALE` seconds.
    With ``wait`` it waits until the holder has left.

    Raises:
        UserError: another process writes there (unless ``wait``), or the folder is not writable.
    """
    path, own = folder / (f".{name}{LOCK}" if name else LOCK), Holder.own()
    new, made = part_of(path), not folder.exists()
    over = threading.Event()
    thread = threading.Thread(target=_live, args=(path / own.name, over), name="lock", daemon=True)
    try:  # from here on: a signal may unwind anywhere
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            (new / own.name).touch()
            _HELD.add(path / own.name)
            _enter(path, own.name, new, folder / name, wait)
        except OSError as error:
            raise UserError(f"{at(key)}cannot write to {folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
        drop_dead_parts(folder)
        thread.start()
        yield
    finally:
        if os.getpid() == own.pid:  # not in a fork
            with _undisturbed():
                over.set()
                if thread.is_alive():
                    thread.join()
                _HELD.discard(path / own.name)
                _release(path / own.name)
                if made:
                    with suppress(OSError):  # it holds something by now
                        folder.rmdir()


def refuse_held(folder: Path) -> None:
    """Raises a ``UserError`` if a process that may be alive holds the lock of ``folder``. Does not wait, takes none."""
    path = folder / LOCK
    while there := _files(path):
        holder = Holder.parse(path / there[0])
        try:
            silent = now_in(folder) - (path / there[0]).stat().st_mtime
        except FileNotFoundError:  # released or taken over
            continue
        if not holder.dead and silent <= STALE:
            raise _in_use(folder, holder)
        return


def release_all() -> None:
    """For a process that ends without unwinding, so that nobody has to wait until its locks are stale."""
    for file in _HELD:
        _release(file)


def now_in(folder: Path) -> float:
    """The current time by the clock that stamps the files of ``folder``'s file system."""
    probe = part_of(folder / "now")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _enter(path: Path, own: str, new: Path, output: Path, patient: bool) -> None:
    """Makes ``own`` the file in ``path``, the lock of ``output``; ``new`` is a folder with a file of that name."""
    seen: tuple[str, float] | None = None
    waits_for = ""
    while True:
        refused: OSError | None = None
        try:
            os.rename(new, path)
        except OSError as error:
            refused = error
        there = _files(path)
        if own in there:  # even if the rename failed: a network file system may send it twice
            return
        if not there:
            if refused is not None and refused.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise refused
            continue
        file = path / there[0]
        holder = Holder.parse(file)
        try:
            beat = file.stat().st_mtime
        except FileNotFoundError:
            continue
        silent = now_in(path.parent) - beat
        if holder.dead or silent > STALE:
            why = "has ended" if holder.dead else f"gave no sign of life for {silent:.0f} s"
            logger.warning("%s was in use by %s, which %s: this process takes over", output, holder, why)
            with suppress(FileNotFoundError):  # another process was faster
                os.utime(file)  # before the rename, or the new name would look just as old
                os.rename(file, path / own)
            continue
        if patient:
            if waits_for != holder.name:
                logger.info("%s is being made by %s: waiting for it", output, holder)
            waits_for = holder.name
            time.sleep(min(0.2, BEAT / 4))
            continue
        if holder.here or seen not in (None, (file.name, beat)):
            raise _in_use(output, holder)
        if seen is None:
            wait = STALE - silent
            logger.warning("%s: waiting for a sign of life of %s, at most %.0f s", output, holder, wait)
        seen = file.name, beat
        time.sleep(min(1.0, BEAT / 4))


def _in_use(output: Path, holder: Holder) -> UserError:
    return UserError(f"{output} is in use by {holder}: wait for its end, or stop it")


def _release(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
        file.parent.rmdir()


def _files(path: Path) -> list[str]:
    try:
        return [name for name in os.listdir(path) if not name.startswith(".nfs")]
    except FileNotFoundError:
        return []


def _live(file: Path, over: threading.Event) -> None:
    missing = 0
    while not over.wait(BEAT):
        try:
            os.utime(file)
            missing = 0
        except FileNotFoundError:
            missing += 1
        except OSError:  # a network file system that is temporarily unavailable
            continue
        if missing == 2 and not over.is_set():
            print(
                f"avsr: {file.parent} is no longer this process's: deleted, or taken over after {STALE:.0f} s without "
                "a sign of life; it ends, so that no two write there",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_USER)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside this context SIGTERM waits for its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if told:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def unwinding() -> Iterator[None]:
    """Inside this context SIGTERM raises ``SystemExit``. Not for training, which handles it between its steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stopped)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
