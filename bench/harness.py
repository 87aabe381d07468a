"""Measures what stands side by side: every provider once a round, in turns, in one process.

CUDA: events, a flushed L2, on request a replayed CUDA graph; peaks of the caching allocator. CPU: ``perf_counter``;
peaks of torch's allocator as its profiler records them (memory that C++ code takes by itself is not seen).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.ledger import HOST_BOUND, Row, origin, quantiles, verdict

Step = Callable[[], object]
FLUSH_BYTES = 256 * 2**20  # more than any L2
HOST_SHARE = 0.9  # of the device's time: beyond it a step is bound by the host
LONG_STEP = 2e-3  # seconds; the kernels of longer ones may fill the queue, in which the host then waits
SHORTEST_SAMPLE = 2e-3  # seconds; on a CPU shorter steps are repeated within a sample


class Absent(Exception):
    """A peer that cannot run here, with the reason."""


@dataclass(frozen=True)
class Provider:
    """One way to do the work. ``make`` gives the step to time, or (what runs untimed before every step, the step)."""

    name: str
    make: Callable[[], Step | tuple[Step, Step]]
    ours: bool = False


@dataclass(frozen=True)
class Comparison:
    """Providers on the same work; the ratio is between the best of ours and the best peer.

    Attributes:
        claim: id of the claim.
        providers: ours and peers; an absent peer is a row that says so.
        upper: "ours" (ratio = ours / peer) or "peer".
        target: "<= 1.25", ">= 2", or "" for a number without a target.
        memory: the same for the ratio of peaks of memory; None = no such row.
        metric, factor: what the ratio is called, and what it is multiplied by.
        graph: CUDA only: time replays of a captured graph.
        flush: CUDA only: overwrite the L2 before every step.
        note: what bounds it, or how it was measured.
    """

    claim: str
    shape: str
    dtype: torch.dtype
    providers: Sequence[Provider]
    upper: str = "ours"
    target: str = ""
    memory: str | None = None
    metric: str = "time"
    factor: float = 1.0
    graph: bool = False
    flush: bool = True
    note: str = ""


@dataclass
class Sample:
    """What was measured of one provider: times in seconds by round, and the peak of additional memory in bytes."""

    times: list[float] = field(default_factory=list)
    peak: float = 0.0
    host: list[float] = field(default_factory=list)  # CUDA: seconds until the step was in the queue

    def median(self) -> float:
        return quantiles(self.times)[1]

    def host_bound(self) -> bool:
        """Whether the device had to wait for the host, so that the time is that of starting kernels."""
        time = self.median()
        return bool(self.host) and time < LONG_STEP and quantiles(self.host)[1] > HOST_SHARE * time


@dataclass
class Bench:
    """Where claims report. ``seconds`` is spent on the rounds of a comparison; after ``deadline`` (as of
    ``time.monotonic``) a comparison is skipped. ``emit`` gets every finished row at once."""

    device: torch.device
    seconds: float
    emit: Callable[[Row], None]
    deadline: float = float("inf")
    least_rounds: int = 5

    def __post_init__(self) -> None:
        self._origin = origin(self.device)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def compare(self, comparison: Comparison) -> dict[str, Sample]:
        """Measures and reports one comparison, and gives the samples of the providers that ran; what fails is a
        row with the error."""
        if time.monotonic() > self.deadline:
            self.row(comparison, "all", verdict="no time left")
            return {}
        with nvtx(f"{comparison.claim} {comparison.shape}", self.cuda):
            steps = self._prepared(comparison)
            samples = self._measured(comparison, steps)
        report(self, comparison, samples)
        del steps
        self.clean()
        return samples

    def _prepared(self, comparison: Comparison) -> dict[str, Runner]:
        """Every provider's step after its warm-up, and how long it takes."""
        steps: dict[str, Runner] = {}
        for provider in comparison.providers:
            try:
                made = provider.make()
                before, step = made if isinstance(made, tuple) else (None, made)
                runner = Runner(before, step)
                runner.warm(self.device, 3 if self.cuda else 1)
                runner.peak = peak_memory(runner, self.device)
                if comparison.graph and self.cuda:
                    runner.capture()
                runner.estimate(self.device)
            except Absent as reason:
                self.row(comparison, provider.name, verdict=f"absent: {reason}")
            except Exception as error:
                self.row(comparison, provider.name, verdict=f"error: {one_line(error)}")
                _stop_if_lost(error)
            else:
                steps[provider.name] = runner
        return steps

    def _measured(self, comparison: Comparison, steps: dict[str, Runner]) -> dict[str, Sample]:
        samples = {name: Sample(peak=runner.peak) for name, runner in steps.items()}
        try:
            rounds = rounds_cuda if self.cuda else rounds_cpu
            rounds(steps, samples, self.seconds, self.least_rounds, comparison.flush, self.deadline)
        except Exception as error:
            self.row(comparison, "all", verdict=f"error: {one_line(error)}")
            _stop_if_lost(error)
            return {}
        return samples

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def row(self, comparison: Comparison, provider: str, **columns: str) -> None:
        """Reports one row of a comparison."""
        graph = ", CUDA graph" if comparison.graph and self.cuda else ""
        own = {
            "claim": comparison.claim,
            "provider": provider,
            "shape": comparison.shape + graph,
            "dtype": str(comparison.dtype).removeprefix("torch."),
            "metric": comparison.metric,
            "note": comparison.note,
        }
        self.emit({**self._origin, **own, **columns})


class Runner:
    def __init__(self, before: Step | None, step: Step) -> None:
        self.before, self.step = before, step
        self.peak = 0.0
        self.seconds = 0.0

    def __call__(self) -> None:
        if self.before is not None:
            self.before()
        self.step()

    def warm(self, device: torch.device, times: int) -> None:
        for _ in range(times):
            self()
        synchronize(device)

    def estimate(self, device: torch.device) -> None:
        began = time.perf_counter()
        self()
        synchronize(device)
        self.seconds = time.perf_counter() - began

    def capture(self) -> None:
        """From now on the step is the replay of its own CUDA graph."""
        if self.before is not None:
            raise ValueError("a step with an untimed part before it cannot be captured")
        step, side = self.step, torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                # kept: the graph writes to this memory in every replay
                self.result: Any = step()
        except Exception:
            renew_generator()
            raise
        self.step = graph.replay
        self.step()
        torch.cuda.synchronize()


def renew_generator() -> None:
    """Gives the CUDA device's default generator a new state: the old one still takes itself for one that is being
    captured after a capture that failed, and refuses to draw."""
    default = torch.cuda.default_generators[torch.cuda.current_device()]
    with contextlib.suppress(RuntimeError):  # a lost device is found elsewhere
        default.graphsafe_set_state(torch.Generator("cuda").manual_seed(0).graphsafe_get_state())


def rounds_cpu(
    steps: dict[str, Runner], samples: dict[str, Sample], seconds: float, least: int, flush: bool, deadline: float
) -> None:
    """Adds one time a round to every sample, in alternating order."""
    repeats = {
        name: 1 if runner.before else max(1, min(200, int(SHORTEST_SAMPLE / max(runner.seconds, 1e-6))))
        for name, runner in steps.items()
    }
    start, done = time.monotonic(), 0
    while steps and _more(done, least, start, seconds, deadline):
        for name in list(steps)[:: -1 if done % 2 else 1]:
            runner = steps[name]
            if runner.before is not None:
                runner.before()
            began = time.perf_counter()
            for _ in range(repeats[name]):
                runner.step()
            samples[name].times.append((time.perf_counter() - began) / repeats[name])
        done += 1


def rounds_cuda(
    steps: dict[str, Runner], samples: dict[str, Sample], seconds: float, least: int, flush: bool, deadline: float
) -> None:
    """As :func:`rounds_cpu`, by events. The queue is emptied only now and then, so that the host stays ahead."""
    dirt = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if flush else None
    start, done = time.monotonic(), 0
    while steps and _more(done, least, start, seconds, deadline):
        marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(5):
            for name in list(steps)[:: -1 if done % 2 else 1]:
                runner = steps[name]
                if runner.before is not None:
                    runner.before()
                if dirt is not None:
                    dirt.zero_()
                marks.append((name, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
                marks[-1][1].record()
                began = time.perf_counter()
                with nvtx(name, True):
                    runner.step()
                samples[name].host.append(time.perf_counter() - began)
                marks[-1][2].record()
            done += 1
        torch.cuda.synchronize()
        for name, first, last in marks:
            samples[name].times.append(first.elapsed_time(last) / 1e3)


def _more(done: int, least: int, start: float, seconds: float, deadline: float) -> bool:
    now = time.monotonic()
    if done >= 3 and now > deadline:
        return False
    return done < least or now - start < seconds


def report(bench: Bench, comparison: Comparison, samples: dict[str, Sample]) -> None:
    """A row for every provider. Ours stand against the best peer, peers against the best of ours; the verdict is
    that of the best of ours."""
    ours = [p.name for p in comparison.providers if p.ours and p.name in samples]
    peers = [p.name for p in comparison.providers if not p.ours and p.name in samples]
    best = min(ours, key=lambda name: samples[name].median(), default=None)
    rival = min(peers, key=lambda name: samples[name].median(), default=None)
    for name in [*peers, *ours]:
        sample = samples[name]
        columns = dict(
            zip(("p20_ms", "p50_ms", "p80_ms"), (f"{x * 1e3:.4f}" for x in quantiles(sample.times)), strict=True)
        )
        columns["peak_mib"] = f"{sample.peak / 2**20:.2f}"
        other = rival if name in ours else best
        if other is None:
            columns["verdict"] = "nothing to compare with"
        else:
            columns |= _ratio(comparison, sample, samples[other], name in ours)
            columns["against"] = other
            target = comparison.target if name == best else ""
            columns |= {"target": target, "verdict": verdict(target, float(columns["ratio"]))}
        if not comparison.graph and sample.host_bound():
            columns["note"] = "; ".join(filter(None, [comparison.note, HOST_BOUND]))
        bench.row(comparison, name, **columns)
    if comparison.memory is not None and best is not None and rival is not None:
        upper, lower = (best, rival) if comparison.upper == "ours" else (rival, best)
        ratio = samples[upper].peak / max(samples[lower].peak, 1.0)
        columns = {"metric": "memory", "against": rival, "ratio": f"{ratio:.4g}", "target": comparison.memory}
        columns |= {"peak_mib": f"{samples[best].peak / 2**20:.2f}", "verdict": verdict(comparison.memory, ratio)}
        bench.row(comparison, best, **columns)


def _ratio(comparison: Comparison, own: Sample, other: Sample, is_ours: bool) -> Row:
    upper, lower = (own, other) if is_ours == (comparison.upper == "ours") else (other, own)
    paired = [comparison.factor * a / b for a, b in zip(upper.times, lower.times, strict=True)]
    return dict(zip(("ratio_p20", "ratio", "ratio_p80"), (f"{x:.4g}" for x in quantiles(paired)), strict=True))


def peak_memory(step: Step, device: torch.device) -> float:
    """Bytes that one call takes at its peak beyond what was there before."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    recorded = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    now = peak = 0
    for _, size in memory:
        now += size
        peak = max(peak, now)
    return float(peak)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def nvtx(name: str, cuda: bool) -> Iterator[None]:
    """A range for profilers; nothing on a CPU."""
    if not cuda:
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:200]


class DeviceLost(RuntimeError):
    """The CUDA context is broken: nothing more can be measured in this process."""


def _stop_if_lost(error: BaseException) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(one_line(error)) from lost
