"""Kernels of a few instructions, for the tests of the emulator itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from emulator import Kernel

BYTES = {"b16": 2, "b32": 4, "b64": 8, "pred": 4}
PREFIX = {"b16": "%h", "b32": "%r", "b64": "%d", "pred": "%p"}


def text(body: str, parameters: int = 4) -> str:
    """A kernel with ``body``: %d0 and so on hold its parameters, %r0 the thread."""
    names = ", ".join(f".param .u64 .ptr .global .align 1 p{n}" for n in range(parameters))
    loads = "\n".join(f"ld.param.b64 %d{n}, [p{n}];" for n in range(parameters))
    return f"""
.visible .entry kernel({names}) .reqntid 128
{{
    .reg .pred %p<16>;
    .reg .b16 %h<64>;
    .reg .b32 %r<512>;
    .reg .b64 %d<64>;
    {loads}
    mov.u32 %r0, %tid.x;
    {body}
    ret;
}}
"""


def run(body: str, *tensors: torch.Tensor, threads: int = 128, shared: int = 1 << 16) -> Counter[str]:
    """Runs one CTA; the races."""
    return Kernel(text(body, len(tensors))).run((1,), threads, shared, list(tensors))[0]


def raw(array: np.ndarray) -> torch.Tensor:
    """The bytes of ``array`` as a tensor that shares them."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def apply(operation: str, result: str, kinds: list[str], arrays: list[np.ndarray], extra: str = "") -> np.ndarray:
    """``operation`` on one value a thread: bits of ``result``, a register kind; a predicate is 0 or 1.

    Args:
        operation: "add.s32".
        result: "b32".
        kinds: of the operands; a predicate is an array of 0 and 1 of 32 bits.
        arrays: operands, one value a thread, of the kinds' sizes.
        extra: more operands, as text.
    """
    threads = -(-len(arrays[0]) // 32) * 32
    body, names = "", []
    for n, kind in enumerate(kinds, start=1):
        size = BYTES[kind]
        register = f"%r{100 + n}" if kind == "pred" else f"{PREFIX[kind]}{40 + n}"
        width = "b32" if kind == "pred" else kind
        body += f"mul.wide.u32 %d{20 + n}, %r0, {size}; add.s64 %d{20 + n}, %d{n}, %d{20 + n};\n"
        body += f"ld.global.{width} {register}, [%d{20 + n}];\n"
        if kind == "pred":
            body += f"setp.ne.b32 %p{n}, {register}, 0;\n"
            register = f"%p{n}"
        names.append(register)
    out = f"{PREFIX[result]}15" if result == "pred" else f"{PREFIX[result]}60"
    body += f"{operation} {out}, {', '.join([*names, *filter(None, [extra])])};\n"
    if result == "pred":
        body += "selp.b32 %r60, 1, 0, %p15;\n"
        out = "%r60"
    width = "b32" if result == "pred" else result
    body += f"mul.wide.u32 %d30, %r0, {BYTES[result]}; add.s64 %d30, %d0, %d30; st.global.{width} [%d30], {out};"
    made = np.zeros(threads, {2: np.uint16, 4: np.uint32, 8: np.uint64}[BYTES[result]])
    padded = []
    for array in arrays:
        wide = np.zeros(threads, array.dtype)
        wide[: len(array)] = array
        padded.append(raw(wide))
    races = run(body, raw(made), *padded, threads=threads)
    assert not races
    return made[: len(arrays[0])]
