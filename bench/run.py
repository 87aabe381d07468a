"""``make bench``: times and memory of flashsink's operations, one row each in ``bench/ledger.csv``.

Every operation stands beside what one would write without it, on the same inputs. A row holds the 20th, 50th and
80th percentile in ms and the peak of additional memory in MiB; slower rows stay in.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

import flashsink

LEDGER = Path(__file__).with_name("ledger.csv")
FIELDS = ["date", "commit", "device", "torch", "triton", "claim", "provider", "shape", "dtype"]
FIELDS += ["p20_ms", "p50_ms", "p80_ms", "peak_mib"]


@dataclass(frozen=True)
class Case:
    """One row to be measured: ``make`` returns the callable to time."""

    claim: str
    provider: str
    shape: str
    make: Callable[[], Callable[[], object]]


def attention_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    cases = []
    for b, h, hk, s, d in ((8, 9, 3, 64, 64), (8, 9, 3, 256, 64), (2, 24, 8, 512, 128)):

        def inputs(b: int = b, h: int = h, hk: int = hk, s: int = s, d: int = d) -> tuple[torch.Tensor, ...]:
            shape = ((b, h, s, d), (b, hk, s, d), (b, hk, s, d))
            return tuple(torch.randn(x, device=device, dtype=dtype, requires_grad=True) for x in shape)

        def flash(stats: bool, inputs: Callable[[], tuple[torch.Tensor, ...]] = inputs) -> Callable[[], object]:
            q, k, v = inputs()

            def step() -> None:
                out = flashsink.attention(q, k, v, return_stats=stats)
                (out[0] if isinstance(out, tuple) else out).sum().backward()

            return step

        def sdpa(inputs: Callable[[], tuple[torch.Tensor, ...]] = inputs) -> Callable[[], object]:
            q, k, v = inputs()

            def step() -> None:
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                out.sum().backward()

            return step

        shape = f"B{b} H{h} Hk{hk} S{s} D{d}"
        cases.append(Case("attention fwd+bwd", "torch sdpa, no statistics", shape, sdpa))
        cases.append(Case("attention fwd+bwd", "flashsink", shape, lambda flash=flash: flash(False)))
        cases.append(Case("attention fwd+bwd", "flashsink with statistics", shape, lambda flash=flash: flash(True)))
    return cases


def hidden_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    cases = []
    for layers, b, s, c in ((29, 8, 32, 576), (4, 4, 256, 2048)):

        def states(layers: int = layers, b: int = b, s: int = s, c: int = c) -> list[torch.Tensor]:
            return [torch.randn(b, s, c, device=device, dtype=dtype, requires_grad=True) for _ in range(layers)]

        def fused(states: Callable[[], list[torch.Tensor]] = states) -> Callable[[], object]:
            hidden = states()
            spans = torch.full((hidden[0].shape[0],), hidden[0].shape[1], device=device)
            return lambda: flashsink.decorrelation_loss(hidden, spans).backward()

        def eager(states: Callable[[], list[torch.Tensor]] = states) -> Callable[[], object]:
            hidden = states()

            def step() -> None:
                cosines = [torch.nn.functional.cosine_similarity(h[:, :1], h[:, 1:], dim=-1) for h in hidden]
                torch.stack([(x**2).mean() for x in cosines]).mean().backward()

            return step

        def activations(states: Callable[[], list[torch.Tensor]] = states) -> Callable[[], object]:
            hidden = states()
            return lambda: flashsink.activation_stats(hidden)

        shape = f"L{layers} B{b} S{s} C{c}"
        cases.append(Case("decorrelation fwd+bwd", "torch cosine_similarity", shape, eager))
        cases.append(Case("decorrelation fwd+bwd", "flashsink", shape, fused))
        cases.append(Case("activation statistics", "flashsink", shape, activations))
    return cases


def measure(step: Callable[[], object], device: torch.device, seconds: float) -> tuple[list[float], float]:
    """(p20, p50, p80) in ms over at least 5 calls, and the peak of additional memory in MiB."""
    for _ in range(2):
        step()
    peak = peak_memory(step, device)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    times.sort()
    return [times[int(len(times) * share)] for share in (0.2, 0.5, 0.8)], peak


def peak_memory(step: Callable[[], object], device: torch.device) -> float:
    """CUDA: of the allocator. CPU: resident memory sampled by a thread, so short peaks may be missed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    page = 4096 / 2**20
    resident = Path("/proc/self/statm")
    samples = [int(resident.read_text().split()[1])]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            samples.append(int(resident.read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return (max(samples) - samples[0]) * page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--dry", action="store_true", help="print, but leave the ledger alone")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}, {_cpu()}"
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": head.stdout.strip() or "unknown",
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }
    rows = []
    for case in attention_cases(device, dtype) + hidden_cases(device, dtype):
        quantiles, peak = measure(case.make(), device, arguments.seconds)
        numbers = dict(zip(FIELDS[-4:], (f"{x:.3f}" for x in [*quantiles, peak]), strict=True))
        rows.append({**common, "claim": case.claim, "provider": case.provider, "shape": case.shape, **numbers})
        print(f"{case.claim:22s} {case.shape:26s} {case.provider:28s} {quantiles[1]:9.3f} ms {peak:8.1f} MiB")
    if arguments.dry:
        return
    new = not LEDGER.exists()
    with LEDGER.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _cpu() -> str:
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
