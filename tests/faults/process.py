"""Runs commands in forked processes, with a fault at a chosen moment of their writing.

A server imports everything once; each command then runs in a fork of it, which costs no more than its own work. A
moment is the number of a write: Python's audit events of files that are opened for writing, renamed, made or deleted
below a folder. What libraries write without Python (safetensors, libsndfile, FFmpeg) is seen when it is renamed.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import socketserver
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Faults at a moment: kill -9, the same within the next write, SIGTERM, a disk that is full from then on, a file system
# that refuses every write, a process that waits until it is told to go on
KILL, TORN, SIGTERM, FULL, READ_ONLY, WAIT = "kill", "torn", "SIGTERM", "full", "read-only", "wait"
_TORN = 40  # bytes of a file after which a torn write ends
_PID, WAITS, _END = "\0pid ", "\0waits\n", b"\0end "
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1, "os.link": 2}


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status, or minus its signal; stdout and stderr; its writes; hosts it asked for."""

    status: int
    shown: str
    writes: int = 0
    hosts: tuple[str, ...] = ()


class _Watch:
    """Counts writes below ``root``, and lets the fault happen when there have been ``moment`` of them."""

    def __init__(self, root: str, fault: str, moment: int, sink: int) -> None:
        self.root, self.fault, self.moment, self.sink = root, fault, moment, sink
        self.writes, self.process, self.broken = 0, os.getpid(), False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if os.getpid() != self.process:  # a loader process
            return
        if event in ("socket.connect", "socket.getaddrinfo"):
            self._connects(event, arguments)
        elif event == "open" or event in _CHANGES:
            path = self._changed(event, arguments)
            if path and not self.broken:
                self.writes += 1
                if self.writes >= self.moment > 0:
                    self._happen(path)

    def _changed(self, event: str, arguments: tuple[Any, ...]) -> str:
        """The path below the root that an event changes; "" if none."""
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return ""
        for path in arguments[: _CHANGES.get(event, 1)]:
            name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
            if os.path.abspath(name).startswith(self.root):
                return name
        return ""

    def _happen(self, path: str) -> None:
        if self.fault == READ_ONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        self.broken = True
        if self.fault == KILL:
            os.kill(self.process, signal.SIGKILL)
        elif self.fault == SIGTERM:
            os.kill(self.process, signal.SIGTERM)
        elif self.fault in (FULL, TORN):
            if self.fault == TORN:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (_TORN, resource.RLIM_INFINITY))
        elif self.fault == WAIT:
            os.write(1, WAITS.encode())
            os.read(0, 1)

    def _connects(self, event: str, arguments: tuple[Any, ...]) -> None:
        address = arguments[1] if event == "socket.connect" else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        host = host.decode() if isinstance(host, bytes) else host
        if host is None or str(host).startswith(("/", "\0", "127.", "::1", "localhost", socket.gethostname())):
            return
        os.write(self.sink, json.dumps({"host": str(host)}).encode() + b"\n")
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


class _Serve(socketserver.StreamRequestHandler):
    """In a fork of the server: runs the command in another one and reports how it ended."""

    def handle(self) -> None:
        asked = json.loads(self.rfile.readline())
        source, sink = os.pipe()
        pid = os.fork()
        if not pid:
            self._command(asked, sink)
        os.close(sink)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with os.fdopen(source) as file:
            found = [json.loads(line) for line in file]
        writes = sum(item.get("writes", 0) for item in found)
        hosts = [item["host"] for item in found if "host" in item]
        self.wfile.write(_END + json.dumps([status, writes, hosts]).encode())

    def _command(self, asked: dict[str, Any], sink: int) -> None:
        self.wfile.write(f"{_PID}{os.getpid()}\n".encode())
        for number in (0, 1, 2):
            os.dup2(self.connection.fileno(), number)
        os.environ.update(asked["environment"])
        os.chdir(asked["root"])
        _pin(Path("debs/known.json"))
        watch = _Watch(asked["root"], asked["fault"], asked["moment"], sink)
        leave = os._exit

        def report(status: int) -> NoReturn:  # training leaves by itself
            os.write(sink, json.dumps({"writes": watch.writes}).encode() + b"\n")
            leave(status)

        os._exit = report  # type: ignore[assignment]
        try:
            from avsr.cli import main

            main(asked["arguments"])
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _pin(known: Path) -> None:
    """The small packages of the template are those that ``prepare debian-speech`` knows."""
    from avsr.tools.corpora.debian import packages

    if known.is_file():
        packages.SHA256.update(json.loads(known.read_text(encoding="utf-8")))


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    max_children = 8
    request_queue_size = 8

    def service_actions(self) -> None:
        super().service_actions()
        if select.select([sys.stdin], [], [], 0)[0]:  # closed: the tests are over
            raise SystemExit


class Commands:
    """Starts commands at the server."""

    def __init__(self, address: str) -> None:
        self._address = address

    def start(
        self,
        root: Path,
        arguments: Sequence[str],
        *,
        fault: str = "",
        moment: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> socket.socket:
        """A connection that gives what the command shows, and in the end how it ended."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(120)
        connection.connect(self._address)
        asked = {"root": str(root), "arguments": list(arguments), "fault": fault, "moment": moment}
        asked["environment"] = {"HOME": str(root / "home"), **(environment or {})}
        connection.sendall(json.dumps(asked).encode() + b"\n")
        return connection

    def run(self, root: Path, arguments: Sequence[str], **options: Any) -> Ended:
        with self.start(root, arguments, **options) as connection:
            return ended(connection)


def ended(connection: socket.socket, until: str = "") -> Ended:
    """Reads to the command's end, or until it has shown ``until``, which gives the status 0."""
    data = b""
    while part := connection.recv(65536):
        data += part
        if until and until.encode() in data:
            return Ended(0, data.decode())
    shown, _, end = data.partition(_END)
    status, writes, hosts = json.loads(end)
    return Ended(status, shown.decode(errors="backslashreplace"), writes, tuple(hosts))


def stop(started: Ended) -> None:
    """Kills a command of which ``ended`` has read the beginning."""
    os.kill(int(started.shown.partition(_PID)[2].partition("\n")[0]), signal.SIGKILL)


@contextmanager
def serving(folder: Path) -> Iterator[Commands]:
    address = str(folder / "commands")
    with subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout and server.stdin and b"ready\n" in server.stdout  # after what packages print
        try:
            yield Commands(address)
        finally:
            server.stdin.close()


def _serve(address: str) -> None:
    import deepspeed  # noqa: F401
    import torch

    import avsr.cli
    import avsr.evaluation.act_search
    import avsr.evaluation.run
    import avsr.tools.analyze
    import avsr.tools.average
    import avsr.tools.corpora.debian.corpus
    import avsr.tools.corpora.prepare.run
    import avsr.tools.corpora.synth.corpus
    import avsr.tools.estimate.planning
    import avsr.tools.estimate.profiling
    import avsr.tools.importing
    import avsr.tools.lipreader.pretrain
    import avsr.training.run  # noqa: F401

    torch.set_num_threads(1)

    with _Server(address, _Serve) as server:
        print("ready", flush=True)
        server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    _serve(sys.argv[1])
