"""The sweep over tiles, with a fake compiler and kernels in the interpreter."""

from __future__ import annotations

import time
from multiprocessing.pool import ThreadPool

import pytest
import torch

from bench import tune
from bench.compile_report import Job
from bench.workloads.attention import Problem
from bench.workloads.shapes import Model
from flashsink.triton import tiles
from flashsink.triton.launch import Tile

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
MODEL = Model("tiny", 2, 1, 16, 32, 2, 48, 50)
PROBLEMS = [Problem(MODEL, 1, tokens, CPU, torch.float32) for tokens in (20, 33)]
SOUND, SPILLING, BROKEN = (Tile({"BLOCK_M": m, "BLOCK_N": 16}, 4, 1) for m in (32, 64, 128))
FAR = float("inf")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Three candidates each, and jobs made without a compiler: Job.kernel is the kernel, its options the tile."""
    monkeypatch.setattr(tiles, "CANDIDATES", dict.fromkeys(("forward", "received"), [SOUND, SPILLING, BROKEN]))

    def job(launch, capability):
        options = tuple(launch.tile.blocks.items())
        return Job("", launch.kernel.fn.__name__, (), (), (), options, capability)

    monkeypatch.setattr(tune, "job_of", job)


def compiled(jobs):
    found = {}
    for job in jobs:
        rows = dict(job.options)["BLOCK_M"]
        sound = {"sm": "90", "spills": "8" if rows == 64 else "0", "shared": "1024", "wgmma": "0"}
        found[job] = "CompilationError: no" if rows == 128 else sound
    return found


def test_what_does_not_compile_or_spills_is_named_and_left_out(capsys):
    sound = tune.compiling(["forward", "received"], PROBLEMS[0], compiled)
    now = tune.in_use("forward", PROBLEMS[0])
    assert sound["forward"] == [now, SOUND] and sound["received"][-1] == SOUND
    printed = capsys.readouterr().out
    assert printed.count("spills 8 bytes") == 2 and printed.count("CompilationError: no") == 2


def test_only_the_kernel_itself_is_compiled():
    for kernel in ("forward", "received", "gradient_kv", "gradient_q"):
        assert {job.kernel for job in tune.jobs_of(kernel, PROBLEMS[0], SOUND)} == {f"{kernel}_kernel"}


def test_problems_come_one_after_another_with_all_kernels(capsys, monkeypatch):
    rounds = tune.rounds_cpu
    monkeypatch.setattr(tune, "rounds_cpu", lambda *given: rounds(*given[:3], 1, *given[4:]))
    tune.sweep(["forward", "received"], PROBLEMS, 0.0, FAR, compiled)
    proposals = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " ms " in line]
    assert proposals == [f"{kernel} {p.shape}" for p in PROBLEMS for kernel in ("forward", "received")]


def test_no_candidate_starts_in_the_last_seconds(capsys):
    samples = tune.times("forward", PROBLEMS[0], [SOUND], 0.0, time.monotonic() + tune.SPARE - 1)
    assert samples == {} and "no time for 1 tiles" in capsys.readouterr().out
    tune.sweep(["forward"], PROBLEMS, 0.0, time.monotonic() + tune.SPARE - 1, compiled)
    assert capsys.readouterr().out.count("no time left") == 2


def test_jobs_that_are_late_say_so(monkeypatch):
    monkeypatch.setattr(tune, "compiled", lambda job: time.sleep(0.5))
    job = Job("nothing", "there", (), (), (), (), 90)
    with ThreadPool(1) as pool:
        assert tune.compile_in(pool, 0.0)([job]) == {job: "not compiled in time"}
