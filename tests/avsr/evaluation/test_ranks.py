"""Many ranks write what one process writes, also when they go on after others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from avsr.config import read_run_config
from avsr.errors import EXIT_PREEMPTED, UserError
from avsr.evaluation import decode
from avsr.evaluation.ranks import merged, open_rows
from avsr.evaluation.results import HYPOTHESES, made_by, row_key
from avsr.evaluation.run import evaluate
from avsr.runtime.rows import Rows

LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
SETTINGS = ["decode.batch=1", "decode.beams=2", "decode.nbest=2"]
UNFINISHED = [f"{HYPOTHESES}.unfinished", f"{HYPOTHESES}.rank1.unfinished"]


def several(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.distributed(pytest.mark.integration(pytest.mark.timeout(600)(test)))


def files(folder: Path) -> dict[str, bytes]:
    """Without what differs between two evaluations of the same."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".yaml"}
    return {name: re.sub(rb'"rtfx": [\d.e+-]+', b'"rtfx": 0', content) for name, content in found.items()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the utterances that this process decodes from now on."""
    ids: list[str] = []
    real = decode.transcribe_batch

    def counted(model: Any, batch: Any, config: Any) -> Any:
        ids.extend(utterance.id for utterance in batch.utterances)
        return real(model, batch, config)

    monkeypatch.setattr(decode, "transcribe_batch", counted)
    return ids


RANK = """
    import os, sys, time
    from avsr import evaluate
    from avsr.errors import UserError
    from avsr.evaluation import decode

    kind, rank = sys.argv.pop(1), int(os.environ["RANK"])
    real, calls = decode.transcribe_batch, []

    def transcribe_batch(*arguments):
        if kind == "stop" and len(calls) == 1 + rank:
            time.sleep(600)
        if kind == "fail" and rank == 1:
            raise UserError("no such thing")
        if kind == "fail":
            time.sleep(0.2)
        calls.append(1)
        return real(*arguments)

    decode.transcribe_batch = transcribe_batch
    evaluate.main()
"""


def environment() -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found['PATH']}"
    return {**found, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """``start("stop", RUN, "key=value")``: two ranks without a launcher; what happens to them is up to the kind."""
    started: list[subprocess.Popen[str]] = []

    def run(kind: str, *arguments: object) -> list[subprocess.Popen[str]]:
        script = tmp_path / "rank.py"
        script.write_text(textwrap.dedent(RANK))
        where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        command = [sys.executable, str(script), kind, *map(str, arguments)]
        for rank in range(2):
            own = {**environment(), **where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=own, stdout=-1, stderr=-1, text=True))
        return started

    yield run
    for process in started:
        process.kill()
        process.communicate()


@several
def test_two_under_the_launcher_write_what_one_process_writes(run_folder: Path, tmp_path: Path) -> None:
    """Also after another process that has decoded a part."""
    evaluate(run_folder, SETTINGS, out=tmp_path / "one")
    whole, out = files(tmp_path / "one"), tmp_path / "two"
    out.mkdir()
    made = made_by(run_folder, read_run_config(run_folder, SETTINGS))
    first = json.loads(whole[HYPOTHESES].splitlines()[0])
    first |= {"hypothesis": "as it was", "took": 1.0, "warm": True, "cached": []}
    Rows(out / f"{HYPOTHESES}.rank5.unfinished", row_key, made).add(first)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port"]
    where = [*launcher, str(20000 + os.getpid() % 20000), "--module", "avsr.evaluate", str(run_folder)]
    command = [*where, *SETTINGS[:2], "--out", str(out), SETTINGS[2]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("sentences: WER") == 1 and "waiting for 2 ranks at 127.0.0.1:" in done.stderr
    assert "1 utterances are decoded already" in done.stderr
    found = files(out)
    assert found.keys() == whole.keys()
    rows = [[json.loads(line) for line in part[HYPOTHESES].splitlines()] for part in (found, whole)]
    assert rows[0][1:] == rows[1][1:] and rows[0][0]["hypothesis"] == "as it was"
    assert json.loads(found["metrics.json"])["unseen_voices"] == json.loads(whole["metrics.json"])["unseen_voices"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@several
def test_two_that_are_stopped_leave_their_rows_to_one(
    run_folder: Path, decoded: list[str], start: Callable[..., Any], tmp_path: Path, number: signal.Signals
) -> None:
    """Rank 0 has decoded one utterance, rank 1 two."""
    evaluate(run_folder, SETTINGS, out=tmp_path / "one")
    out, until = tmp_path / "two", time.monotonic() + 200
    ranks = start("stop", run_folder, *SETTINGS, "--out", out)
    while [(out / name).is_file() and len((out / name).read_bytes().splitlines()) for name in UNFINISHED] != [2, 3]:
        assert time.monotonic() < until and all(process.poll() is None for process in ranks)
        time.sleep(0.1)
    for process in ranks:
        process.send_signal(number)
    ended = [process.wait(60) for process in ranks]
    assert ended == [EXIT_PREEMPTED if number == signal.SIGTERM else -signal.SIGKILL] * 2
    assert not (out / "metrics.json").exists()
    decoded.clear()
    evaluate(run_folder, SETTINGS, out=out)
    assert len(decoded) == 7 - 3 and files(out) == files(tmp_path / "one")


@pytest.mark.slow
@several
def test_two_end_together_when_one_fails(run_folder: Path, start: Callable[..., Any], tmp_path: Path) -> None:
    ranks = start("fail", run_folder, "decode.batch=1", "--out", tmp_path / "out")
    said = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert said[1].endswith("avsr: no such thing\n") and "rank 1: no such thing" in said[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == UNFINISHED[:1]


@pytest.mark.slow
@several
def test_a_refusal_of_rank_0_is_one_of_all(run_folder: Path, start: Callable[..., Any]) -> None:
    """Rank 1 does not wait for what rank 0 alone looks at."""
    (run_folder / "metrics.json").write_text("{}")
    ranks = start("none", run_folder, "--out", run_folder)
    said = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert all("does not say what made it and would be replaced" in text for text in said)


# The rows of ranks


def row(name: str, hypothesis: str = "x") -> dict[str, str]:
    return {"set": "a", "id": name, "hypothesis": hypothesis}


def keyed(*rows: dict[str, str]) -> dict[Any, Any]:
    return {row_key(row): row for row in rows}


def test_rows_of_ranks_that_did_not_see_the_same_are_refused() -> None:
    wanted = [("a", "u0"), ("a", "u1")]
    old = keyed(row("u0"), row("of old"))  # rank 0 has rows of a clip that cannot be used any more
    assert merged(wanted, [old, keyed(row("u1"))]) == old | keyed(row("u1"))
    for parts, problem in (
        ([keyed(row("u0"))], "no rank has decoded"),
        ([keyed(row("u0"), row("u1")), keyed(row("u1"))], "rank 1 has decoded .*'u1'.* so has a rank before it"),
        ([keyed(row("u0")), keyed(row("u1"), row("\x1b"))], r"rank 1 has decoded .*x1b.* rank 0 does not know"),
    ):
        with pytest.raises(UserError, match=rf"{problem}.*repeat the command"):
            merged(wanted, parts)


def test_what_any_number_of_ranks_left_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, path = {"checkpoint": "best"}, tmp_path / UNFINISHED[0]
    Rows(path, row_key, made).add(row("u0"))
    left = Rows(tmp_path / UNFINISHED[1], row_key, made)
    for found in (row("u0", "later"), row("u1")):  # the first as if a stop had come between taking and deleting it
        left.add(found)
    Rows(tmp_path / f"{HYPOTHESES}.rank12.unfinished", row_key, made).add(row("u12"))
    Rows(tmp_path / f"{HYPOTHESES}.rank2.unfinished", row_key, {"checkpoint": "last"}).add(row("u2"))
    kept, done = open_rows(path, made)
    assert kept.held == keyed(row("u0"), row("u1"), row("u12")) and set(done) == kept.held.keys()
    assert "rank2.unfinished was begun with other settings" in caplog.text
    assert list(tmp_path.iterdir()) == [path] and Rows(path, row_key, made).held == kept.held
    left.add(row("u1"))
    kept, done = open_rows(path, None)
    assert not done and not kept.held and not list(tmp_path.iterdir())
