"""A rehearsal of the GPU set: all of it on a CPU, the kernels in Triton's interpreter, with tiny shapes. It shows that
everything runs; its times say nothing. ``BENCH_REHEARSAL=1`` tells it to child processes."""

from __future__ import annotations

import os

ON = os.environ.get("BENCH_REHEARSAL") == "1"
# compiled peers run eagerly: what they cost to compile is most of the time
ENVIRONMENT = {
    "BENCH_REHEARSAL": "1",
    "TRITON_INTERPRET": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def cut(number: int, most: int) -> int:
    """``number``, in a rehearsal at most ``most``."""
    return min(number, most) if ON else number


def prefer_triton() -> None:
    """In a rehearsal ``backend=None`` takes the kernels that it takes on a GPU."""
    from flashsink import dispatch

    if ON:
        dispatch._PREFERRED["cpu"] = dispatch._PREFERRED["cuda"]
