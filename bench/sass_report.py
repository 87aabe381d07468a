"""What a GPU would execute, counted without one: the machine code of the kernels that a decoder layer starts, by loop.

``python -m bench.sass_report LABEL`` compiles them for sm_90 with the tiles of the table and writes a row a loop to
``bench/results/sass.csv``, instead of older rows of that label: instructions a thread, barriers, copies to shared
memory (those of 4 bytes apart), registers, and how many CTAs fit on an SM. ``--page BEFORE AFTER`` writes the table of
two labels into ``bench/README.md``. Counts are exact, speeds are not in them.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("results") / "sass.csv"
PAGE = Path(__file__).with_name("README.md")
CAPABILITY = 90
COUNTS = ("instructions", "products", "exponentials", "barriers", "copies", "narrow", "loads")
FIELDS = ["label", "case", "kernel", "tile", "launches", "loop", *COUNTS, "registers", "spills", "shared", "ctas"]
# the loops with products, in the order of the source
NAMES = {
    "forward_kernel": ("whole", "masked"),
    "gradient_q_kernel": ("whole", "masked"),
    "gradient_kv_kernel": ("masked", "whole"),
    "received_kernel": ("masked", "whole"),
}

Row = dict[str, str]


# ---- machine code


@dataclass(frozen=True)
class Instruction:
    """One line of ``cuobjdump -sass``: its address, opcode with modifiers, and where it branches, if it does."""

    address: int
    opcode: str
    target: int | None


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin with one kernel, by Triton's own ``cuobjdump``."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    """Instructions out of the text of a disassembly.

    Raises:
        ValueError: there are none.
    """
    found = []
    for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", text):
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line)
        found.append(Instruction(int(address, 16), line.split()[0], None if target is None else int(target[1], 16)))
    if not found:
        raise ValueError(f"disassembly: expected instructions, got {text[:200]!r}")
    return found


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost loops in order: what lies between a branch backward and where it leads, without another such."""
    spans: dict[int, int] = {}
    for one in code:
        if one.target is not None and one.target < one.address:
            spans[one.target] = max(spans.get(one.target, 0), one.address)
    inner = [
        (low, high)
        for low, high in sorted(spans.items())
        if not any((low, high) != other and low <= other[0] and other[1] <= high for other in spans.items())
    ]
    return [[one for one in code if low <= one.address <= high] for low, high in inner]


def counts(code: Sequence[Instruction]) -> dict[str, int]:
    """The columns of a piece of code."""
    opcodes = Counter(one.opcode for one in code if one.opcode != "NOP")

    def of(pattern: str) -> int:
        return sum(times for opcode, times in opcodes.items() if re.match(pattern, opcode))

    return {
        "instructions": sum(opcodes.values()),
        "products": of(r"(HGMMA|HMMA)"),
        "exponentials": of(r"MUFU\.EX2"),
        "barriers": of(r"BAR\."),
        "copies": of(r"LDGSTS"),
        "narrow": of(r"LDGSTS") - of(r"LDGSTS.*\.(64|128)\b"),
        "loads": of(r"LDG\b"),
    }


def pieces(kernel: str, code: Sequence[Instruction]) -> dict[str, dict[str, int]]:
    """Columns by loop; "outside" is what is executed once, and short loops there."""
    every = loops(code)
    main = [loop for loop in every if counts(loop)["products"]] or sorted(every, key=len)[-1:]
    names = NAMES.get(kernel, ("token",))
    if len(names) != len(main):
        names = tuple(f"loop {i}" for i in range(len(main)))
    inside = {one.address for loop in main for one in loop}
    found = {name: counts(loop) for name, loop in zip(names, main, strict=True)}
    return found | {"outside": counts([one for one in code if one.address not in inside])}


def ctas(registers: int, warps: int, shared: int) -> int:
    """How many CTAs an SM of compute capability 9.0 holds: registers go to warps in units of 256, a quarter of the
    65,536 to each scheduler, and a CTA takes 1 KiB of the 228 KiB of shared memory by itself."""
    a_warp = -(-registers * 32 // 256) * 256
    return min(16384 // a_warp * 4 // warps, 228 * 1024 // (shared + 1024), 64 // warps, 32)


# ---- rows


@functools.cache
def read(job: Any) -> tuple[list[Instruction], int, int, int]:
    """(instructions, registers, bytes of spills, bytes of shared memory) of a kernel."""
    from bench.compile_report import compile_job, made_from

    row = compile_job(job)
    code = disassemble(made_from(job).asm["cubin"])
    return code, int(row["registers"]), int(row["spills"]), int(row["shared"])


def rows(label: str, only: str = "") -> Iterator[Row]:
    from bench.compile_report import job_of
    from bench.sass_cases import cases
    from flashsink.triton import tiles
    from flashsink.triton.launch import Launch, observe

    for case in cases():
        if only not in case.name:
            continue
        launches: list[Launch] = []

        def record(launch: Launch, launches: list[Launch] = launches) -> bool:
            launches.append(launch)
            return False

        with tiles.target(CAPABILITY), observe(record):
            case.call()
        times = Counter(launch.kernel for launch in launches)
        for kernel in times:
            launch = next(one for one in launches if one.kernel is kernel)
            job, tile = job_of(launch, CAPABILITY), launch.tile
            code, registers, spills, shared = read(job)
            blocks = " ".join(f"{name}={size}" for name, size in tile.blocks.items())
            for loop, found in pieces(job.kernel, code).items():
                yield {
                    "label": label, "case": case.name, "kernel": job.kernel, "launches": str(times[kernel]),
                    "tile": f"{blocks} warps={tile.warps} stages={tile.stages}", "loop": loop,
                    **{name: str(number) for name, number in found.items()},
                    "registers": str(registers), "spills": str(spills), "shared": str(shared),
                    "ctas": str(ctas(registers, tile.warps, shared)),
                }  # fmt: skip


def committed() -> list[Row]:
    if not TABLE.exists():
        return []
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(found: Sequence[Row]) -> None:
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


# ---- the page


def table(found: Sequence[Row], before: str, after: str) -> str:
    """Two labels side by side, a line a kernel of a packed case: instructions of every loop, and what limits
    occupancy."""
    found = [row for row in found if "packed" in row["case"]]
    of = {label: _kernels([row for row in found if row["label"] == label]) for label in (before, after)}
    lines = [
        "| case | kernel | tile | instructions an iteration, outside | barriers | 4-byte copies | registers | CTAs |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for key in dict.fromkeys([*of[before], *of[after]]):
        pair = [of[label].get(key) for label in (before, after)]
        cells = [" -> ".join(dict.fromkeys(_cell(one, i) for one in pair)) for i in range(6)]
        lines.append(f"| {key[0]} | {key[1].removesuffix('_kernel')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kernels(found: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    kernels: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        kernels.setdefault((row["case"], row["kernel"]), []).append(row)
    return kernels


def _cell(one: list[Row] | None, column: int) -> str:
    if one is None:
        return "none"
    first = one[0]
    return (
        re.sub(r"\w+=(\d+) ?(?=\w+=\d+ ?)?", r"\1 ", first["tile"]).strip().replace(" ", "·"),
        ", ".join(f"{row['loop']} {row['instructions']}" for row in one),
        ", ".join(row["barriers"] for row in one),
        str(sum(int(row["narrow"]) for row in one)),
        first["registers"],
        first["ctas"],
    )[column]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("label", nargs="?", help="name of the rows, such as before or after")
    parser.add_argument("--only", default="", help="cases whose name contains this; prints, writes nothing")
    parser.add_argument("--page", nargs=2, metavar=("BEFORE", "AFTER"), help="write the table of two labels")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 keeps Triton from compiling: unset it")
    if arguments.label:
        found = list(rows(arguments.label, arguments.only))
        csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n").writerows(found)
        if not arguments.only:
            write([row for row in committed() if row["label"] != arguments.label] + found)
    if arguments.page:
        from bench.sass_model import table as model

        text = f"{table(committed(), *arguments.page)}\n\n{model(committed(), arguments.page)}\n"
        page = PAGE.read_text(encoding="utf-8")
        page = re.sub(r"(<!-- sass: .*? -->\n).*?(<!-- sass end -->)", rf"\g<1>{text}\g<2>", page, flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
