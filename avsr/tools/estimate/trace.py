"""Memory and communication in a Chrome trace of torch's profiler."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import accumulate
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
        held = accumulate(int(event["args"]["Bytes"]) for event in memory)
        self._curve = [(float(event["ts"]), bytes_) for event, bytes_ in zip(memory, held, strict=True)]

    def ranges(self, name: str) -> list[Interval]:
        """(start, end) in microseconds of every range of this name on the host."""
        found = [e for e in self._spans if e["name"] == name and e.get("cat") == "user_annotation"]
        return sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in found)

    def held(self, time: float) -> int:
        """Bytes allocated since the start of the trace and not freed by ``time``."""
        before = [value for at, value in self._curve if at <= time]
        return before[-1] if before else 0

    def peak(self, interval: Interval) -> int:
        """The maximum of the bytes held in the interval, less those at its start."""
        start, end = interval
        inside = [value for at, value in self._curve if start < at <= end]
        return max([0, *(value - self.held(start) for value in inside)])

    def exposed_communication(self, whole: Interval) -> float:
        """Share of the interval with communication and no computation."""
        communication, computation = [], []
        category = "kernel" if any(event.get("cat") == "kernel" for event in self._spans) else "cpu_op"
        for event in self._spans:
            interval = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            if event["name"].startswith(_COMMUNICATION):
                communication.append(interval)
            elif event.get("cat") == category:
                computation.append(interval)
        return length_alone(communication, computation) / max(whole[1] - whole[0], 1e-9)


def length_alone(intervals: Iterable[Interval], others: Iterable[Interval]) -> float:
    """Total time that some of ``intervals`` cover and none of ``others`` does."""
    edges = [
        (time, -step, kind)
        for kind, part in enumerate((intervals, others))
        for span in part
        for time, step in zip(span, (1, -1), strict=True)
    ]
    total = begin = 0.0
    covers = [0, 0]
    for time, step, kind in sorted(edges):
        before = covers[0] > 0 and not covers[1]
        covers[kind] -= step
        after = covers[0] > 0 and not covers[1]
        if before and not after:
            total += time - begin
        elif after and not before:
            begin = time
    return total


def memory_parts(trace: Trace, base: Mapping[str, int]) -> dict[str, int]:
    """Bytes by part at their peak: ``base`` (weights, optimizer) and, of the step's first micro-batch, what the layers
    keep for their backward, the peak beyond that, and logits and loss (both part of the latter)."""
    parts: dict[str, Any] = dict(base)
    forward, backward = trace.ranges("avsr/forward")[0], trace.ranges("avsr/backward")[0]
    logits, loss = trace.ranges("avsr/logits")[0], trace.ranges("avsr/loss")[0]
    parts["activations"] = max(trace.held(logits[0]) - trace.held(forward[0]), 0)
    parts["head or layer"] = trace.peak((logits[0], backward[1]))
    parts["of it: logits"] = trace.peak(logits)
    parts["of it: loss"] = trace.peak(loss)
    return parts
