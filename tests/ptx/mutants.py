"""Kernels made wrong on purpose, to see that the emulator notices: ``python tests/ptx/mutants.py [SM ...]``.

A mutant is a kernel's PTX with one statement taken out or changed. It is caught if the emulator reports a race or a
fault, or if a result differs from the sound kernel's. Prints one JSON object an architecture: for every kind of change,
how many mutants were caught and how many there were. Not every change does harm: another barrier
or wait may follow, or the code may not run here. Which of those that are left do none was not looked into.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = map(str, (HERE, ROOT / "kernels", ROOT))

import torch  # noqa: E402
from emulated import Device, values_of  # noqa: E402
from emulator import Fault, Kernel  # noqa: E402

import flashsink  # noqa: E402
from bench.compile_report import job_of, made_from  # noqa: E402

REGISTERS = r"\{\s*(%r\d+),\s*(%r\d+),([^}]*)\}"
# kind -> pattern of a statement, and what stands in its place
CHANGES: dict[str, tuple[str, str | Callable[[re.Match[str]], str]]] = {
    "no barrier": (r"bar\.sync\s+0;", ""),
    "no wait for copies": (r"cp\.async\.wait_group\s+\d+;", ""),
    "no wait for products": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "no fence of registers": (r"wgmma\.fence\.sync\.aligned;", ""),
    "no fence between proxies": (r"fence\.proxy\.async\.shared::cta;", ""),
    "no wait for products in tensor memory": (r"@!complete bra\.uni waitLoop;", ""),
    "no wait for loads of tensor memory": (r"tcgen05\.wait::ld\S+;", ""),
    "no wait for stores to tensor memory": (r"tcgen05\.wait::st\S+;", ""),
    "no mbarrier": (r"@%p\d+ mbarrier\.init\S+ \[%r\d+\], 1;", ""),
    "no atomic": (r"atom\.\S+ (%r\d+), (\[.*?\]), (%r\d+);", r"st.global.b32 \2, \3;"),
    "no mask": (
        r"selp\.f32\s+(%r\d+), (?:0f(?:FF800000|00000000), (%r\d+), %p\d+|(%r\d+), (?:0f(?:FF800000|00000000), %p\d+|"
        r"[^,]+, p));",
        lambda m: f"mov.b32 {m[1]}, {m[2] or m[3]};",
    ),
    "accumulators exchanged": (rf"(mma\.sync\S+|wgmma\.mma_async\S+)\s+{REGISTERS}", r"\1 {\3, \2,\4}"),
    "fragment exchanged": (rf"(m(?:ma\.sync|ma_async\.sync)\S+\s+\{{[^}}]*\}},\s*){REGISTERS}", r"\1{\3, \2,\4}"),
    "another swizzle": (r"(or\.b64\s+%rd\d+, %rd\d+, )(461\d{16});", lambda m: f"{m[1]}{int(m[2]) ^ 6 << 61};"),
    "another stride": (r"(or\.b64\s+%rd\d+, %rd\d+, )(461\d{16});", lambda m: f"{m[1]}{int(m[2]) ^ 1 << 34};"),
    "stores without a bound": (r"@%p\d+ (st\.global)", r"\1"),
    "loads without a bound": (r"@%p\d+ (ld\.global)", r"\1"),
}
OUTPUTS = {
    "forward_kernel": ("out", "lse"),
    "gradient_kv_kernel": ("dk", "dv", "received"),
    "gradient_q_kernel": ("dq", "delta"),
}
AT_MOST = 6  # mutants of a kind and kernel, but barriers: all


def launches(sm: int) -> list[Any]:
    """Forward, backward with capture, and the pass, of packed sequences that fill several blocks."""
    seen: list[Any] = []
    device = Device(sm)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 300, 64, generator=g).bfloat16().requires_grad_() for n in (4, 2, 2))
    offsets = torch.tensor([0, 200, 210, 290])
    with device.active():
        from flashsink.triton.launch import observe

        with observe(lambda launch: seen.append(launch) or True):
            options: dict[str, Any] = {"cu_seqlens": offsets, "backend": "triton", "return_stats": True}
            out, _ = flashsink.attention(q, k, v, **options)
            out.backward(torch.randn(out.shape, generator=g).bfloat16())
    return [launch for launch in seen if launch.kernel.__name__ in OUTPUTS]


def mutants(text: str) -> Iterator[tuple[str, str]]:
    for kind, (pattern, instead) in CHANGES.items():
        found = list(re.finditer(pattern, text))
        step = 1 if kind == "no barrier" else -(-len(found) // AT_MOST)
        for match in found[:: max(step, 1)]:
            new = instead(match) if callable(instead) else match.expand(instead)
            yield kind, text[: match.start()] + new + text[match.end() :]


def caught(text: str, launch: Any, job: Any, made: Any, sound: list[torch.Tensor]) -> bool | None:
    """None: it does what is not emulated."""
    outputs = outputs_of(launch)
    for x in outputs:
        x.fill_(float("nan"))
    try:
        races, _ = Kernel(text).run(
            launch.grid, made.metadata.num_warps * 32, made.metadata.shared, values_of(job, launch)
        )
    except Fault as error:
        return None if "not emulated" in str(error) else True
    same = all(torch.allclose(x, y, rtol=1e-3, atol=1e-4, equal_nan=True) for x, y in zip(outputs, sound, strict=True))
    return bool(races) or not same


def outputs_of(launch: Any) -> list[torch.Tensor]:
    return [launch.arguments[name].detach() for name in OUTPUTS[launch.kernel.__name__]]


def main() -> None:
    torch.set_num_threads(1)
    for sm in map(int, sys.argv[1:] or ("80", "90", "100")):
        counts: dict[str, list[int]] = {}
        for launch in launches(sm):
            job = job_of(launch, sm)
            made = made_from(job)
            sound = [x.clone() for x in outputs_of(launch)]
            assert not caught(made.asm["ptx"], launch, job, made, sound)
            for kind, text in mutants(made.asm["ptx"]):
                count, found = counts.setdefault(kind, [0, 0]), caught(text, launch, job, made, sound)
                count[0] += found is True
                count[1] += found is not None
            for x, y in zip(outputs_of(launch), sound, strict=True):
                x.copy_(y)
        print(json.dumps({"sm": sm, "caught": counts}), flush=True)


if __name__ == "__main__":
    main()
