"""Times several ways to do the same work: every provider runs once per round, in turns, in one process.

CUDA: events, a flushed L2, optionally a replayed CUDA graph; memory peaks of the caching allocator. CPU:
``perf_counter``; memory peaks of torch's allocator as its profiler records them (memory that C++ code allocates by
itself is not counted).
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.runner.ledger import HOST_BOUND, Row, origin, quantiles, verdict
from bench.runner.memory import peak_memory, synchronize

Step = Callable[[], object]
FLUSH_BYTES = 256 * 2**20  # more than any L2
HOST_SHARE = 0.9  # a step whose launch takes more than this share of the device's time is host-bound
LONG_STEP = 2e-3  # seconds; the kernels of longer steps may fill the launch queue, which then blocks the host
SHORTEST_SAMPLE = 2e-3  # seconds; on a CPU, shorter steps are repeated within a sample


class Absent(Exception):
    """A provider that cannot run here, with the reason."""


class DeviceLost(RuntimeError):
    """The CUDA context is broken: nothing more can be measured in this process."""


@dataclass(frozen=True)
class Provider:
    """One way to do the work. ``make`` returns the step to time, or (a step that runs untimed before it, the step)."""

    name: str
    make: Callable[[], Step | tuple[Step, Step]]
    ours: bool = False


@dataclass(frozen=True)
class Comparison:
    """Providers on the same work; the ratio is between our best provider and the best peer.

    Attributes:
        claim: id of the claim.
        providers: ours and peers; an absent peer becomes a row that says so.
        upper: "ours" (ratio = ours / peer) or "peer".
        target: "<= 1.25", ">= 2", or "" for a number without a target.
        memory: target of the ratio of memory peaks; None = no such row.
        metric, factor: the ratio's name, and what it is multiplied by.
        graph: CUDA only: time replays of a captured graph.
        flush: CUDA only: overwrite the L2 before every step.
        note: what limits it, or how it was measured.
        measure: measures in place of the rounds and returns columns of one row, that of "flashsink, loss".
        after: called with the samples once the rows are written.
    """

    claim: str
    shape: str
    dtype: torch.dtype
    providers: Sequence[Provider] = ()
    upper: str = "ours"
    target: str = ""
    memory: str | None = None
    metric: str = "time"
    factor: float = 1.0
    graph: bool = False
    flush: bool = True
    note: str = ""
    measure: Callable[[], Row] | None = None
    after: Callable[[dict[str, Sample]], None] | None = None


@dataclass
class Sample:
    """Measurements of one provider: seconds by round, and the peak of additional memory in bytes."""

    times: list[float] = field(default_factory=list)
    peak: float = 0.0
    host: list[float] = field(default_factory=list)  # CUDA: seconds until the step was in the queue

    def median(self) -> float:
        return quantiles(self.times)[1]

    def host_bound(self) -> bool:
        """Whether the device had to wait for the host, in which case the time is that of launching kernels."""
        time = self.median()
        return bool(self.host) and time < LONG_STEP and quantiles(self.host)[1] > HOST_SHARE * time


@dataclass
class Bench:
    """Measures comparisons and reports their rows.

    Attributes:
        seconds: spent on the rounds of one comparison.
        emit: gets every finished row at once.
        deadline: of ``time.monotonic``; later comparisons are skipped, and then ``late`` is set.
        layers: cuts the models whose whole steps are measured; 0 = the claim's default.
        done: keys of comparisons that are not measured again; ``finished`` gets those that are added.
        rehearsal: measure the GPU set, whatever the device.
    """

    device: torch.device
    seconds: float
    emit: Callable[[Row], None]
    deadline: float = float("inf")
    least_rounds: int = 5
    layers: int = 0
    done: set[str] = field(default_factory=set)
    finished: Callable[[str], None] | None = None
    rehearsal: bool = False
    late: bool = False

    def __post_init__(self) -> None:
        self._origin = origin(self.device)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def large(self) -> bool:
        """Whether the set for GPUs is measured."""
        return self.cuda or self.rehearsal

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of kernels: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.cuda else torch.float32

    def compare(self, comparison: Comparison) -> None:
        """Measures and reports one comparison; whatever fails becomes a row with the error."""
        key = self.key(comparison)
        if key in self.done:
            return
        if time.monotonic() > self.deadline:
            self.row(comparison, "all", verdict="no time left")
            self.late = True
            return
        self._compare(comparison)
        self.done.add(key)
        if self.finished is not None:
            self.finished(key)

    def key(self, comparison: Comparison) -> str:
        """What distinguishes a comparison from the others."""
        names = [provider.name for provider in comparison.providers]
        graph, dtype = comparison.graph and self.cuda, str(comparison.dtype)
        return json.dumps([comparison.claim, comparison.shape, dtype, comparison.metric, comparison.note, graph, names])

    def _compare(self, comparison: Comparison) -> None:
        if comparison.measure is not None:
            try:
                self.row(comparison, "flashsink, loss", **comparison.measure())
            except Exception as error:
                self.row(comparison, "flashsink, loss", verdict=f"error: {one_line(error)}")
            return
        name = f"{comparison.claim} {comparison.shape}"
        with torch.cuda.nvtx.range(name) if self.cuda else contextlib.nullcontext():  # for profilers
            runners = self._prepared(comparison)
            samples = self._measured(comparison, runners)
        report(self, comparison, samples)
        if comparison.after is not None:
            comparison.after(samples)
        del runners
        self.clean()

    def _measured(self, comparison: Comparison, runners: dict[str, Runner]) -> dict[str, Sample]:
        samples = {name: Sample(peak=runner.peak) for name, runner in runners.items()}
        try:
            rounds = rounds_cuda if self.cuda else rounds_cpu
            rounds(runners, samples, self.seconds, self.least_rounds, comparison.flush, self.deadline)
        except Exception as error:
            self.row(comparison, "all", verdict=f"error: {one_line(error)}")
            _stop_if_lost(error)
            return {}
        return samples

    def _prepared(self, comparison: Comparison) -> dict[str, Runner]:
        """Every provider's step after its warm-up, with its memory peak and duration."""
        runners: dict[str, Runner] = {}
        for provider in comparison.providers:
            try:
                made = provider.make()
                before, step = made if isinstance(made, tuple) else (None, made)
                runner = Runner(before, step)
                runner.warm(self.device, 3 if self.cuda else 0 if self.rehearsal else 1)
                runner.peak = peak_memory(runner, self.device)
                if comparison.graph and self.cuda:
                    runner.capture()
                if self.rehearsal:
                    runner.seconds = SHORTEST_SAMPLE  # a sample is one step
                else:
                    runner.estimate(self.device)
            except Absent as reason:
                self.row(comparison, provider.name, verdict=f"absent: {reason}")
            except Exception as error:
                self.row(comparison, provider.name, verdict=f"error: {one_line(error)}")
                _stop_if_lost(error)
            else:
                runners[provider.name] = runner
        return runners

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
    """A provider's step, with what is known of it before the rounds."""

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
        self.warm(device, 1)
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
    """Gives the CUDA device's default generator a new state: after a failed capture the old one still counts as being
    captured and refuses to draw."""
    default = torch.cuda.default_generators[torch.cuda.current_device()]
    with contextlib.suppress(RuntimeError):  # a lost device is detected elsewhere
        default.graphsafe_set_state(torch.Generator("cuda").manual_seed(0).graphsafe_get_state())


def rounds_cpu(
    runners: dict[str, Runner], samples: dict[str, Sample], seconds: float, least: int, flush: bool, deadline: float
) -> None:
    """Adds one time per round to every sample; the order of the runners alternates. ``flush`` has no meaning here."""
    repeats = {
        name: 1 if runner.before else max(1, min(200, int(SHORTEST_SAMPLE / max(runner.seconds, 1e-6))))
        for name, runner in runners.items()
    }
    start, done = time.monotonic(), 0
    while runners and _more(done, least, start, seconds, deadline):
        for name in list(runners)[:: -1 if done % 2 else 1]:
            runner = runners[name]
            if runner.before is not None:
                runner.before()
            began = time.perf_counter()
            for _ in range(repeats[name]):
                runner.step()
            samples[name].times.append((time.perf_counter() - began) / repeats[name])
        done += 1


def rounds_cuda(
    runners: dict[str, Runner], samples: dict[str, Sample], seconds: float, least: int, flush: bool, deadline: float
) -> None:
    """As :func:`rounds_cpu`, by events. The device is synchronized only every five rounds, so the host stays ahead."""
    dirt = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if flush else None
    start, done = time.monotonic(), 0
    while runners and _more(done, least, start, seconds, deadline):
        events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(5):
            for name in list(runners)[:: -1 if done % 2 else 1]:
                runner = runners[name]
                if runner.before is not None:
                    runner.before()
                if dirt is not None:
                    dirt.zero_()
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                began = time.perf_counter()
                with torch.cuda.nvtx.range(name):
                    runner.step()
                samples[name].host.append(time.perf_counter() - began)
                last.record()
                events.append((name, first, last))
            done += 1
        torch.cuda.synchronize()
        for name, first, last in events:
            samples[name].times.append(first.elapsed_time(last) / 1e3)


def _more(done: int, least: int, start: float, seconds: float, deadline: float) -> bool:
    now = time.monotonic()
    if done >= 3 and now > deadline:
        return False
    return done < least or now - start < seconds


def report(bench: Bench, comparison: Comparison, samples: dict[str, Sample]) -> None:
    """Writes a row for every provider. Ours are compared with the best peer, peers with our best; the verdict is that
    of our best."""
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
            target = comparison.target if name == best else ""
            columns |= {"against": other, "target": target, "verdict": verdict(target, float(columns["ratio"]))}
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


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _stop_if_lost(error: BaseException) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(one_line(error)) from lost
