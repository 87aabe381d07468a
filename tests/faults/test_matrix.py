"""The fault matrix: every command against kill -9, SIGTERM, a full disk, a read-only file system, two at once, damaged
input, a damaged cache, ranks that are missing, and no network.

After a fault the same command, repeated, gives what it gives without the fault; a result that was there before stays
until the new one is whole; and what a user can see is one line. Whoever adds a command adds its row to commands.py.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from _pytest.mark import ParameterSet
from commands import COMMANDS, NOTHING, Result
from process import FULL, KILL, READ_ONLY, SIGTERM, TORN, WAIT, WAITS, Commands, Ended, ended, stop

from avsr.cli import _COMMANDS
from avsr.errors import EXIT_PREEMPTED, EXIT_USER

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
Known = dict[str, tuple[Ended, Result]]  # by command, in an undisturbed folder
MOMENTS, FEW = 6, 3  # of a command's writes, in the slow tests
LONG = {"train", "profile", "analyze", "synth"}  # commands of which there are few
LEFT_OVER = ("*.part", ".lock", ".*.lock", "*.unfinished", "*.old")


class Room:
    """One test's copies of the template, and what commands make in an undisturbed one."""

    def __init__(self, template: Path, commands: Commands, folder: Path, known: Known) -> None:
        self._template, self._folder, self._known, self._count = template, folder, known, 0
        self.commands = commands

    def root(self) -> Path:
        self._count += 1
        return Path(shutil.copytree(self._template, self._folder / str(self._count)))

    def undisturbed(self, name: str) -> tuple[Ended, Result]:
        if name not in self._known:
            root, row = self.root(), COMMANDS[name]
            found = self.commands.run(root, row.arguments)
            assert found.status == 0, found.shown
            self._known[name] = found, row.result(root)
            shutil.rmtree(root)
        return self._known[name]

    def moment(self, name: str, share: float) -> int:
        """A share of the command's writes."""
        return max(1, round(share * self.undisturbed(name)[0].writes))

    def repeated(self, root: Path, name: str) -> None:
        """The command gives in ``root`` what it gives undisturbed, and leaves nothing but its result."""
        row = COMMANDS[name]
        found = [self.commands.run(root, row.arguments)]
        if found[0].status and row.again:
            found.append(self.commands.run(root, row.again))
        finished = bool(row.refuses) and row.refuses in found[-1].shown
        assert found[-1].status == 0 or finished, [item.shown for item in found]
        assert row.result(root) == self.undisturbed(name)[1]
        left = [path for pattern in LEFT_OVER for path in (root / row.output).rglob(pattern)]
        assert not left


@pytest.fixture(scope="module")
def known() -> Known:
    return {}


@pytest.fixture
def room(template: Path, commands: Commands, tmp_path: Path, known: Known) -> Iterator[Room]:
    yield Room(template, commands, tmp_path, known)
    shutil.rmtree(tmp_path, ignore_errors=True)


def one_line(found: Ended, *, status: int = EXIT_USER) -> str:
    """The message of a command that was refused or stopped."""
    assert found.status == status, found.shown
    assert "Traceback" not in found.shown, found.shown
    last = found.shown.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("avsr: "), found.shown
    return last


def killed(room: Room, name: str, share: float, before: bool = False) -> None:
    for fault in (KILL, TORN):
        root = _start(room, name, before)
        moment = room.moment(name, share)
        found = room.commands.run(root, COMMANDS[name].arguments, fault=fault, moment=moment)
        # nothing long may be written after this moment, which some runs do not reach: a second one removes other files
        assert found.status < 0 or fault == TORN or found.writes < moment, found.shown
        _kept(room, root, name, before)
        room.repeated(root, name)


def told_to_end(room: Room, name: str, share: float, before: bool = False) -> None:
    root = _start(room, name, before)
    found = room.commands.run(root, COMMANDS[name].arguments, fault=SIGTERM, moment=room.moment(name, share))
    if found.status != 0:  # the signal may come when all is done
        one_line(found, status=EXIT_PREEMPTED)
    assert not [path for pattern in (".lock", ".*.lock") for path in (root / COMMANDS[name].output).rglob(pattern)]
    _kept(room, root, name, before)
    room.repeated(root, name)


def full_disk(room: Room, name: str, share: float, before: bool = False) -> None:
    _no_room(room, name, FULL, room.moment(name, share), before)


def read_only(room: Room, name: str, share: float, before: bool = False) -> None:
    """From the start: nothing is done in vain."""
    _no_room(room, name, READ_ONLY, 1, before)


def _no_room(room: Room, name: str, fault: str, moment: int, before: bool) -> None:
    root = _start(room, name, before)
    found = room.commands.run(root, COMMANDS[name].arguments, fault=fault, moment=moment)
    if found.status or fault == READ_ONLY:
        one_line(found)
    else:  # only a log could not be written
        assert "Traceback" not in found.shown
    _kept(room, root, name, before)
    room.repeated(root, name)


def _start(room: Room, name: str, before: bool) -> Path:
    root = room.root()
    if before:
        assert room.commands.run(root, COMMANDS[name].arguments).status == 0
    return root


def _kept(room: Room, root: Path, name: str, before: bool) -> None:
    if before:
        assert COMMANDS[name].result(root) == room.undisturbed(name)[1]


def two_at_once(room: Room, name: str, share: float) -> None:
    root, row = room.root(), COMMANDS[name]
    with room.commands.start(root, row.arguments, fault=WAIT, moment=room.moment(name, share)) as first:
        ended(first, WAITS)
        assert "is in use by process" in one_line(room.commands.run(root, row.arguments))
        first.sendall(b"g")
        assert ended(first).status == 0
    assert row.result(root) == room.undisturbed(name)[1]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "garbage": lambda data: np.random.default_rng(len(data)).bytes(len(data)),
}


def damaged_input(room: Room, name: str, share: float) -> None:
    for file in COMMANDS[name].inputs[-1:]:
        _damaged(room, name, file, "half")


def _damaged(room: Room, name: str, file: str, damage: str) -> None:
    root, row = room.root(), COMMANDS[name]
    content = DAMAGES[damage]((root / file).read_bytes())
    (root / file).unlink() if content is None else (root / file).write_bytes(content)
    found = room.commands.run(root, row.arguments)
    if found.status == 0 and file in row.spared:
        assert "Traceback" not in found.shown
        return
    message = one_line(found)
    folder, _, base = file.rpartition("/")
    assert base in found.shown or folder in message, message


def damaged_cache(room: Room, name: str, share: float) -> None:
    root, row = room.root(), COMMANDS[name]
    assert room.commands.run(root, row.arguments).status == 0
    files = sorted(path for path in (root / row.cache).rglob("*") if path.is_file())
    assert files
    for index, path in enumerate(files):
        data = path.read_bytes()
        path.write_bytes((data[: len(data) // 2], bytes(len(data)), b"")[index % 3])
    if not row.replaces:
        shutil.rmtree(root / row.output)
    found = room.commands.run(root, row.arguments)
    assert found.status == 0, found.shown
    assert row.result(root) == room.undisturbed(name)[1] and "damaged" in found.shown


def missing_rank(room: Room, name: str, share: float) -> None:
    """Variables that a launcher has left in the shell."""
    root, row = room.root(), COMMANDS[name]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    options = {"environment": {**variables, "MASTER_PORT": str(port)}}
    if row.ranks:
        with room.commands.start(root, row.arguments, **options) as waiting:
            stop(ended(waiting, f"waiting for 2 ranks at 127.0.0.1:{port}"))
        return
    assert room.commands.run(root, row.arguments, **options).status == 0
    assert row.result(root) == room.undisturbed(name)[1]


def no_network(room: Room, name: str, share: float) -> None:
    """With files of this machine alone no command asks for a host."""
    assert room.undisturbed(name)[0].hosts == ()


FAULTS = {
    "kill -9": killed,
    "SIGTERM": told_to_end,
    "full disk": full_disk,
    "read-only": read_only,
    "two at once": two_at_once,
    "damaged input": damaged_input,
    "damaged cache": damaged_cache,
    "missing rank": missing_rank,
    "no network": no_network,
}
# Commands all of whose cells are in the minute of make test, and cells of others
QUICK = {"plan", "average", "import", "doctor", "prepare", "prepare debian-speech"}
QUICK_CELLS = {
    ("pretrain", "kill -9"),
    ("evaluate", "SIGTERM"),
    ("evaluate", "damaged cache"),
    ("transcribe", "full disk"),
    ("transcribe", "two at once"),
    ("act-search", "read-only"),
}


def _cell(command: str, fault: str) -> ParameterSet:
    quick = command in QUICK or (command, fault) in QUICK_CELLS or fault in COMMANDS[command].cannot
    return pytest.param(command, fault, marks=() if quick else pytest.mark.slow, id=f"{command}: {fault}")


def test_every_command_has_a_row() -> None:
    assert {name.partition(" ")[0] for name in COMMANDS} == _COMMANDS.keys()
    assert all(row.cannot.keys() <= FAULTS.keys() for row in COMMANDS.values())


@pytest.mark.parametrize(("command", "fault"), [_cell(name, fault) for name in COMMANDS for fault in FAULTS])
def test_cell(room: Room, command: str, fault: str) -> None:
    row = COMMANDS[command]
    if fault not in row.cannot:
        FAULTS[fault](room, command, 0.6)
    elif row.cannot[fault] == NOTHING:
        assert room.undisturbed(command)[0].writes == 0


MOMENTARY = ("kill -9", "SIGTERM", "full disk", "read-only")


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("fault", MOMENTARY)
@pytest.mark.parametrize("command", [name for name, row in COMMANDS.items() if "kill -9" not in row.cannot])
def test_every_moment(room: Room, command: str, fault: str, before: bool) -> None:
    """``again``: where there is a result already, which stays until the new one is whole."""
    if before and not COMMANDS[command].replaces:
        return
    last = (FEW if command in LONG else MOMENTS) - 1
    shares = [0.0] if fault == "read-only" else [index / last for index in range(last + 1)]
    for share in shares:
        FAULTS[fault](room, command, share, before)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("command", "file"), [(name, file) for name, row in COMMANDS.items() for file in row.inputs])
def test_every_damage(room: Room, command: str, file: str, damage: str) -> None:
    _damaged(room, command, file, damage)
