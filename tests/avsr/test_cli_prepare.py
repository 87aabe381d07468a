"""``avsr prepare`` on the command line: what it prints, its exit status, and what it says of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.cli import main
from avsr.data.manifest import read_manifest
from avsr.data.video import encode_video

Refuse = Callable[..., str]


@pytest.fixture
def videos(tmp_path: Path, draw_face: Callable[..., Any]) -> Path:
    """A folder with two transcribed videos of one second; the landmarks are next to it."""
    frames, points = draw_face(np.zeros(25), 28, 75, 50)
    tone = 0.3 * np.sin(np.arange(25 * 640) / 9)
    for folder in ("in", "landmarks"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.mp4").write_bytes(encode_video(frames, sound=tone))
        (tmp_path / f"in/{name}.txt").write_text(f"text of {name}")
        np.save(tmp_path / f"landmarks/{name}.npy", points)
    return tmp_path / "in"


def start(videos: Path, *options: str, out: str = "out") -> list[str]:
    beside = videos.parent
    return ["prepare", "videos", str(videos), str(beside / out), f"landmarks={beside / 'landmarks'}", "workers=1",
            *options]  # fmt: skip


def test_success_prints_the_counts(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(start(videos))
    assert capsys.readouterr().out == "      2  all.jsonl\n"
    rows = read_manifest(videos.parent / "out/all.jsonl")
    assert [row.text for row in rows] == ["text of a", "text of b"]


def test_refusals_are_counted_and_their_file_is_named(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (videos / "b.mp4").write_bytes(b"no video")
    (videos / "c.mp4").write_bytes(b"")
    main(start(videos))  # status 0: there is a corpus
    found = videos.parent / "out/refused.jsonl"
    counts = "      1  all.jsonl\n      2  refused: video\n"
    assert capsys.readouterr().out == f"{counts}the reasons are in {found}\n"
    assert [json.loads(line)["id"] for line in found.read_text().splitlines()] == ["b", "c"]


def test_nothing_usable_is_a_failure(videos: Path, refuse: Refuse) -> None:
    for name in ("a", "b"):
        (videos / f"{name}.mp4").write_bytes(b"no video")
    message = refuse(*start(videos))
    assert "no clip could be made" in message and str(videos.parent / "out/refused.jsonl") in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({1: "lrs4"}, ["unknown corpus 'lrs4'", "lrs2, lrs3, vox2, muavic, videos, debian-speech"]),
        ({2: "nowhere"}, ["there is no folder", "nowhere"]),
        ({4: "landmark=x"}, ["unknown option 'landmark'", "did you mean 'landmarks'"]),
        ({4: "landmarks=nowhere"}, ["option landmarks", "nowhere"]),
        ({5: "workers=many"}, ["option workers", "'many'"]),
        ({5: "validation=3"}, ["option validation", "lrs3"]),
    ],
)
def test_bad_input_is_one_line(videos: Path, refuse: Refuse, change: dict[int, str], parts: list[str]) -> None:
    arguments = start(videos)
    for index, value in change.items():
        arguments[index] = value
    message = refuse(*arguments)
    assert message.startswith("avsr: ") and "\n" not in message
    for part in parts:
        assert part in message
    assert not (videos.parent / "out").exists()


def test_a_folder_is_missing_on_the_command_line(refuse: Refuse) -> None:
    assert "required: FOLDER" in refuse("prepare", "videos")
    expected = "avsr: expected avsr prepare videos ROOT OUT [key=value ...], got"
    for given in (["in"], ["in", "seg=3"], ["in", "out", "more", "seg=3"]):
        assert refuse("prepare", "videos", *given) == f"{expected} {' '.join(given)}"


def test_shards_and_their_merge_on_the_command_line(
    videos: Path, capsys: pytest.CaptureFixture[str], refuse: Refuse
) -> None:
    (videos / "c.mp4").write_bytes(b"no video")
    main(start(videos, out="alone"))
    alone = capsys.readouterr().out
    for index in ("1", "2"):
        main(start(videos, "--shard", f"{index}/2"))
    counts = [line for line in capsys.readouterr().out.splitlines() if "refused" in line]
    assert counts == ["      1  refused: video"]  # the reasons have no file yet
    main(start(videos, "--merge"))
    assert capsys.readouterr().out == alone.replace("/alone/", "/out/")
    assert "got both" in refuse(*start(videos, "--shard", "1/2", "--merge"))


@pytest.mark.parametrize("given", ["0/3", "4/3", "3", "1/0", "-1/3", "1/3/5", "one/3", "1 / 3", "", "1/9999999"])
def test_a_shard_that_is_none_is_refused(videos: Path, refuse: Refuse, given: str) -> None:
    message = refuse(*start(videos, f"--shard={given}"))
    assert message == f"avsr: --shard: expected I/N with I from 1 to N, such as 3/16, got {given!r}"
    assert not (videos.parent / "out").exists()


SCRIPT = Path(__file__).parents[2] / "configs/slurm/shards.sbatch"
SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
AVSR = f'exec {sys.executable} -m avsr.cli "$@"'


def submit(videos: Path, avsr: str = AVSR, given: Sequence[str] = (), **slurm: str) -> subprocess.Popen[str]:
    """Starts the script as SLURM would, on this machine, with ``avsr`` as the command; ``given`` instead of prepare."""
    beside = videos.parent
    for name, line in ((".venv/bin/avsr", avsr), ("bin/srun", SRUN), ("bin/scontrol", 'echo "$@" > requeued')):
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        (beside / name).write_text(f"#!/bin/bash\n{line}\n")
        (beside / name).chmod(0o755)
    slurm |= {"SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": "4711", "PATH": f"{beside}/bin:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), *(given or start(videos))]
    return subprocess.Popen(command, cwd=beside, stdout=-1, stderr=-1, text=True, env=os.environ | slurm)


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_run_at_once_and_the_job_after_them_merges(
    videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(start(videos, out="alone"))
    tasks = [submit(videos, SLURM_ARRAY_TASK_ID=index, SLURM_ARRAY_TASK_COUNT="2") for index in ("1", "2")]
    for index, task in enumerate(tasks, 1):
        out, err = task.communicate(timeout=100)
        assert task.returncode == 0 and f"shard {index}/2 is done" in out, err
    assert not (videos.parent / "out/all.jsonl").exists()
    merge = submit(videos)
    out, err = merge.communicate(timeout=100)
    assert merge.returncode == 0 and out == capsys.readouterr().out, err
    manifests = [(videos.parent / name / "all.jsonl").read_bytes() for name in ("out", "alone")]
    assert manifests[0] == manifests[1] and not (videos.parent / "requeued").exists()


@pytest.mark.parametrize("status", [0, 2, 75])
@pytest.mark.parametrize("task", [{"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}, {}])
def test_only_a_task_that_was_stopped_returns_to_the_queue(videos: Path, status: int, task: dict[str, str]) -> None:
    """And each is told which shard it is; a job that is no array's task merges."""
    job = submit(videos, f'echo "$@"; exit {status}', **task)
    given, _ = job.communicate(timeout=20)
    assert given.split() == [*start(videos), *(("--shard", "3/16") if task else ("--merge",))]
    assert job.returncode == status
    requeued = videos.parent / "requeued"
    assert requeued.read_text() == "requeue 4711\n" if status == 75 else not requeued.exists()


def test_an_index_is_finished_without_a_merge(videos: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    for task, shown in ((array, "index m.jsonl --shard 3/16\n"), ({}, "index m.jsonl\n")):
        assert submit(videos, 'echo "$@"', ["index", "m.jsonl"], **task).communicate(timeout=20)[0] == shown
