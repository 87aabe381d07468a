"""``make gpu-tune``: times the candidate tiles of every attention kernel and proposes entries for the table.

A step that runs the kernel is timed with each candidate in turn, all side by side in one process; the rest of the
step is the same for all of them, so the difference is the kernel's. A candidate that does not compile, or does not fit
into the device, is named and left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

if not __package__:  # run as a script: the repository root is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.attention import Problem, ours
from bench.harness import Provider, Runner, Sample, Step, one_line, rounds_cuda
from bench.shapes import HEADLINE_TOKENS, MODELS, utterances
from flashsink.gpu import tiles
from flashsink.gpu.launch import Tile

# the step in which a kernel runs: statistics, and whether there is a backward
STEPS = {"forward": ("", False), "received": ("pass", False)}
BACKWARD = ("captured", True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(tiles.CANDIDATES))
    parser.add_argument("--seconds", type=float, default=0.3, help="for the rounds of one kernel at one shape")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for everything")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu-tune: there is no CUDA device here", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.budget
    for kernel in arguments.kernels or list(tiles.CANDIDATES):
        for problem in problems():
            if time.monotonic() > end:
                print(f"{kernel} {problem.shape}: no time left")
                continue
            print(proposal(kernel, problem, times(kernel, problem, arguments.seconds, end)), flush=True)
    return 0


def problems() -> list[Problem]:
    """The headline and rows of 1k and 4k tokens, for head dims 64 and 128."""
    found, device = [], torch.device("cuda")
    packed = tuple(utterances(HEADLINE_TOKENS))
    for name in ("llama-3.2-1b", "llama-3.2-3b"):
        model = MODELS[name]
        found.append(Problem(model, 1, HEADLINE_TOKENS, device, torch.bfloat16, packed))
        for tokens in (1024, 4096):
            found.append(Problem(model, HEADLINE_TOKENS // tokens, tokens, device, torch.bfloat16))
    return found


def provider(kernel: str, problem: Problem) -> Provider:
    statistics, backward = STEPS.get(kernel, BACKWARD)
    return ours(problem, "triton", statistics, backward)


def times(kernel: str, problem: Problem, seconds: float, end: float) -> dict[str, Sample]:
    """Samples of all candidates that run, by :func:`label`; the tile in use now is among them."""
    made = provider(kernel, problem).make()
    assert not isinstance(made, tuple)
    steps: dict[str, Runner] = {}
    for name, tile in {label(tile): tile for tile in [in_use(kernel, problem), *tiles.CANDIDATES[kernel]]}.items():
        try:
            runner = Runner(None, tiled(made, kernel, tile))
            runner.warm(problem.device, 2)
            steps[name] = runner
        except Exception as error:
            print(f"{kernel} {problem.shape} {name}: {one_line(error)}")
            torch.cuda.synchronize()  # a lost device ends the run here
    samples = {name: Sample() for name in steps}
    rounds_cuda(steps, samples, seconds, 5, True, end)
    return samples


def in_use(kernel: str, problem: Problem) -> Tile:
    return tiles.choose(kernel, problem.model.dim, problem.dtype.itemsize, problem.device)


def tiled(step: Step, kernel: str, tile: Tile) -> Step:
    def run() -> object:
        with tiles.override(kernel, tile):
            return step()

    return run


def proposal(kernel: str, problem: Problem, samples: dict[str, Sample]) -> str:
    """One line: the fastest tile as an entry of the table, beside the one in use."""
    if not samples:
        return f"{kernel} {problem.shape}: no candidate runs"
    now = label(in_use(kernel, problem))
    best = min(samples, key=lambda name: samples[name].median())
    text = f"{kernel} {problem.shape}: {samples[best].median() * 1e3:.4f} ms ({problem.model.dim}, {best})"
    if now in samples:
        text += f"; now {samples[now].median() * 1e3:.4f} ms {now}"
    return text


def label(tile: Tile) -> str:
    """As the table of tiles writes it."""
    return f"_tile({', '.join(str(size) for size in tile.blocks.values())}, {tile.warps}, {tile.stages})"


if __name__ == "__main__":
    sys.exit(main())
