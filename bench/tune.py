"""``make gpu-tune``: times the candidate tiles of every attention kernel and proposes entries for the table.

All candidates of a problem are first compiled, in parallel and into Triton's cache; those that spill registers, exceed
the device's shared memory or do not compile are named and left out. A step that runs the kernel is then timed with each
of the others in turns, as replays of CUDA graphs; the rest of the step is the same, so the difference is the kernel's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.pool import AsyncResult, Pool

import torch

from bench.compile_report import CAPABILITIES, Job, Row, compiled, faults_of, job_of
from bench.runner.measure import Bench, Runner, Sample, Step, one_line, rounds_cpu, rounds_cuda
from bench.workloads.attention import Problem, dense, ours, packed
from flashsink.triton import tiles
from flashsink.triton.launch import Launch, Tile, observe

# the step in which a kernel runs: statistics, and whether it has a backward
STEPS = {"forward": ("", False), "received": ("pass", False)}
BACKWARD = ("captured", True)
SPARE = 40.0  # seconds before the end; no further candidate starts after that

Compile = Callable[[Iterable[Job]], dict[Job, Row | str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(tiles.CANDIDATES))
    parser.add_argument("--seconds", type=float, default=0.3, help="for the rounds of one kernel at one shape")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for everything")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu-tune: there is no CUDA device here", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.budget
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        sweep(arguments.kernels or list(tiles.CANDIDATES), problems(), arguments.seconds, end, compile_in(pool, end))
    return 0


def sweep(kernels: list[str], given: list[Problem], seconds: float, end: float, compile_all: Compile) -> None:
    """Prints proposals for all kernels, problem by problem in the given order."""
    for problem in given:
        if time.monotonic() > end - SPARE:
            print(f"{problem.shape}: no time left")
            continue
        sound = compiling(kernels, problem, compile_all)
        for kernel in kernels:
            print(proposal(kernel, problem, times(kernel, problem, sound[kernel], seconds, end)), flush=True)


def compile_in(pool: Pool, end: float) -> Compile:
    """Compiles jobs in the processes of ``pool``, until ``SPARE`` seconds before the end."""

    def run(jobs: Iterable[Job]) -> dict[Job, Row | str]:
        waiting: dict[Job, AsyncResult[Row | str]] = {job: pool.apply_async(compiled, (job,)) for job in jobs}
        found: dict[Job, Row | str] = {}
        for job, result in waiting.items():
            try:
                found[job] = result.get(max(end - SPARE - time.monotonic(), 0.0))
            except multiprocessing.TimeoutError:
                found[job] = "not compiled in time"
        return found

    return run


def compiling(kernels: list[str], problem: Problem, compile_all: Compile) -> dict[str, list[Tile]]:
    """For every kernel the usable candidates, the tile in use first; prints the others."""
    jobs = [
        (kernel, tile, jobs_of(kernel, problem, tile)) for kernel in kernels for tile in candidates(kernel, problem)
    ]
    done = compile_all(dict.fromkeys(job for *_, some in jobs for job in some))
    sound: dict[str, list[Tile]] = {kernel: [] for kernel in kernels}
    for kernel, tile, some in jobs:
        results = [done[job] for job in some]
        faults = [fault for x in results for fault in ([x] if isinstance(x, str) else faults_of(x, False))]
        if faults:
            print(f"{kernel} {problem.shape} {label(tile)}: {'; '.join(faults)}", flush=True)
        else:
            sound[kernel].append(tile)
    return sound


def candidates(kernel: str, problem: Problem) -> list[Tile]:
    return list({label(tile): tile for tile in [in_use(kernel, problem), *tiles.CANDIDATES[kernel]]}.values())


def jobs_of(kernel: str, problem: Problem, tile: Tile) -> list[Job]:
    """What the step of ``kernel`` would compile for it with ``tile``; runs nothing."""
    seen: list[Launch] = []

    def note(launch: Launch) -> bool:
        if launch.kernel.fn.__name__ == f"{kernel}_kernel":
            seen.append(launch)
        return False

    with observe(note):
        tiled(_step(kernel, problem), kernel, tile)()
    return list(dict.fromkeys(job_of(launch, capability(problem.device)) for launch in seen))


def capability(device: torch.device) -> int:
    """The device's capability, so that a launch finds the compiled kernel in Triton's cache."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor in CAPABILITIES:
            return 10 * major + minor
    return tiles.architecture(device)


def problems() -> list[Problem]:
    """Head dims 128 and 64: first the headline, then rows of 1k and of 4k tokens."""
    bench, models = Bench(torch.device("cuda"), 0.0, lambda row: None), ("llama-3.2-3b", "llama-3.2-1b")
    rows = [dense(bench, model, tokens) for tokens in (1024, 4096) for model in models]
    return [*(packed(bench, model) for model in models), *rows]


def _step(kernel: str, problem: Problem) -> Step:
    statistics, backward = STEPS.get(kernel, BACKWARD)
    made = ours(problem, "triton", statistics, backward).make()
    assert not isinstance(made, tuple)
    return made


def times(kernel: str, problem: Problem, given: list[Tile], seconds: float, end: float) -> dict[str, Sample]:
    """Samples of the ``given`` tiles that run, by :func:`label`."""
    step = _step(kernel, problem)
    steps: dict[str, Runner] = {}
    for tile in given:
        if time.monotonic() > end - SPARE:
            print(f"{kernel} {problem.shape}: no time for {len(given) - len(steps)} tiles from {label(tile)} on")
            break
        try:
            runner = Runner(None, tiled(step, kernel, tile))
            runner.warm(problem.device, 1)
            if problem.device.type == "cuda":
                runner.capture()
            else:
                runner.estimate(problem.device)
            steps[label(tile)] = runner
        except Exception as error:
            print(f"{kernel} {problem.shape} {label(tile)}: {one_line(error)}")
            torch.cuda.synchronize()  # a lost device ends the run here
    samples = {name: Sample() for name in steps}
    rounds = rounds_cuda if problem.device.type == "cuda" else rounds_cpu
    rounds(steps, samples, seconds, 5, True, end)
    return samples


def in_use(kernel: str, problem: Problem) -> Tile:
    model = problem.model
    length = problem.tokens // len(problem.lengths or (1,))
    return tiles.choose(
        kernel, model.dim, problem.dtype.itemsize, problem.device, model.heads // model.kv_heads, length
    )


def tiled(step: Step, kernel: str, tile: Tile) -> Step:
    def run() -> object:
        with tiles.override(kernel, tile):
            return step()

    return run


def proposal(kernel: str, problem: Problem, samples: dict[str, Sample]) -> str:
    """One line: the fastest tile as an entry of the table, and the one in use."""
    if not samples:
        return f"{kernel} {problem.shape}: no candidate runs"
    now = label(in_use(kernel, problem))
    best = min(samples, key=lambda name: samples[name].median())
    text = f"{kernel} {problem.shape}: {samples[best].median() * 1e3:.4f} ms ({problem.model.dim}, {best})"
    if now in samples:
        text += f"; now {samples[now].median() * 1e3:.4f} ms {now}"
    return text


def label(tile: Tile) -> str:
    """A tile as the table of tiles writes it."""
    return f"_tile({', '.join(str(size) for size in tile.blocks.values())}, {tile.warps}, {tile.stages})"


if __name__ == "__main__":
    sys.exit(main())
