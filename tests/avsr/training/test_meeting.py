"""Before the first step: who waits for whom is said, ends in time, and nobody is left behind."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from avsr.errors import UserError
from avsr.training.meeting import Place, read_place

pytestmark = pytest.mark.integration

Recipe = Callable[..., Path]
SET = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}


def test_the_place_is_that_of_the_launcher(caplog: pytest.LogCaptureFixture) -> None:
    assert read_place(SET) == Place(1, 4, 1, "first", 29500) and Place(1, 4, 1, "first", 29500).address == "first:29500"
    assert read_place({}) == Place() == read_place({"RANK": "0", "WORLD_SIZE": "1"})
    assert read_place({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}).local == 2
    assert not caplog.text
    assert read_place({"WORLD_SIZE": "4"}) == Place()
    assert "WORLD_SIZE=4 is set but RANK is not: this process trains alone" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"WORLD_SIZE": None, "LOCAL_RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None},
            "RANK=1 .* not WORLD_SIZE",
        ),
        ({"MASTER_PORT": None}, "RANK=1 is set in the environment, but not MASTER_PORT: start .* deepspeed"),
        ({"LOCAL_RANK": ""}, "RANK=1 is set in the environment, but not LOCAL_RANK"),
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4: expected a rank below"),
        ({"RANK": "-1"}, "RANK=-1 and WORLD_SIZE=4"),
        ({"RANK": "x"}, "RANK='x' in the environment is no number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment is no number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected a port"),
    ],
)
def test_an_environment_that_makes_no_sense(changes: dict[str, str | None], message: str) -> None:
    given = {name: value for name, value in {**SET, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        read_place(given)
    if "expected a port" not in message:
        assert "unset them: env -u RANK -u WORLD_SIZE" in str(caught.value)


MEETING = """
    import os, sys
    from avsr.errors import guarded
    from avsr.training import meeting

    meeting.NOTICE, meeting.ATTEMPT = 1.2, 1.0
    meeting.POLL = float(os.environ["RANK"]) or 0.1  # the others look seldom: rank 0 has to wait for them
    with guarded():
        store = meeting.meet(meeting.read_place(os.environ), float(sys.argv[1]))
        store.add("done", 1)
        while store.add("done", 0) < int(os.environ["WORLD_SIZE"]):
            pass
        print("met")
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start(port: int) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start(rank, ranks)``: a process that meets the others."""
    begun: list[subprocess.Popen[str]] = []

    def begin(rank: int, ranks: int, patience: float = 4.0) -> subprocess.Popen[str]:
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", textwrap.dedent(MEETING), str(patience)]
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        begun.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()


def last(process: subprocess.Popen[str]) -> str:
    """The message with which a process ends."""
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    return err.splitlines()[-1]


def test_ranks_meet_in_any_order(start: Callable[..., subprocess.Popen[str]], port: int) -> None:
    second = start(1, 2, 30.0)
    time.sleep(2.5)
    first = start(0, 2, 30.0)
    assert [process.communicate(timeout=60)[0] for process in (first, second)] == ["met\n", "met\n"]
    with socket.socket() as probe:  # and leave nothing
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_ranks_that_never_come_are_named_and_all_that_came_leave_with_one_message(
    start: Callable[..., subprocess.Popen[str]], port: int
) -> None:
    processes = [start(0, 4, 6.0), start(2, 4, 6.0)]
    ends = {last(process) for process in processes}
    (message,) = ends
    where = rf"127\.0\.0\.1:{port}: waiting for 2 ranks \(1, 3\)"
    assert re.match(rf"avsr: rank [02] of 4 at {where} for too long \(training\.timeout\); if .* env -u RANK", message)


def test_what_a_rank_waits_for_is_said_at_once_and_again(
    start: Callable[..., subprocess.Popen[str]], port: int
) -> None:
    process = start(0, 4, 4.0)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.startswith(("waiting", "rank"))]
    assert lines[0] == f"waiting for 4 ranks at 127.0.0.1:{port}"
    assert lines[1] == f"rank 0 of 4 at 127.0.0.1:{port}: waiting for 3 ranks (1, 2, 3)" and len(lines) > 2


def test_no_rank_0(start: Callable[..., subprocess.Popen[str]], port: int) -> None:
    process = start(1, 2, 3.0)
    assert f"rank 1 of 2 found no rank 0 at 127.0.0.1:{port}" in last(process)


def test_a_port_in_use(start: Callable[..., subprocess.Popen[str]], port: int) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        message = last(start(0, 2))
    assert f"MASTER_PORT={port} cannot be used on this host" in message and "--master_port" in message


def test_ranks_of_other_sizes(start: Callable[..., subprocess.Popen[str]]) -> None:
    first, other = start(0, 3, 20.0), start(1, 4, 20.0)
    message = last(other)
    assert "WORLD_SIZE=4 on rank 1, but 3 on rank 0" in message and last(first) == message


def test_a_rank_twice_does_not_disturb_the_others(start: Callable[..., subprocess.Popen[str]]) -> None:
    first, second = start(0, 3, 30.0), start(1, 3, 30.0)
    time.sleep(4)
    assert "another process has RANK=1" in last(start(1, 3, 30.0))
    third = start(2, 3, 30.0)
    assert [process.communicate(timeout=60)[0] for process in (first, second, third)] == ["met\n"] * 3


FAILING = """
    import os, sys, time
    import avsr.training.run as run
    from avsr.errors import UserError

    kind, where = sys.argv.pop(1).split()
    if os.environ["RANK"] == where:
        def fail(*arguments, **options):
            if kind == "kill":
                os.kill(os.getpid(), 9)
            raise {"user": UserError, "code": RuntimeError}[kind]("no such file here")
        run.build_model = fail
    run.main()
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "where", "statuses", "message"),
    [
        pytest.param("user", 1, [2, 2], "avsr: rank 1: no such file here", marks=pytest.mark.slow),
        pytest.param("user", 0, [2, 2], "avsr: rank 0: no such file here", marks=pytest.mark.slow),
        ("code", 1, [1, 1], "avsr: rank 1 failed: RuntimeError: no such file here"),
        (
            "kill",
            1,
            [2, -9],
            "avsr: rank 0 lost its connection to another rank, which has ended: its messages, or its ",
        ),
    ],
)
def test_a_rank_that_fails_alone_ends_the_others_at_once(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    port: int,
    kind: str,
    where: int,
    statuses: list[int],
    message: str,
) -> None:
    """The others wait for it in a collective."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(FAILING), f"{kind} {where}", str(tiny_recipe(tmp_path))]
    command += ["training.timeout=0"]
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=-1,
            stderr=-1,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == statuses, said
    assert f"\n{message}" in f"\n{said[1 - where]}" and time.monotonic() - began < 90, said
    assert not (tmp_path / "run" / ".lock").exists()
    assert f"waiting for 2 ranks at 127.0.0.1:{port}" in said[0]
