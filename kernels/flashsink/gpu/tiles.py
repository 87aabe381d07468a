"""The tile of every kernel as data, and the alternatives that a tuning run tries.

An entry holds for head dims up to its number and for its element size. No entry has been timed yet: each is the
first of its candidates that compiles for sm_80, sm_90 and sm_100 without a spill, with wgmma on sm_90 and within
shared memory (``bench/compile_table.csv``), larger tiles first. ``make gpu-tune`` proposes better ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flashsink.gpu.launch import Tile

LARGEST_HEAD_DIM = 256


def _tile(m: int, n: int, warps: int, stages: int) -> Tile:
    return Tile({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


# kernel -> bytes of an element -> (largest head dim, tile)
TABLE: dict[str, dict[int, list[tuple[int, Tile]]]] = {
    "forward": {
        2: [(64, _tile(128, 64, 4, 3)), (128, _tile(128, 64, 8, 3)), (256, _tile(128, 64, 8, 2))],
        4: [(64, _tile(64, 32, 4, 2)), (128, _tile(32, 32, 4, 2)), (256, _tile(32, 16, 8, 1))],
    },
    "gradient_kv": {
        2: [(64, _tile(64, 128, 8, 2)), (128, _tile(64, 128, 8, 2)), (256, _tile(32, 64, 8, 1))],
        4: [(64, _tile(32, 32, 4, 1)), (128, _tile(32, 32, 8, 1)), (256, _tile(16, 16, 8, 1))],
    },
    "gradient_q": {
        2: [(64, _tile(128, 64, 8, 2)), (128, _tile(128, 64, 8, 2)), (256, _tile(64, 32, 8, 1))],
        4: [(64, _tile(32, 32, 4, 1)), (128, _tile(32, 32, 8, 1)), (256, _tile(16, 16, 8, 1))],
    },
    "received": {
        2: [(64, _tile(64, 128, 8, 3)), (128, _tile(64, 128, 8, 2)), (256, _tile(64, 64, 8, 2))],
        4: [(64, _tile(32, 32, 4, 2)), (128, _tile(32, 32, 4, 2)), (256, _tile(16, 32, 8, 1))],
    },
    "calibrate": {
        2: [(64, _tile(64, 32, 4, 1)), (128, _tile(64, 32, 4, 1)), (256, _tile(64, 32, 8, 1))],
        4: [(64, _tile(32, 16, 4, 1)), (128, _tile(32, 16, 4, 1)), (256, _tile(32, 16, 8, 1))],
    },
}

# What make gpu-tune tries, for two-byte elements.
CANDIDATES: dict[str, list[Tile]] = {
    "forward": [_tile(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)],
    "gradient_kv": [_tile(m, n, w, s) for m in (32, 64, 128) for n in (64, 128) for w in (4, 8) for s in (1, 2, 3)],
    "gradient_q": [_tile(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (1, 2, 3)],
    "received": [_tile(m, n, w, s) for m in (64, 128) for n in (64, 128) for w in (4, 8) for s in (2, 3, 4)],
}

_overrides: dict[str, Tile] = {}


def choose(kernel: str, head_dim: int, element_size: int) -> Tile:
    """The tile that ``kernel`` is launched with."""
    if kernel in _overrides:
        return _overrides[kernel]
    return next(tile for largest, tile in TABLE[kernel][element_size] if head_dim <= largest)


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
