"""What a chrome trace of torch's profiler says of memory and communication."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Interval = tuple[float, float]
_COMMUNICATION = ("nccl", "gloo:", "c10d::", "ncclDevKernel")


class Trace:
    """One step's trace, as ``torch.profiler.profile(profile_memory=True).export_chrome_trace`` wrote it.

    Args:
        path: the file.
        device: 0 = the host's memory, 1 = CUDA's (the trace's "Device Type").
    """

    def __init__(self, path: Path, device: int) -> None:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        self._spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
        memory = [event for event in events if event.get("name") == "[memory]"]
        memory = [event for event in memory if event["args"].get("Device Type") == device]
        memory.sort(key=lambda event: event["ts"])
        self._curve: list[tuple[float, int]] = []
        held = 0
        for event in memory:
            held += int(event["args"]["Bytes"])
            self._curve.append((float(event["ts"]), held))

    def ranges(self, name: str) -> list[Interval]:
        """(start, end) in microseconds of every range of this name on the host."""
        found = [e for e in self._spans if e["name"] == name and e.get("cat") == "user_annotation"]
        return sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in found)

    def held(self, time: float) -> int:
        """Bytes allocated since the trace's beginning and not freed by ``time``."""
        before = [value for at, value in self._curve if at <= time]
        return before[-1] if before else 0

    def peak(self, interval: Interval) -> int:
        """The most bytes held inside the interval, beyond those at its start."""
        start, end = interval
        inside = [value for at, value in self._curve if start < at <= end]
        return max([0, *(value - self.held(start) for value in inside)])

    def exposed_communication(self, whole: Interval) -> float:
        """Share of the interval in which something is communicated and nothing else is computed."""
        talks, works = [], []
        work = "kernel" if any(event.get("cat") == "kernel" for event in self._spans) else "cpu_op"
        for event in self._spans:
            interval = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            if event["name"].startswith(_COMMUNICATION):
                talks.append(interval)
            elif event.get("cat") == work:
                works.append(interval)
        alone = length(subtract(merge(talks), merge(works)))
        return alone / max(whole[1] - whole[0], 1e-9)


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times without overlap, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract(whole: Sequence[Interval], gone: Sequence[Interval]) -> list[Interval]:
    """``whole`` without ``gone``, both merged."""
    left: list[Interval] = []
    for start, end in whole:
        for cut, back in gone:
            if back <= start or cut >= end:
                continue
            if cut > start:
                left.append((start, cut))
            start = max(start, back)
            if start >= end:
                break
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def memory_parts(trace: Trace, base: Mapping[str, int]) -> dict[str, int]:
    """Bytes by part at their largest: ``base`` (weights, optimizer), and of the step's first micro-batch what the
    layers keep for their backward, what is beyond that at the worst moment, logits and loss (both inside the last)."""
    parts: dict[str, Any] = dict(base)
    forward, backward = trace.ranges("avsr/forward")[0], trace.ranges("avsr/backward")[0]
    logits, loss = trace.ranges("avsr/logits")[0], trace.ranges("avsr/loss")[0]
    parts["activations"] = max(trace.held(logits[0]) - trace.held(forward[0]), 0)
    parts["head or layer"] = trace.peak((logits[0], backward[1]))
    parts["of it: logits"] = trace.peak(logits)
    parts["of it: loss"] = trace.peak(loss)
    return parts
