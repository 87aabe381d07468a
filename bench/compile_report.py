"""Compiles every kernel that the launchers would start, on a machine without a GPU.

``python -m bench.compile_report`` prints the table and writes ``bench/results/compile_table.csv``; ``--check`` fails if
the table differs from the committed one, or if a kernel spills registers, exceeds the device's shared memory, or does
not use the matrix instructions of Hopper.

The launchers run on small CPU tensors under an observer that suppresses every launch, once per architecture, since each
has its own tiles; Triton's binder turns the arguments into the signature that the launch would have on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("results") / "compile_table.csv"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
FIELDS = ["case", "kernel", "variant", "tile", "sm", "registers", "spills", "shared", "wgmma", "mma", "tcgen05"]
# bytes that one block may use
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

Row = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A call that starts kernels.

    Attributes:
        name: what is computed, with head dim and dtype.
        call: calls launchers on small CPU tensors.
        wgmma: kernels that must use Hopper's matrix instructions.
        capabilities: what it is compiled for.
    """

    name: str
    call: Callable[[], object]
    wgmma: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = CAPABILITIES


@dataclass(frozen=True)
class Job:
    """One kernel to compile, picklable."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], Any], ...]
    options: tuple[tuple[str, int], ...]
    capability: int


@dataclass(frozen=True)
class Entry:
    """A job and the columns that identify it in the table."""

    case: str
    variant: str
    tile: str
    wgmma: bool
    job: Job


def collect(cases: Iterable[Case]) -> list[Entry]:
    """Runs every case without running its kernels; equal launches of a case are one entry.

    Raises:
        RuntimeError: a case launches nothing.
    """
    from flashsink.triton import tiles
    from flashsink.triton.launch import Launch, observe

    entries: dict[Entry, None] = {}
    for case in cases:
        for capability in case.capabilities:
            launches: list[Launch] = []

            def record(launch: Launch, launches: list[Launch] = launches) -> bool:
                launches.append(launch)
                return False

            with tiles.target(capability), observe(record):
                case.call()
            if not launches:
                raise RuntimeError(f"case {case.name}: no kernel was launched")
            for launch in launches:
                entries[_entry(case, launch, capability)] = None
    return list(entries)


def job_of(launch: Any, capability: int) -> Job:
    """What ``launch`` would compile."""
    signature, constants, attributes = specialise(launch, capability)
    return Job(
        launch.kernel.fn.__module__,
        launch.kernel.fn.__qualname__,
        tuple((name, kind) for name, kind in signature.items()),
        tuple(sorted(constants.items(), key=lambda item: item[0])),
        tuple((path, tuple(map(tuple, value))) for path, value in attributes.items()),
        (("num_warps", launch.tile.warps), ("num_stages", launch.tile.stages)),
        capability,
    )


def _entry(case: Case, launch: Any, capability: int) -> Entry:
    tile, job = launch.tile, job_of(launch, capability)
    # flags and head dims distinguish launches of one kernel in one case
    flags = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    variant = " ".join(f"{name}={value}" for name, value in launch.arguments.items() if name in flags)
    blocks = " ".join(f"{name}={size}" for name, size in tile.blocks.items())
    label = f"{blocks} warps={tile.warps} stages={tile.stages}".strip()
    return Entry(case.name, variant, label, job.kernel in case.wgmma, job)


def specialise(launch: Any, capability: int) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """(signature, constants, attributes) as ``kernel[grid](...)`` would derive them: integers equal to 1 become
    constants; pointers and integers divisible by 16 get an attribute."""
    from triton.runtime.jit import create_function_from_signature

    backend, kernel, tile = _backend(capability), launch.kernel, launch.tile
    keywords = {**launch.arguments, **tile.blocks, "num_warps": tile.warps, "num_stages": tile.stages}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**keywords)
    _, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return signature, constants, attributes


@functools.cache
def _backend(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    return make_backend(GPUTarget("cuda", capability, 32))


def made_from(job: Job) -> Any:
    """Triton's compiled kernel: its code in all stages under ``asm``, and ``metadata``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    attributes = {path: [list(pair) for pair in value] for path, value in job.attributes}
    source = ASTSource(kernel, dict(job.signature), dict(job.constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=dict(job.options))


def compile_job(job: Job) -> Row:
    """Compiles one kernel and reads its numbers: a row without case, variant and tile."""
    import triton

    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        made = made_from(job)
    text = made.asm["ptx"]
    registers, spills = read_log(ptxas_log(text, job.capability, printed.getvalue()))
    return {
        "kernel": job.kernel,
        "sm": str(job.capability),
        "registers": str(registers),
        "spills": str(spills),
        "shared": str(made.metadata.shared),
        "wgmma": str(text.count("wgmma.mma_async")),
        "mma": str(len(re.findall(r"\bmma\.sync", text))),
        "tcgen05": str(len(re.findall(r"tcgen05\.mma", text))),
    }


def ptxas_log(ptx: str, capability: int, printed: str) -> str:
    """The output of ``ptxas -v``. Triton prints it only when it compiles, not on a cache hit, so a copy is kept next to
    its cache."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    arch = sm_arch_from_capability(capability)
    kept = Path(triton.knobs.cache.dir, "ptxas", hashlib.sha256(f"{arch}{ptx}".encode()).hexdigest())
    if "registers" in printed:
        log = printed
    elif kept.exists():
        return kept.read_text(encoding="utf-8")
    else:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.ptx")
            source.write_text(ptx, encoding="utf-8")
            command = [get_ptxas(capability).path, "-lineinfo", "-v", f"--gpu-name={arch}", str(source)]
            done = subprocess.run([*command, "-o", f"{source}.o"], capture_output=True, text=True, check=True)
        log = done.stderr
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")  # another process may be writing the same file
    part.write_text(log, encoding="utf-8")
    part.replace(kept)
    return log


def read_log(log: str) -> tuple[int, int]:
    """(registers, bytes of spills) from the output of ``ptxas -v``.

    Raises:
        ValueError: they are missing.
    """
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    if not registers or not spills:
        raise ValueError(f"ptxas: expected lines with registers and spills, got {log!r}")
    return max(registers), sum(spills)


def measure(entries: Sequence[Entry], processes: int) -> tuple[list[Row], list[str]]:
    """(the table, its faults). Equal jobs are compiled once; one that does not compile is a fault."""
    jobs = list(dict.fromkeys(entry.job for entry in entries))
    if processes > 1 and len(jobs) > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            made = pool.map(compiled, jobs, chunksize=1)
    else:
        made = [compiled(job) for job in jobs]
    found = dict(zip(jobs, made, strict=True))
    rows, faults = [], []
    for entry in entries:
        result = found[entry.job]
        place = f"{entry.case} {entry.job.kernel} [{entry.variant}] [{entry.tile}] sm_{entry.job.capability}"
        if isinstance(result, str):
            faults.append(f"{place}: does not compile: {result}")
            continue
        rows.append({"case": entry.case, "variant": entry.variant, "tile": entry.tile, **result})
        faults += [f"{place}: {fault}" for fault in faults_of(result, entry.wgmma)]
    unique = {tuple(row[field] for field in FIELDS): row for row in rows}
    return sorted(unique.values(), key=_order), faults


def _order(row: Row) -> tuple[Any, ...]:
    return tuple(int(row[field]) if row[field].isdigit() else row[field] for field in FIELDS[:5]) + tuple(row.values())


def compiled(job: Job) -> Row | str:
    """The numbers of one kernel, or why it does not compile."""
    try:
        return compile_job(job)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def faults_of(row: Row, wgmma: bool) -> list[str]:
    """Why a row's kernel must not be shipped."""
    faults, capability = [], int(row["sm"])
    if int(row["spills"]):
        faults.append(f"spills {row['spills']} bytes")
    if int(row["shared"]) > SHARED[capability]:
        faults.append(f"takes {row['shared']} bytes of shared memory, the device has {SHARED[capability]}")
    if wgmma and capability == 90 and not int(row["wgmma"]):
        faults.append("a matrix kernel without wgmma")
    return faults


def differences(rows: Sequence[Row], path: Path) -> list[str]:
    """Lines that only the table at ``path`` or only ``rows`` have."""
    before = set(path.read_text(encoding="utf-8").splitlines()[1:]) if path.exists() else set()
    now = set(as_csv(rows).splitlines()[1:])
    return [f"no longer true: {x}" for x in sorted(before - now)] + [f"new: {x}" for x in sorted(now - before)]


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a fault or a difference")
    parser.add_argument("--cases", default="bench.compile_cases", help="module with a function cases()")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--only", default="", help="cases whose name contains this; writes no table")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="only every N-th configuration; writes no table"
    )
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 keeps Triton from compiling: unset it")
    began = time.monotonic()
    cases = importlib.import_module(arguments.cases).cases()
    entries = collect(case for case in cases if arguments.only in case.name)[:: arguments.every]
    rows, faults = measure(entries, arguments.processes)
    print(as_csv(rows))
    whole = not arguments.only and arguments.every == 1
    if arguments.check:
        faults += [x for x in differences(rows, arguments.table) if whole or x.startswith("new")]
    elif whole:
        arguments.table.write_text(as_csv(rows), encoding="utf-8")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(rows)} rows, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
