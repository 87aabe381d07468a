"""One writer per folder: a second one is refused, and takes over from one that has ended."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from avsr.config import load_config
from avsr.errors import EXIT_PREEMPTED, EXIT_USER, UserError
from avsr.evaluation.run import evaluate
from avsr.runtime import locks
from avsr.runtime.folders import PROBE, part_of
from avsr.runtime.locks import LOCK, Holder, claim, hold
from avsr.training.metrics import read_metrics
from avsr.training.resume import prepare_run
from avsr.training.run import train

pytestmark = pytest.mark.integration

ELSEWHERE = Holder("else where@1", 1, 4711, 1, 1_700_000_000, "token")


def plant(folder: Path, holder: Holder, silent: float = 0.0) -> Path:
    """A lock of ``holder``, who last gave a sign of life ``silent`` seconds ago."""
    file = folder / LOCK / holder.name
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (time.time() - silent,) * 2)
    return file


def test_a_second_writer_is_refused_in_one_line_and_comes_in_after_the_first(tmp_path: Path) -> None:
    with hold(tmp_path):
        with (
            pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since \d{{4}}-[^\n]*$"),
            hold(tmp_path),
        ):
            pass
        assert len(list((tmp_path / LOCK).iterdir())) == 1
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError
    with hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_outputs_of_one_folder_have_an_owner_each(tmp_path: Path) -> None:
    """And a folder that was made for a refused work does not stay."""
    with (
        hold(tmp_path),
        hold(tmp_path, "metrics.json"),
        hold(tmp_path, "analysis.json"),
        pytest.raises(UserError, match=rf"{tmp_path}/metrics\.json is in use by process {os.getpid()}"),
        hold(tmp_path, "metrics.json"),
    ):
        pass
    with pytest.raises(KeyError), claim(tmp_path / "new"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_file_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot write to /proc/avsr: "), claim(Path("/proc/avsr")):
        pass
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # a disk that has room for the lock alone
    resource.setrlimit(resource.RLIMIT_FSIZE, (PROBE // 2, before[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write to {tmp_path}: File too large"), claim(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_sigterm_leaves_no_lock(tmp_path: Path) -> None:
    code = textwrap.dedent(RACE).replace("hold", "claim")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=-1, stderr=-1, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("go\n")
    process.stdin.flush()
    assert [process.stdout.readline(), process.stdout.readline()] == ["ready\n", "in\n"]
    process.terminate()
    assert process.wait(20) == EXIT_PREEMPTED
    assert process.stderr.read() == "avsr: stopped by SIGTERM; what is done is kept, the same command continues\n"
    assert not list(tmp_path.iterdir())


OWNED = {
    "evaluate": (["evaluate", "{run}"], "{run}", "metrics.json"),
    "evaluate --out": (["evaluate", "{run}", "--out", "{root}/new"], "{root}/new", "metrics.json"),
    "transcribe --out": (["transcribe", "{run}", "a.wav", "--out", "{root}/new"], "{root}/new", "transcripts.jsonl"),
    "act-search": (["act-search", "{run}"], "{run}", "act_heads.json"),
    "analyze": (["analyze", "{run}"], "{run}", "analysis.json"),
    "import": (["import", "x.pth", "--config", "asr_16", "--out", "{root}/new"], "{root}", "new"),
    "synth": (["synth", "{root}/new"], "{root}/new", ""),
    "prepare": (["prepare", "muavic", "{root}", "{root}/new"], "{root}/new", ""),
    "pretrain": (["pretrain", "demo_visual", "run={root}/new"], "{root}/new", ""),
    "average": (["average", "{run}"], "{run}/checkpoints", "average"),
    "profile": (["profile", "{run}/config.yaml"], "{root}", "run-profile"),
}


@pytest.mark.parametrize("command", OWNED)
def test_every_command_that_writes_respects_the_owner(
    command: str, run_folder: Path, refuse: Callable[..., str], tmp_path: Path
) -> None:
    """And a training of the same run disturbs none that does not write the run's folder whole."""
    if command == "average":
        for step in (1, 2):
            shutil.copytree(run_folder / "checkpoints" / "last", run_folder / "checkpoints" / f"step-{step:06d}")
    arguments, folder, name = OWNED[command]
    places = {"run": str(run_folder), "root": str(tmp_path)}
    output = Path(folder.format(**places))
    with hold(run_folder), hold(output, name):
        message = refuse(*(argument.format(**places) for argument in arguments))
    assert f"{output / name} is in use by process {os.getpid()}" in message


def test_a_training_that_goes_on_leaves_the_parts_of_other_commands(run_folder: Path) -> None:
    """An evaluation or an average of the run may be writing them; its own were left by a killed one."""
    last = run_folder / "checkpoints" / "last"
    shutil.rmtree(run_folder / "checkpoints" / "best")
    shutil.rmtree(last)
    theirs = [run_folder / "metrics.json.x-1.part", run_folder / ".metrics.json.lock.x-1.part"]
    theirs += [last.with_name("average.x-1.part"), last.with_name(".average.lock.x-1.part")]
    own = [run_folder / "config.yaml.x-1.part", run_folder / "metrics.jsonl.x-1.part", run_folder / "frames.json.part"]
    own += [last.with_name("last.x-1.part"), last.with_name("step-000002.x-1.part")]
    for path in (*theirs, *own):
        path.mkdir()
    prepare_run(load_config(str(run_folder / "config.yaml"), ["resume=true"]), 1)
    assert all(path.exists() for path in theirs) and not any(path.exists() for path in own)


def test_names_say_what_they_were_made_of() -> None:
    for holder in (ELSEWHERE, replace(ELSEWHERE, host="ü/%@"), Holder.own()):
        assert Holder.parse(Path(holder.name)) == holder and "/" not in holder.name
    with pytest.raises(UserError, match=r"run/\.lock/x does not belong there: delete run/\.lock"):
        Holder.parse(Path("run") / LOCK / "x")


@pytest.mark.parametrize("kind", ["dead", "number used again", "zombie"])
def test_a_dead_process_of_this_host_is_followed_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = locks.process_start(process.pid)
    assert born
    process.kill()
    while kind == "zombie" and locks.process_start(process.pid):
        time.sleep(0.01)  # it stays one until it is waited for
    if kind == "dead":
        process.wait()
    pid = os.getpid() if kind == "number used again" else process.pid
    plant(tmp_path, replace(Holder.own(), pid=pid, born=born - (kind == "number used again")))
    with caplog.at_level(logging.WARNING), hold(tmp_path):
        assert Holder.parse(next((tmp_path / LOCK).iterdir())).pid == os.getpid()
    assert re.search(rf"was in use by process {pid} on .* which has ended", caplog.text)
    process.wait()


def test_a_process_of_another_host_is_followed_when_it_is_silent_for_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant(tmp_path, ELSEWHERE, locks.STALE + 5)
    began = time.monotonic()
    with hold(tmp_path):
        pass
    assert time.monotonic() - began < 1 and "gave no sign of life for 305 s" in caplog.text


def test_one_that_may_be_gone_is_waited_for_and_refused_as_soon_as_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the file system's own clock: this process's runs years ahead."""
    monkeypatch.setattr(time, "time", lambda: 4e9)
    file = plant(tmp_path, ELSEWHERE)
    os.utime(file)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            os.utime(file)

    monkeypatch.setattr(locks.time, "sleep", sleep)
    with pytest.raises(UserError, match=r"process 4711 on else where@1 since 2023-"), hold(tmp_path):
        pass
    assert len(naps) == 3 and file.is_file() and len(list(tmp_path.iterdir())) == 1


def test_one_that_stays_silent_is_followed_after_the_rest_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "STALE", 1.5)
    plant(tmp_path, ELSEWHERE, 0.5)
    began = time.monotonic()
    with hold(tmp_path):
        assert 0.8 < time.monotonic() - began < 10


RACE = """
    import sys, time
    from pathlib import Path
    from avsr.errors import UserError
    from avsr.runtime.locks import hold

    sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
    try:
        with hold(Path(sys.argv[1])):
            print("in", flush=True)
            sys.stdin.readline()
    except UserError as error:
        print(error, flush=True)
"""


def test_of_several_that_take_over_at_once_one_gets_in(tmp_path: Path) -> None:
    starts = [[sys.executable, "-c", textwrap.dedent(RACE), str(tmp_path / "run")]] * 6
    racers = [subprocess.Popen(s, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for s in starts]
    pipes = [(racer.stdin, racer.stdout) for racer in racers]
    try:
        assert [out.readline() for _, out in pipes if out] == ["ready\n"] * 6
        plant(tmp_path / "run", replace(Holder.own(), born=1))
        for write, _ in pipes:
            assert write is not None
            write.write("go\n")
            write.flush()
        said = [out.readline() for _, out in pipes if out]
        (winner,) = [racer.pid for racer, line in zip(racers, said, strict=True) if line == "in\n"]
        assert all(f"in use by process {winner} on" in line for line in said if line != "in\n")
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()


def test_who_loses_its_lock_ends(tmp_path: Path) -> None:
    code = "from avsr.runtime import locks; locks.BEAT = 0.1" + textwrap.dedent(RACE)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=-1, stderr=-1, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("go\n")
    process.stdin.flush()
    assert [process.stdout.readline(), process.stdout.readline()] == ["ready\n", "in\n"]
    (file,) = (tmp_path / LOCK).iterdir()
    first = file.stat().st_mtime_ns
    while file.stat().st_mtime_ns == first:  # it beats
        time.sleep(0.02)
    file.rename(file.with_name(ELSEWHERE.name))
    assert process.wait(20) == EXIT_USER and "it ends, so that no two write there" in process.stderr.read()
    assert [path.name for path in (tmp_path / LOCK).iterdir()] == [ELSEWHERE.name]


def test_parts_belong_to_one_process_of_one_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {part_of(tmp_path / "x")}
    monkeypatch.setattr(os, "getpid", lambda: 1)
    paths.add(part_of(tmp_path / "x"))
    monkeypatch.setattr(locks.platform, "node", lambda: "other")
    paths.add(part_of(tmp_path / "x"))
    assert len(paths) == 3 and {path.suffix for path in paths} == {".part"}


SLOW = """
    import sys, time
    from avsr.cli import main
    from avsr.training.trainer import Trainer

    real = Trainer.step

    def step(self, batches):
        while self.progress.step == 3 and not (self.config.run and sys.stdin.readline()):
            time.sleep(0.1)
        return real(self, batches)

    Trainer.step = step
    main(["train", *sys.argv[1:]])
"""


def test_a_run_is_trained_once_at_a_time_and_evaluated_meanwhile(
    tiny_recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Then killed, and continued at once."""
    recipe, run = str(tiny_recipe(tmp_path, **{"training.validate_every": 1})), tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SLOW), recipe], stdin=subprocess.PIPE, stderr=-1)
    try:
        while not (run / "checkpoints" / "previous").is_dir():  # it waits in step 3
            assert first.poll() is None
            time.sleep(0.1)
        with pytest.raises(UserError, match=rf"run is in use by process {first.pid} on"):
            train(load_config(recipe, ["resume=true"]))
        assert evaluate(str(run), [], "last").keys() == {"sentences", "unseen_voices"}
    finally:
        first.kill()
        first.wait()
    assert (run / LOCK).is_dir()
    train(load_config(recipe, ["resume=true"]))
    assert f"process {first.pid} on" in caplog.text and "takes over" in caplog.text
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4] and not (run / LOCK).exists()
