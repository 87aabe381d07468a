"""Runs every Triton kernel as the machine code that it ships, on the emulator, against float64.

``python tests/ptx/prove.py`` goes through the problems below for sm_80, sm_90 and sm_100 in bf16, fp16 and float32, and
for sm_120 in bf16, with the tiles of the table. A row of ``bench/results/ptx_proof.jsonl`` is a problem that has ended;
a second start goes on, and repeats what was done with other sources. ``ptx_proof.md`` is the table of kernels and
tiles.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = map(str, (HERE, HERE.parent / "flashsink", ROOT / "kernels", ROOT))

import cases  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from emulated import Device  # noqa: E402
from emulator import Fault  # noqa: E402

ROWS = ROOT / "bench" / "results" / "ptx_proof.jsonl"
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# name: (B, H, Hk, Sq, Sk, layout); the head dims are below
SHAPES: dict[str, tuple[int, int, int, int, int, dict[str, list[int]]]] = {
    "several blocks": (1, 3, 1, 300, 300, {}),
    "padded": (3, 4, 2, 150, 150, {"starts": [0, 20, 149], "lengths": [150, 66, 1]}),
    "packed": (1, 4, 2, 320, 320, {"cu_seqlens": [0, 0, 1, 18, 20, 280, 300]}),
    "queries at the end": (2, 3, 3, 17, 190, {"starts": [0, 100]}),
    "one query": (3, 6, 2, 1, 37, {"starts": [0, 20, 36]}),
}
# shape, head dim of q and of v, pattern of cases.PATTERNS
PATTERNED = (
    *(("padded", 64, 64, "window"), ("packed", 64, 64, "all"), ("queries at the end", 128, 64, "prefix")),
    *(("padded", 128, 128, "all"), ("several blocks", 128, 128, "softcap"), ("packed", 256, 192, "image")),
)
# shape, head dim, whether some queries do not count, pattern
SEGMENTED = (
    *(("packed", 64, False, None), ("padded", 64, True, None), ("several blocks", 128, False, "window")),
    *(("queries at the end", 128, True, "all"), ("padded", 256, False, None), ("packed", 256, False, "softcap")),
)
HEAD_DIMS = {32: "padded", 64: "", 72: "packed", 80: "padded", 96: "packed", 128: "", 192: "padded", 256: ""}


@dataclass(frozen=True)
class Problem:
    """Something to compute: a name, a dtype's name, and what raises if the result is wrong; it returns the worst error
    as a share of what is allowed."""

    name: str
    dtype: str
    call: Callable[[], float | None]
    quick: bool = False


def problems() -> Iterator[Problem]:
    for dtype in DTYPES:
        yield from attention_problems(dtype)
        yield from act_problems(dtype)
        yield from hidden_problems(dtype)


def attention_problems(dtype: str) -> Iterator[Problem]:
    """Every shape with the head dims that end a row of the table of tiles, and one with each of the others."""
    for dim, only in HEAD_DIMS.items():
        if dtype == "fp32" and dim > 128:
            continue
        for number, shape in enumerate(SHAPES):
            if only and shape != only:
                continue
            # not causal, counted and with a sink logit somewhere, each alone and together
            causal, counted, sink = number != 1 or dim == 128, number in (1, 3), number in (0, 3, 4)
            options = {"causal": causal, "counted": counted, "sink": sink}
            name = f"attention D{dim} {shape}" + "".join(f" {key}" for key, on in options.items() if on)
            call = functools.partial(attention, shape, dim, DTYPES[dtype], **options)
            yield Problem(name, dtype, call, quick=dim == 64 and shape == "packed" and dtype == "bf16")
    # fp16 has no such numbers; inf - inf of a product of bf16 is 0 in the emulator, which sums in double
    unlike = {"fp32": (torch.inf, torch.nan), "bf16": (torch.inf,)}.get(dtype, ())
    for value, scale in ((value, scale) for value in unlike for scale in (0.3, -0.3)):
        call = functools.partial(not_finite, value, scale, DTYPES[dtype])
        yield Problem(f"attention D64 with scores of {value}, scale {scale}", dtype, call)
    for shape, dim, values, pattern in PATTERNED:
        if dtype != "fp32" or dim <= 128:
            options = {"causal": True, "counted": False, "sink": pattern == "all", "pattern": pattern, "values": values}
            name = f"attention D{dim} {shape} {pattern}" + (f" values D{values}" if values != dim else "")
            call = functools.partial(attention, shape, dim, DTYPES[dtype], **options)
            yield Problem(name, dtype, call, quick=dim == 64 and shape == "packed" and dtype == "bf16")
    for shape, dim, counted, pattern in SEGMENTED:
        if dtype != "fp32" or dim <= 128:
            call = functools.partial(by_segment, shape, dim, DTYPES[dtype], counted, pattern)
            name = f"statistics by segment D{dim} {shape}" + (" counted" if counted else "") + f" {pattern or ''}"
            yield Problem(name.strip(), dtype, call, quick=dim == 64 and shape == "packed" and dtype == "bf16")
    for dim in (64, 128, 256):  # with masks and ACT
        if dtype != "fp32" or dim <= 128:
            yield Problem(f"patterns of the check D{dim}", dtype, functools.partial(check, dim, DTYPES[dtype]))


def check(dim: int, dtype: torch.dtype) -> None:
    from flashsink import dispatch, selfcheck

    reason = selfcheck.wrong(dispatch.module("triton"), selfcheck.Kernel("patterns", dtype, dim), torch.device("cpu"))
    assert not reason, reason


def attention(
    shape: str,
    dim: int,
    dtype: torch.dtype,
    causal: bool,
    counted: bool,
    sink: bool,
    pattern: str | None = None,
    values: int | None = None,
) -> float:
    b, h, hk, queries, keys, layout = SHAPES[shape]
    name = f"{shape} D{dim}"
    cases.LONG[name] = (b, h, hk, queries, keys, dim, layout)  # where Problem and exact look
    logits = cases.sink_logits(name, 0.5) if sink else None
    problem = cases.Problem(name, dtype, features=values)
    found = cases.run(
        *(cases.Backend("triton", dtype=dtype, shipped=True), problem),
        causal=causal, counted=counted, sink_logits=logits, **(problem.pattern(pattern) if pattern else {}),
    )  # fmt: skip
    want = cases.exact(
        name, causal, dtype, counted=counted, sink=0.5 if sink else None, pattern=pattern, features=values
    )
    cases.compare(found, want, dtype)
    return max(
        share(found[key], want[key], cases.TOLERANCE[torch.float32 if key in STATISTICS else dtype])
        for key in found
        if key != "queries"
    )


def by_segment(shape: str, dim: int, dtype: torch.dtype, counted: bool, pattern: str | None) -> None:
    import test_segments

    b, h, hk, queries, keys, layout = SHAPES[shape]
    name = f"{shape} D{dim}"
    cases.LONG[name] = (b, h, hk, queries, keys, dim, layout)
    backend = cases.Backend("triton", dtype=dtype, shipped=True)
    test_segments.check(backend, name, counted, 0.5, pattern, dtype=dtype)


def not_finite(value: float, scale: float, dtype: torch.dtype) -> None:
    import test_attention

    backend = cases.Backend("triton", dtype=dtype, shipped=True)
    test_attention.test_scores_that_are_not_finite(backend, value, scale, 64)


STATISTICS = ("lse", "received", "early", "mean_received")


def share(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> float:
    if not got.numel():
        return 0.0
    return float(((got.double() - want).abs() / (tolerance * (1.0 + want.abs()))).max())


def act_problems(dtype: str) -> Iterator[Problem]:
    import oracle

    import flashsink

    def act(dim: int, portion: float) -> float:
        g = torch.Generator().manual_seed(5)
        shapes = ((4, 75), (2, 75), (2, 75))
        q, k, v = (torch.randn(2, heads, n, dim, generator=g).to(DTYPES[dtype]) for heads, n in shapes)
        layout = {"starts": torch.tensor([2, 0]), "lengths": torch.tensor([70, 16])}
        sinks = torch.rand(2, 4, 75, generator=g) < portion
        got = flashsink.calibrated_attention(q, k, v, sinks, **layout, beta=0.4, backend="triton")
        probs = oracle.Attention(q, k, v, **layout).probs
        rows = oracle.runs(2, 75, **{key: value.tolist() for key, value in layout.items()})
        want = oracle.weigh(oracle.act(probs, sinks, rows, 0.4), v)
        worst = share(got, want, cases.TOLERANCE[DTYPES[dtype]])
        assert worst <= 1.0, f"{worst:.3g} of what is allowed"
        return worst

    for dim, portion in ((64, 0.1), (64, 0.9), (128, 0.3), (256, 0.3)):
        if dtype != "fp32" or dim <= 128:
            call = functools.partial(act, dim, portion)
            yield Problem(f"ACT D{dim}, {portion:.0%} sinks", dtype, call)


def hidden_problems(dtype: str) -> Iterator[Problem]:
    """The norm with and without the loss, the loss, and the largest activations."""
    import test_activations
    import test_decorrelation
    import test_norm

    backend = cases.Backend("triton", dtype=DTYPES[dtype], shipped=True)

    def norm(case: str, features: int, loss: bool) -> None:
        states, kind = cases.States(case), DTYPES[dtype]
        h, weight = states.states(features, kind), test_norm.weight_of(features, kind)
        want = test_norm.exact(case, features, kind, 0.1, loss)
        found = test_norm.run(backend, states, h, weight, margin=0.1, loss=loss)
        test_norm.check(backend, states, found, want, h, weight, loss)

    def loss(case: str, features: int) -> None:
        states = cases.States(case)
        layers = test_decorrelation.make(case, features, DTYPES[dtype], 3)
        upstream = 1024.0  # else float16 has no room for the gradients of many features
        got = test_decorrelation.run(layers, states.spans, backend, upstream, **states.options, margin=0.1)
        total, gradients = test_decorrelation.exact(case, features, DTYPES[dtype], 0.1, 3)
        test_decorrelation.agree(got, (total, [upstream * x for x in gradients]))

    def largest(case: str, features: int) -> None:
        test_activations.test_equals_the_definition(backend, case, features, DTYPES[dtype])

    for case, features in (("long", 96), ("packed, empty sequences and a tail", 576), ("starts", 3072)):
        quick = dtype == "bf16" and features == 96
        for with_loss in (True, False):
            name = f"norm C{features} {case}{' with the loss' if with_loss else ''}"
            yield Problem(name, dtype, functools.partial(norm, case, features, with_loss), quick and with_loss)
        yield Problem(f"loss C{features} {case}", dtype, functools.partial(loss, case, features), quick)
        yield Problem(f"activations C{features} {case}", dtype, functools.partial(largest, case, features), quick)


# ---- rows


def sources() -> str:
    """A state of the kernels, the emulator and Triton."""
    import triton

    paths = [
        *HERE.glob("*.cpp"),
        HERE / "machine.h",
        HERE / "ptx_program.py",
        *(ROOT / "kernels" / "flashsink" / "triton").glob("*.py"),
    ]
    text = b"".join(path.read_bytes() for path in sorted(paths) if path.is_file()) + triton.__version__.encode()
    return hashlib.sha256(text).hexdigest()[:12]


def prove(problem: Problem, sm: int) -> dict[str, Any]:
    """A row."""
    torch.set_num_threads(1)
    began, device, verdict, worst = time.monotonic(), Device(sm), "right", None
    try:
        # outputs come full of NaN, so that those that nobody writes are seen
        with (
            pytest.MonkeyPatch.context() as patch,
            device.active(),
            cases.Backend("triton", shipped=True).active(patch),
        ):
            worst = problem.call()
    except AssertionError as error:
        verdict = f"wrong: {error}"
    except Fault as error:
        verdict = f"fault: {error}"
    if verdict == "right" and device.races:
        verdict = "race"
    return {
        "problem": problem.name,
        "dtype": problem.dtype,
        "sm": sm,
        "verdict": " ".join(verdict.split())[:300],
        "worst": None if worst is None else round(worst, 4),
        "races": {f"{kernel}: {race}": times for (kernel, race), times in device.races.items()},
        "kernels": sorted({(ran.kernel, ran.tile) for ran in device.ran}),
        "instructions": sum(ran.instructions for ran in device.ran),
        "seconds": round(time.monotonic() - began, 1),
    }


def _prove(place: tuple[int, int]) -> dict[str, Any]:
    return prove(list(problems())[place[0]], place[1])


def _holds(row: dict[str, Any] | None, state: str) -> bool:
    return row is not None and row["sources"] == state and row["verdict"] == "right"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["problem"], row["dtype"], row["sm"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


# ---- the table


def table(rows: list[dict[str, Any]]) -> str:
    """Kernels and tiles against architectures: how many problems ran, and what was not right."""
    columns = [(sm, dtype) for sm in ARCHITECTURES for dtype in DTYPES if sm < 120 or dtype == "bf16"]
    found: dict[tuple[str, str], dict[tuple[int, str], list[str]]] = {}
    for row in rows:
        for kernel, tile in row["kernels"]:
            found.setdefault((kernel, tile), {}).setdefault((row["sm"], row["dtype"]), []).append(row["verdict"])
    right = sum(row["verdict"] == "right" for row in rows)
    lines = [
        "# The kernels' machine code on a CPU",
        "",
        f"Problems whose result is right, without a race, an access out of bounds or memory that nobody wrote: "
        f"{right} of {len(rows)}. Made by `python tests/ptx/prove.py`; what ran is the PTX that Triton {version()} "
        "compiles for the architecture, in the emulator of `tests/ptx`, against float64. A cell is the number of "
        "problems in which the kernel ran with the tile.",
        "",
        "| kernel | tile | " + " | ".join(f"sm_{sm} {dtype}" for sm, dtype in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for (kernel, tile), cells in sorted(found.items()):
        texts = []
        for column in columns:
            verdicts = cells.get(column, [])
            bad = sum(verdict != "right" for verdict in verdicts)
            texts.append(f"{len(verdicts) - bad} of {len(verdicts)}" if bad else str(len(verdicts) or ""))
        lines.append(f"| {kernel} | {tile} | " + " | ".join(texts) + " |")
    wrong = [row for row in rows if row["verdict"] != "right"]
    lines += ["", "## Not right", ""] if wrong else []
    lines += [
        f"- {row['problem']} {row['dtype']} sm_{row['sm']}: {row['verdict']} {row['races'] or ''}" for row in wrong
    ]
    return "\n".join(lines) + "\n"


def version() -> str:
    import triton

    return triton.__version__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="problems whose name or dtype contains this")
    parser.add_argument("--quick", action="store_true", help="a few problems")
    parser.add_argument("--check", action="store_true", help="run nothing; fail where a problem is left or not right")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 keeps Triton from compiling: unset it")
    state, every = sources(), list(problems())
    done = {key(row): row for row in read(arguments.rows)}
    todo = [
        (number, sm)
        for sm in arguments.sm
        for number, problem in enumerate(every)
        if arguments.only in f"{problem.name} {problem.dtype}" and (problem.quick or not arguments.quick)
        if sm < 120 or problem.dtype == "bf16"  # it has the tiles and the instructions of sm_80
        if not _holds(done.get((problem.name, problem.dtype, sm)), state)
    ]
    if arguments.check:
        print(f"{len(todo)} problems are left, not right, or were solved with other sources")
        return 1 if todo else 0
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for count, row in enumerate(pool.imap_unordered(_prove, todo), start=1):
            done[key(row)] = {**row, "sources": state}
            write(arguments.rows, [done[name] for name in sorted(done)])
            name = f"sm_{row['sm']} {row['dtype']} {row['problem']}"
            print(f"{count}/{len(todo)} {name}: {row['verdict']} ({row['seconds']} s)", flush=True)
    known = {(problem.name, problem.dtype) for problem in every}
    rows = [row for row in done.values() if (row["problem"], row["dtype"]) in known and row["sources"] == state]
    arguments.rows.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    wrong = [row for row in rows if row["verdict"] != "right"]
    print(f"{len(rows)} rows, {len(wrong)} not right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
