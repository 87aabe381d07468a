"""How long the packed headline would take on paper: a model over the counts of ``sass_report``, no measurement.

Every CTA of a kernel executes its prologue and, for each of its blocks, the loop's instructions. An SM takes as long as
the busiest of its units, or as its CTAs do one after another, as many at a time as fit:

- issue: 4 warp instructions a clock; products: 4,096 FLOPs of bf16; exponentials: 16;
- a CTA alone: dependent loads of 700 clocks each before its loop (5 with a scan for its sequence, 4 with a table), then
  for every block its issue, its products and 30 clocks a barrier, nothing overlapped.

132 SMs at 1.755 GHz that share the work evenly, and not faster than 4.3 TB/s move the tensors. Left out: the tail of a
launch, caches, conflicts in shared memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.workloads.shapes import HEADLINE_TOKENS, MODELS, Model, utterances

SMS, CLOCK, BANDWIDTH, LOAD, BARRIER = 132, 1.755e9, 4.3e12, 700, 30
PRODUCTS = {"forward": 2, "gradient_q": 3, "gradient_kv": 4, "received": 1}
# tensors of q's and of k's size that are read or written
TENSORS = {"forward": (2, 2), "delta": (2, 0), "gradient_q": (4, 2), "gradient_kv": (2, 4), "received": (1, 1)}

Row = dict[str, str]


@dataclass(frozen=True)
class Cost:
    """Clocks of an SM's units, and of a CTA that waits for each in turn."""

    issue: float = 0.0
    products: float = 0.0
    exponentials: float = 0.0
    alone: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * x for x in _values(self)))


def _values(cost: Cost) -> tuple[float, ...]:
    return cost.issue, cost.products, cost.exponentials, cost.alone


def blocks(kernel: str, length: int, group: int, m: int, n: int) -> Iterator[tuple[int, int]]:
    """(whole, masked) blocks of every tile of a causal sequence, as device.key_range and device.query_range have it."""
    if kernel in ("forward", "gradient_q"):
        for row in range(0, length * group, m):
            first, last = row // group, min((row + m - 1) // group, length - 1)
            whole = (first + 1) // n
            yield whole, -(-(last + 1 - whole * n) // n)
    else:
        for first in range(0, length, n):
            masked = -(-(min(first + n, length) - 1 - first) // m)
            yield -(-max(length - first - masked * m, 0) // m) * group, masked * group


def microseconds(rows: Sequence[Row], model: Model, lengths: Sequence[int], loads: int) -> float:
    """Of one kernel, whose loops are ``rows``, for a layer of ``model``; ``loads`` = dependent ones before a loop."""
    kernel, tokens = rows[0]["kernel"].removesuffix("_kernel"), sum(lengths)
    of_q, of_k = TENSORS[kernel]
    moved = 2 * model.dim * tokens * (of_q * model.heads + of_k * model.kv_heads) / BANDWIDTH
    if kernel == "delta":
        return moved * 1e6
    found = re.fullmatch(r"BLOCK_M=(\d+) BLOCK_N=(\d+) warps=(\d+) .*", rows[0]["tile"])
    assert found is not None
    m, n, warps = map(int, found.groups())
    group = model.heads // model.kv_heads

    def cost(row: Row) -> Cost:
        issue = int(row["instructions"]) * warps / 4
        products = PRODUCTS[kernel] * 2 * m * n * model.dim / 4096
        if row["loop"] == "outside":
            return Cost(issue, 0, 0, loads * LOAD + issue + BARRIER * int(row["barriers"]))
        exponentials = int(row["exponentials"]) * warps * 2
        return Cost(issue, products, exponentials, issue + products + BARRIER * int(row["barriers"]))

    each = {row["loop"]: cost(row) for row in rows}
    total = Cost()
    for length in lengths:
        for whole, masked in blocks(kernel, length, group, m, n):
            total += each["outside"] + each["whole"] * whole + each["masked"] * masked
    total *= model.kv_heads / SMS
    clocks = max(total.issue, total.products, total.exponentials, total.alone / int(rows[0]["ctas"]))
    return max(clocks / CLOCK, moved) * 1e6


def table(found: Sequence[Row], labels: Sequence[str]) -> str:
    """Microseconds of a layer by kernel and label, for the shapes of the report."""
    lines = ["| model of the packed headline, us a layer | kernel | " + " | ".join(labels) + " |"]
    lines.append("|---|---|" + "---:|" * len(labels))
    for name, case in (("llama-3.2-1b", "D64 GQA4 packed short"), ("llama-3.2-3b", "D128 GQA3 packed short")):
        model, lengths, sums = MODELS[name], utterances(HEADLINE_TOKENS), [0.0] * len(labels)
        for kernel in TENSORS:
            cells = []
            for i, label in enumerate(labels):
                own = [r for r in found if (r["label"], r["case"], r["kernel"]) == (label, case, f"{kernel}_kernel")]
                scans = not any((r["label"], r["kernel"]) == (label, "segments_kernel") for r in found)
                time = microseconds(own, model, lengths, 4 + scans) if own else 0.0
                sums[i] += 0.0 if kernel == "received" else time
                cells.append(f"{time:.0f}" if own else "none")
            lines.append(f"| {name} | {kernel} | " + " | ".join(cells) + " |")
        lines.append(f"| {name} | without received | " + " | ".join(f"{x:.0f}" for x in sums) + " |")
    return "\n".join(lines)
