"""Kernels for the tests of the compile report: sound ones, and ones with a planted fault."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from bench.compile_report import Case
from flashsink.triton.launch import Tile, launch


@triton.jit
def scale_kernel(x, y, factor, size, stride, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at * stride, mask=at < size, other=0.0) * factor
    if DOUBLE:
        value = value * 2
    tl.store(y + at, value, mask=at < size)


@triton.jit
def pointers_kernel(xs, y, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(COUNT):
        total += tl.load(xs[i] + at).to(tl.float32)
    tl.store(y + at, total)


@triton.jit
def product_kernel(a, b, c, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], dtype=tl.float32)
    for i in range(steps):
        left = tl.load(a + rows[:, None] * steps * K + i * K + inner[None, :])
        right = tl.load(b + (i * K + inner[:, None]) * N + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


def scale(stride=1, double=False):
    x = torch.zeros(4096, dtype=torch.bfloat16)
    tile = Tile({"BLOCK": 1024}, warps=4, stages=1)
    launch(scale_kernel, (4,), tile, x=x, y=x.float(), factor=0.5, size=4096, stride=stride, DOUBLE=double)


def pointers():
    xs = tuple(torch.zeros(128, dtype=torch.bfloat16) for _ in range(3))
    launch(pointers_kernel, (1,), Tile({"BLOCK": 128}, 4, 1), xs=xs, y=xs[0].float(), COUNT=3)


def product(m, n, k, warps, stages, dtype=torch.bfloat16):
    a, b = torch.zeros(m, k * 4, dtype=dtype), torch.zeros(k * 4, n, dtype=dtype)
    tile = Tile({"M": m, "N": n, "K": k}, warps, stages)
    launch(product_kernel, (1,), tile, a=a, b=b, c=torch.zeros(m, n), steps=4)


def cases():
    sound = [
        Case("scale", scale),
        Case("scale doubled", lambda: scale(double=True)),
        Case("scale strided", lambda: scale(stride=3)),
        Case("pointers", pointers),
        Case("product", lambda: product(64, 64, 64, 4, 2), ("product_kernel",)),
    ]
    faults = [
        Case("spill", lambda: product(256, 256, 32, 4, 2), capabilities=(90,)),
        Case("shared", lambda: product(128, 128, 128, 8, 8), capabilities=(90,)),
        Case("wgmma", lambda: product(32, 32, 32, 4, 2), ("product_kernel",), capabilities=(90,)),
    ]
    return {"sound": sound, "faults": faults}[os.environ["PLANTED"]]
