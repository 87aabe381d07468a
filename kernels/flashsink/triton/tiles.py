"""The tile of every attention kernel as data, and the alternatives that a tuning run tries.

An entry holds for head dims up to its number, for an element size and an architecture. No entry has been timed yet:
each is the largest tile tried that compiles there without a spill, with wgmma on sm_90 for two-byte elements
(``bench/results/compile_table.csv``); those for short sequences are smaller. ``make gpu-tune`` proposes better ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from flashsink.triton.launch import Tile

LARGEST_HEAD_DIM = {2: 256, 4: 128}  # by bytes of an element; larger float32 rows spill in the smallest tile
ARCHITECTURES = (80, 90, 100)


def _tile(m: int, n: int, warps: int, stages: int) -> Tile:
    return Tile({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


Entries = list[tuple[int, Tile]]  # (largest head dim, tile)

# kernel -> architecture -> entries for two-byte elements
HALF: dict[str, dict[int, Entries]] = {
    "forward": {
        80: [
            (64, _tile(128, 32, 8, 3)),
            (79, _tile(64, 32, 4, 3)),
            (128, _tile(128, 32, 8, 3)),
            (256, _tile(64, 32, 8, 2)),
        ],
        90: [(64, _tile(128, 128, 8, 3)), (128, _tile(128, 64, 8, 3)), (256, _tile(64, 64, 8, 2))],
        100: [(64, _tile(128, 64, 4, 3)), (128, _tile(128, 64, 8, 3)), (256, _tile(64, 64, 8, 2))],
    },
    "gradient_kv": {
        80: [(64, _tile(32, 128, 8, 2)), (128, _tile(32, 64, 8, 2)), (256, _tile(32, 32, 8, 1))],
        90: [
            *((64, _tile(64, 128, 8, 2)), (128, _tile(32, 128, 8, 2)), (256, _tile(16, 64, 8, 2))),
        ],
        100: [
            *((64, _tile(64, 128, 8, 2)), (127, _tile(32, 64, 8, 2))),
            *((128, _tile(32, 128, 8, 2)), (256, _tile(32, 64, 8, 2))),
        ],
    },
    "gradient_q": {
        80: [(64, _tile(128, 32, 8, 2)), (128, _tile(64, 32, 4, 2)), (256, _tile(64, 32, 8, 1))],
        90: [(64, _tile(128, 128, 8, 2)), (128, _tile(128, 64, 8, 2)), (256, _tile(64, 32, 8, 2))],
        100: [(64, _tile(128, 64, 8, 2)), (128, _tile(128, 64, 8, 2)), (256, _tile(64, 64, 8, 1))],
    },
    "received": {
        80: [(64, _tile(64, 128, 8, 3)), (128, _tile(32, 32, 4, 2)), (256, _tile(32, 64, 8, 2))],
        90: [(64, _tile(64, 128, 8, 3)), (128, _tile(64, 128, 8, 3)), (256, _tile(64, 128, 8, 2))],
        100: [(64, _tile(64, 128, 8, 3)), (128, _tile(64, 64, 8, 3)), (256, _tile(64, 64, 8, 2))],
    },
    "calibrate": {
        80: [(64, _tile(64, 32, 4, 1)), (128, _tile(32, 16, 4, 1)), (256, _tile(32, 16, 8, 1))],
        90: [(64, _tile(64, 32, 4, 1)), (128, _tile(64, 32, 4, 1)), (256, _tile(32, 32, 8, 1))],
        100: [(64, _tile(64, 32, 4, 1)), (128, _tile(64, 32, 4, 1)), (256, _tile(64, 32, 8, 1))],
    },
    "by_segment": {
        80: [(128, _tile(32, 64, 4, 2)), (256, _tile(16, 64, 4, 2))],
        # 64 keys go to wgmma, and Triton 3.6 writes a part of P after the fence before it
        **dict.fromkeys((90, 100), [(256, _tile(16, 32, 4, 2))]),
    },
}

# Instead of these where the heads of a group are no power of two: dividing by their number takes registers.
ODD_GROUP: dict[tuple[str, int], Entries] = {
    ("forward", 80): [(64, _tile(128, 32, 8, 3)), (128, _tile(64, 32, 4, 3))],
    ("gradient_q", 100): [(64, _tile(128, 64, 8, 2)), (128, _tile(64, 64, 8, 2))],
}

# Under a pattern or a cap, and under a mask, whose bytes are addressed one by one; any number of heads in a group.
PATTERNED: dict[str, dict[int, Entries]] = {
    "forward": {
        80: [(128, _tile(64, 32, 8, 2)), (256, _tile(32, 32, 4, 2))],
        90: [(128, _tile(128, 64, 8, 2)), (256, _tile(64, 64, 8, 2))],
        100: [(128, _tile(64, 32, 8, 2)), (256, _tile(32, 32, 4, 2))],
    },
    "gradient_kv": {
        80: [(64, _tile(32, 32, 8, 2)), (256, _tile(32, 32, 8, 1))],
        90: [(128, _tile(32, 64, 8, 2)), (256, _tile(16, 64, 8, 3))],
        100: [(128, _tile(32, 64, 8, 2)), (256, _tile(32, 32, 8, 1))],
    },
    "gradient_q": {
        80: [(128, _tile(64, 32, 8, 2)), (256, _tile(32, 32, 4, 1))],
        90: [(128, _tile(64, 32, 8, 2)), (256, _tile(64, 16, 8, 2))],
        100: [(256, _tile(32, 32, 4, 1))],  # 64 rows go to tensor memory, and Triton 3.6 reads it before its wait
    },
    "received": {
        80: [(64, _tile(32, 64, 8, 2)), (128, _tile(16, 32, 4, 1)), (256, _tile(16, 32, 8, 2))],
        **dict.fromkeys((90, 100), [(256, _tile(32, 64, 8, 2))]),
    },
    "calibrate": dict.fromkeys(ARCHITECTURES, [(256, _tile(32, 16, 8, 1))]),
    "by_segment": dict.fromkeys(ARCHITECTURES, [(256, _tile(16, 32, 4, 2))]),
}
MASKED = PATTERNED | {"forward": dict.fromkeys(ARCHITECTURES, [(128, _tile(64, 32, 8, 2)), (256, _tile(32, 32, 4, 2))])}
# Instead of these for sequences of SHORT_LENGTH tokens or fewer on average: more CTAs on an SM, and less of a tile
# beyond the ends of its sequence. Chosen by counts and a model (bench/README.md); not timed either.
SHORT_LENGTH = 256
SHORT: dict[tuple[str, int], Entries] = {
    ("forward", 90): [(64, _tile(64, 64, 4, 3)), (128, _tile(64, 64, 4, 2))],
    ("gradient_kv", 90): [(64, _tile(32, 64, 4, 2)), (128, _tile(16, 64, 4, 2))],
    ("gradient_q", 90): [(64, _tile(64, 64, 4, 2)), (128, _tile(64, 32, 4, 2))],
    ("received", 90): [(64, _tile(64, 64, 4, 3)), (128, _tile(64, 64, 4, 3))],
}

# float32, the same everywhere (device.precision says how it is multiplied)
SINGLE: Entries = [(64, _tile(32, 32, 8, 1)), (128, _tile(16, 16, 4, 1))]
SINGLE_FORWARD: Entries = [(64, _tile(16, 32, 4, 1)), (128, _tile(16, 16, 4, 1))]
SINGLE_GRADIENT_Q: Entries = [(64, _tile(32, 32, 8, 1)), (128, _tile(16, 16, 8, 1))]
SINGLE_GRADIENT_KV: Entries = [(64, _tile(16, 32, 8, 1)), (128, _tile(16, 16, 8, 1))]  # under a pattern or mask

# What make gpu-tune tries, for two-byte elements.
CANDIDATES: dict[str, list[Tile]] = {
    "forward": [_tile(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)],
    "gradient_kv": [_tile(m, n, w, s) for m in (32, 64, 128) for n in (64, 128) for w in (4, 8) for s in (1, 2, 3)],
    "gradient_q": [_tile(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (1, 2, 3)],
    "received": [_tile(m, n, w, s) for m in (64, 128) for n in (64, 128) for w in (4, 8) for s in (2, 3, 4)],
}

_overrides: dict[str, Tile] = {}
_target: list[int] = []


def widest(q: torch.Tensor, v: torch.Tensor) -> int:
    """The head dim whose tile serves q and v (B, heads, tokens, head dim)."""
    return max(q.shape[3], v.shape[3])


def choose(
    kernel: str, head_dim: int, element_size: int, device: torch.device, group: int, length: int, seen: str = "causal"
) -> Tile:
    """The tile that ``kernel`` is launched with on ``device``, for ``group`` query heads to a key head and sequences of
    ``length`` tokens on average; ``seen`` is what :func:`flashsink.triton.patterns.kind` says."""
    if kernel in _overrides:
        return _overrides[kernel]
    if element_size == 4:
        own = {"forward": SINGLE_FORWARD, "gradient_q": SINGLE_GRADIENT_Q}
        entries = own.get(kernel, SINGLE_GRADIENT_KV if kernel == "gradient_kv" and seen != "causal" else SINGLE)
    else:
        name = architecture(device)
        if seen == "causal":
            odd = ODD_GROUP.get((kernel, name), []) if group & (group - 1) else []
            short = SHORT.get((kernel, name), []) if length <= SHORT_LENGTH else []
            entries = short + odd + HALF[kernel][name]
        else:
            entries = {"patterned": PATTERNED, "masked": MASKED}[seen][kernel][name]
    return next(tile for largest, tile in entries if head_dim <= largest)


def architecture(device: torch.device) -> int:
    """80, 90 or 100: whose tiles ``device`` gets. Without a GPU those of :func:`target`, else of 90."""
    capability = _target[-1] if _target else _capability_of(device.index or 0) if device.type == "cuda" else 90
    # others (consumer GPUs: 86, 89, 120) have mma.sync and 99 KB of shared memory a block, in which the tiles of 80 fit
    return {9: 90, 10: 100}.get(capability // 10, 80)


@functools.cache
def _capability_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@contextlib.contextmanager
def target(capability: int) -> Iterator[None]:
    """Chooses the tiles of sm_``capability`` inside, whatever the device; for compiling ahead of time."""
    _target.append(capability)
    try:
        yield
    finally:
        _target.pop()


@contextlib.contextmanager
def override(kernel: str, tile: Tile) -> Iterator[None]:
    """Launches ``kernel`` with ``tile`` inside; for tuning and tests."""
    before = _overrides.get(kernel)
    _overrides[kernel] = tile
    try:
        yield
    finally:
        del _overrides[kernel]
        if before is not None:
            _overrides[kernel] = before
