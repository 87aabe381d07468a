"""bfloat16 in small Triton kernels against torch's, bit for bit: compiled, or in the interpreter that tests use."""

from __future__ import annotations

import bf16_interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from flashsink.triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
BF16 = torch.bfloat16
pytestmark = [
    pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy's, of infinities and NaNs
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no interpreter and no GPU"),
]


@triton.jit
def cast(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def arithmetic(x, y, total, difference, product, ratio, orders, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(total + i, a + b)
    tl.store(difference + i, a - b)
    tl.store(product + i, a * b)
    tl.store(ratio + i, a / b)
    order = (a < b).to(tl.int32) + 2 * (a <= b).to(tl.int32) + 4 * (a > b).to(tl.int32)
    order += 8 * (a >= b).to(tl.int32) + 16 * (a == b).to(tl.int32) + 32 * (a != b).to(tl.int32)
    tl.store(orders + i, order)


@triton.jit
def functions(x, y, largest, smallest, powers, chosen, scaled, maximum, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(largest + i, tl.maximum(a, b))
    tl.store(smallest + i, tl.minimum(a, b))
    tl.store(powers + i, tl.exp2(a.to(tl.float32)))
    tl.store(chosen + i, tl.where(a > b, -a, tl.abs(b)))
    tl.store(scaled + i, a * 0.3 + tl.full([BLOCK], 1.7, tl.bfloat16))
    tl.store(maximum, tl.max(a, 0))


@triton.jit
def moved(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Transposed, with a mask: 1 where it is masked, and in every second place the number before it."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tile = tl.load(x + i[:, None] * COLUMNS + j[None, :], mask=(i > 0)[:, None], other=1.0)  # [ROWS, COLUMNS]
    even, _ = tl.split(tl.reshape(tl.trans(tile), [COLUMNS, ROWS // 2, 2]))
    tl.store(out + j[:, None] * ROWS + i[None, :], tl.reshape(tl.join(even, even), [COLUMNS, ROWS]))


@triton.jit
def matmul(x, y, z, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a, b = tl.load(x + m[:, None] * K + k[None, :]), tl.load(y + k[:, None] * N + n[None, :])
    acc = tl.load(z + m[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, b, acc))


@triton.jit
def summed(x, BLOCK: tl.constexpr):
    tl.store(x, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


@triton.jit
def fused(x, BLOCK: tl.constexpr):
    a = tl.load(x + tl.arange(0, BLOCK))
    tl.store(x + tl.arange(0, BLOCK), tl.fma(a, a, a))


@triton.jit
def added(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(x + i, tl.load(x + i))


@triton.jit
def cut_off(x, BLOCK: tl.constexpr):
    a = tl.load(x + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(x + tl.arange(0, BLOCK), a.to(tl.bfloat16, fp_downcast_rounding="rtz"))


def every(dtype=BF16):
    """All 65,536 values of 16 bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def converted(x, dtype):
    out = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    block = min(x.numel(), 4096)
    cast[(x.numel() // block,)](x.to(DEVICE), out, block)
    return out.cpu()


def same(got, want):
    """Bit for bit, -0.0 too; which NaN is left open, since torch itself gives several."""
    got = got.cpu()
    assert got.dtype == want.dtype and torch.equal(got.isnan(), want.isnan())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    wrong = (got.view(bits) != want.view(bits)) & ~want.isnan()
    assert not wrong.any(), (got[wrong][:5], want[wrong][:5])


def test_every_value_widens_exactly_and_comes_back():
    wide = converted(every(), torch.float32)
    assert torch.equal(wide.view(torch.int32), every().view(torch.int16).int() << 16)  # NaNs keep their bits
    same(converted(wide, BF16), every())


@pytest.mark.parametrize("below", [1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_is_rounded_to_nearest_even(below):
    """What lies between any two neighbors: ties, beyond the largest, below the smallest, and NaNs with a payload."""
    x = ((every().view(torch.int16).int() << 16) | below).view(torch.float32)
    same(converted(x, BF16), x.bfloat16())


def test_other_floating_dtypes():
    same(converted(every(), torch.float16), every().half())
    same(converted(every(torch.float16), BF16), every(torch.float16).bfloat16())
    same(converted(every(), torch.float64), every().double())
    x = torch.randn(4096, dtype=torch.float64) * 10.0 ** torch.randint(-45, 42, (4096,))
    same(converted(x, BF16), x.float().bfloat16())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers(dtype):
    limits = torch.iinfo(dtype)
    x = torch.randint(limits.min, limits.max, (4096,)).to(dtype)
    x[:2] = torch.tensor([limits.min, limits.max])
    x[2:1024] >>= limits.bits // 3
    same(converted(x, BF16), x.bfloat16())
    numbers = every()[(every() > max(limits.min, -(2.0**62))) & (every() < min(limits.max, 2.0**62))]
    numbers = numbers[torch.randint(len(numbers), (8192,))]
    assert torch.equal(converted(numbers, dtype), numbers.to(dtype))


def test_arithmetic_and_comparisons():
    a, b = (every()[torch.randperm(2**16)] for _ in range(2))
    a[:8192] = b[:8192]
    a[8192:16384] = (b[8192:16384].view(torch.int16) ^ 1).view(BF16)  # neighbors
    found = [torch.empty_like(a, device=DEVICE) for _ in range(4)]
    orders = torch.empty(2**16, dtype=torch.int32, device=DEVICE)
    arithmetic[(16,)](a.to(DEVICE), b.to(DEVICE), *found, orders, 4096)
    for got, want in zip(found, (a + b, a - b, a * b, a / b), strict=True):
        same(got, want)
    want = [a < b, a <= b, a > b, a >= b, a == b, a != b]
    assert torch.equal(orders.cpu(), sum(x.int() << i for i, x in enumerate(want)))


def test_functions_and_constants():
    a, b = (torch.randn(4096).bfloat16() * 20 for _ in range(2))
    found = [torch.empty_like(a, device=DEVICE) for _ in range(5)]
    maximum = torch.empty(1, dtype=BF16, device=DEVICE)
    functions[(1,)](a.to(DEVICE), b.to(DEVICE), *found, maximum, 4096)
    chosen, factor, addend = torch.where(a > b, -a, b.abs()), torch.tensor(0.3).bfloat16(), torch.tensor(1.7).bfloat16()
    wanted = a.maximum(b), a.minimum(b), None, chosen, a * factor + addend
    for got, want in zip(found, wanted, strict=True):
        if want is not None:
            same(got, want)
    torch.testing.assert_close(found[2].cpu().double(), a.double().exp2(), rtol=1.001 * 2.0**-8, atol=0.0)
    assert maximum.item() == a.max().item()


def test_what_moves_keeps_its_bits():
    x = every()[torch.randperm(2**16)].view(16, 4096)
    out = torch.empty(4096, 16, dtype=BF16, device=DEVICE)
    moved[(1,)](x.to(DEVICE), out, 16, 4096)
    want = x.mT.contiguous()
    want[:, 0] = 1.0
    want[:, 1::2] = want[:, ::2]
    assert torch.equal(out.cpu().view(torch.int16), want.view(torch.int16))


def test_products_are_of_the_exact_values_with_sums_in_float32():
    a, b = torch.randn(32, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    acc, out = torch.randn(32, 16) * 1e-3, torch.empty(32, 16, device=DEVICE)
    matmul[(1,)](a.to(DEVICE), b.to(DEVICE), acc.to(DEVICE), out, 32, 64, 16)
    want, size = a.double() @ b.double() + acc, a.double().abs() @ b.double().abs()
    assert ((out.cpu() - want).abs() <= 64 * 2.0**-24 * size).all()
    assert (out.bfloat16() != out).any()  # not rounded


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter refuses them")
@pytest.mark.parametrize("kernel", [summed, fused, added, cut_off])
def test_the_rest_is_refused(kernel):
    with pytest.raises(Exception, match=r"NotImplementedError.*bfloat16.*\.to\(tl\.float32\)"):
        kernel[(1,)](torch.ones(16, dtype=BF16), 16)
    if kernel is not cut_off:  # what was asked for in float32 runs
        kernel[(1,)](torch.ones(16), 16)


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_another_interpreter_is_noticed(monkeypatch):
    """One that has a method more, computes right by itself, as this one does now, or lacks a method."""
    with pytest.raises(RuntimeError, match=r"Triton [\d.]+'s interpreter differs.*get_bf16"):
        bf16_interpreter.check_interpreter()
    monkeypatch.delattr(InterpreterBuilder, "get_bf16")
    with pytest.raises(RuntimeError, match="create_fadd, create_fp_trunc: see whether"):
        bf16_interpreter.check_interpreter()
    monkeypatch.delattr(InterpreterBuilder, "create_fcmpUNE")
    with pytest.raises(RuntimeError, match="in create_fcmpUNE:"):
        bf16_interpreter.check_interpreter()
