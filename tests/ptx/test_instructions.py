"""The emulator's instructions, one at a time, against NumPy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from snippets import apply

pytestmark = pytest.mark.integration

rng = np.random.default_rng(0)
EDGES = {
    "s32": [0, 1, -1, 2**31 - 1, -(2**31), 12345, -777],
    "u32": [0, 1, 2, 2**32 - 1, 2**31, 12345, 777],
    "s64": [0, 1, -1, 2**63 - 1, -(2**63), 2**40, -(2**35)],
    "u64": [0, 1, 2, 2**64 - 1, 2**63, 2**40, 2**35],
    "s16": [0, 1, -1, 2**15 - 1, -(2**15), 123, -77],
    "u16": [0, 1, 2, 2**16 - 1, 2**15, 123, 77],
    "f32": [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-42, 3.4e38, 1e-20, 0.3, -7.25],
}
TYPES = {
    **{"s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64},
    "f32": np.float32,
}


def pairs(kind: str, n: int = 2, seed: int = 0) -> list[np.ndarray]:
    """All combinations of edge values, and random ones."""
    generator = np.random.default_rng(seed)
    edges = np.array(EDGES[kind], TYPES[kind])
    grids = [g.ravel() for g in np.meshgrid(*[edges] * min(n, 2))][:n]
    while len(grids) < n:
        grids.append(generator.permutation(grids[0]))
    if kind == "f32":
        more = [
            (generator.standard_normal(64) * 10.0 ** generator.integers(-5, 6, 64)).astype(np.float32) for _ in range(n)
        ]
    else:
        info = np.iinfo(TYPES[kind])
        more = [generator.integers(info.min, info.max, 64, TYPES[kind], endpoint=True) for _ in range(n)]
    return [np.concatenate([g, m]) for g, m in zip(grids, more, strict=True)]


def bits(kind: str) -> str:
    return f"b{kind[1:]}"


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Bit for bit, but that any NaN is one."""
    got, want = got.view(want.dtype), np.ascontiguousarray(want)
    if want.dtype.kind == "f":
        assert np.array_equal(np.isnan(got), np.isnan(want))
        got, want = np.nan_to_num(got, nan=0.0), np.nan_to_num(want, nan=0.0)
    assert got.tobytes() == want.tobytes()


INTEGER = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("operation", INTEGER)
def test_integers(operation, kind):
    a, b = pairs(kind)
    suffix = bits(kind) if operation in ("and", "or", "xor") else kind
    with np.errstate(over="ignore"):
        same(apply(f"{operation}.{suffix}", bits(kind), [bits(kind)] * 2, [a, b]), INTEGER[operation](a, b))


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_division(kind):
    """Towards zero; by zero it is not defined."""
    a, b = pairs(kind)
    b[b == 0] = 3
    overflow = (a == np.iinfo(TYPES[kind]).min) & (b == -1) if kind == "s32" else a != a
    a[overflow] = 5
    assert apply("div.s32", "b32", ["b32", "b32"], [np.int32([-(2**31)]), np.int32([-1])])[0] == 2**31  # as in hardware
    quotient = np.trunc(a.astype(np.longdouble) / b.astype(np.longdouble)).astype(TYPES[kind])
    same(apply(f"div.{kind}", "b32", ["b32", "b32"], [a, b]), quotient)
    same(apply(f"rem.{kind}", "b32", ["b32", "b32"], [a, b]), a - quotient * b)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_shifts(kind):
    (a,) = pairs(kind, 1)
    n = np.arange(len(a), dtype=np.uint32) % 80  # beyond the width as well
    width = int(kind[1:])
    python = [int(x) for x in a]
    right = [x >> min(int(s), width) for x, s in zip(python, n, strict=True)]
    same(apply(f"shr.{kind}", bits(kind), [bits(kind), "b32"], [a, n]), np.array(right, TYPES[kind]))
    left = [(x << int(s)) % 2**width if s < width else 0 for x, s in zip(python, n, strict=True)]
    got = apply(f"shl.{bits(kind)}", bits(kind), [bits(kind), "b32"], [a, n])
    assert [int(x) for x in got] == left


COMPARED = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "f32"])
@pytest.mark.parametrize("operation", COMPARED)
def test_comparisons(operation, kind):
    a, b = pairs(kind)
    got = apply(f"setp.{operation}.{kind}", "pred", [bits(kind)] * 2, [a, b]).astype(bool)
    assert np.array_equal(got, COMPARED[operation](a, b))
    if kind == "f32" and operation != "eq":  # true where one is not a number
        got = apply(f"setp.{operation}u.f32", "pred", ["b32"] * 2, [a, b]).astype(bool)
        assert np.array_equal(got, COMPARED[operation](a, b) | np.isnan(a) | np.isnan(b))


def test_comparisons_with_nan():
    a, b = pairs("f32")
    either = np.isnan(a) | np.isnan(b)
    for operation, want in (("ne", (a != b) & ~either), ("neu", (a != b) | either), ("nan", either), ("num", ~either)):
        assert np.array_equal(apply(f"setp.{operation}.f32", "pred", ["b32"] * 2, [a, b]).astype(bool), want)


@pytest.mark.parametrize("ftz", ["", "ftz."])
def test_floats(ftz):
    a, b, c = pairs("f32", 3)
    two, three = ["b32"] * 2, ["b32"] * 3
    with np.errstate(all="ignore"):
        same(apply(f"add.{ftz}f32", "b32", two, [a, b]), a + b)
        same(apply(f"sub.{ftz}f32", "b32", two, [a, b]), a - b)
        same(apply(f"mul.{ftz}f32", "b32", two, [a, b]), a * b)
        same(apply(f"div.full.{ftz}f32", "b32", two, [a, b]), a / b)
        fused = torch.addcmul(*(torch.from_numpy(x).double() for x in (c, a, b))).float().numpy()
        got = apply(f"fma.rn.{ftz}f32", "b32", three, [a, b, c]).view(np.float32)
        assert np.array_equal(np.isnan(got), np.isnan(fused))
        ok = np.isfinite(fused)  # rounded twice by way of float64, which may differ in the last bit
        assert (np.abs(got - fused)[ok] <= np.spacing(np.abs(fused[ok]))).all()
        # a number wins against NaN, unless NaN is asked for
        number = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b)))
        got = apply(f"max.{ftz}f32", "b32", two, [a, b]).view(np.float32)
        assert np.array_equal(got, number, equal_nan=True)
        got = apply(f"max.{ftz}NaN.f32", "b32", two, [a, b]).view(np.float32)
        assert np.array_equal(got, np.maximum(a, b), equal_nan=True)
        zeros = np.float32([0.0, -0.0]), np.float32([-0.0, 0.0])
        for name, signs in (("min", [True, True]), ("max", [False, False])):  # -0 is less than +0
            got = apply(f"{name}.{ftz}f32", "b32", two, list(zeros)).view(np.float32)
            assert np.signbit(got).tolist() == signs


def test_a_nan_is_always_the_same():
    """Of arithmetic in f32, whatever the operands: two threads that add in another order write equal bits."""
    a, b, c = (x.copy() for x in pairs("f32", 3))
    with np.errstate(all="ignore"):
        a.view(np.uint32)[np.isnan(a)] = 0xFFC01234
        for name, values in (("add", [a, b]), ("sub", [a, b]), ("mul", [a, b]), ("max.NaN", [a, b])):
            got = apply(f"{name}.f32", "b32", ["b32"] * 2, values)
            assert (got[np.isnan(got.view(np.float32))] == 0x7FFFFFFF).all() and np.isnan(got.view(np.float32)).any()
        got = apply("fma.rn.f32", "b32", ["b32"] * 3, [a, b, c])
        assert (got[np.isnan(got.view(np.float32))] == 0x7FFFFFFF).all()


def test_approximations():
    """Exact here, within the bounds that the manual gives there."""
    (a,) = pairs("f32", 1)
    with np.errstate(all="ignore"):
        for operation, want in (("ex2", np.exp2), ("lg2", np.log2), ("rcp", np.reciprocal), ("sqrt", np.sqrt)):
            got = apply(f"{operation}.approx.ftz.f32", "b32", ["b32"], [a]).view(np.float32)
            np.testing.assert_allclose(got, want(a.astype(np.float64)).astype(np.float32), rtol=3e-7)


@pytest.mark.parametrize(("half", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision(half, dtype):
    every = np.arange(1 << 16, dtype=np.uint16)
    for part in np.array_split(every, 64):  # at most 1024 threads
        wide = torch.from_numpy(part.view(np.int16)).view(dtype).float().numpy()
        same(apply(f"cvt.f32.{half}", "b32", ["b16"], [part]), wide)
    a, b = pairs("f32", seed=1)
    # ties, and what overflows
    a[:8] = np.array([1.00390625, 1.01171875, 3.4e38, 65519.9, 65520.0, 2.98e-8, 6e-8, -1.00390625], np.float32)
    narrow = torch.from_numpy(a).to(dtype)
    got = torch.from_numpy(apply(f"cvt.rn.{half}.f32", "b16", ["b32"], [a]).view(np.int16)).view(dtype)
    assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(narrow)) and torch.equal(got.isnan(), narrow.isnan())
    got = apply(f"cvt.rn.{half}x2.f32", "b32", ["b32", "b32"], [a, b])
    upper, lower = (torch.from_numpy((got >> s).astype(np.uint16).view(np.int16)).view(dtype) for s in (16, 0))
    assert torch.equal(torch.nan_to_num(upper), torch.nan_to_num(torch.from_numpy(a).to(dtype)))
    assert torch.equal(torch.nan_to_num(lower), torch.nan_to_num(torch.from_numpy(b).to(dtype)))


@pytest.mark.parametrize(("half", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_arithmetic_in_half_precision(half, dtype):
    x = [torch.from_numpy(p).to(dtype) for p in pairs("f32", 3, seed=2)]
    x = [y[: len(y) // 2 * 2] for y in x]
    as_words = [np.ascontiguousarray(y.view(torch.int16).numpy()).view(np.uint32) for y in x]
    wide = [y.double() for y in x]
    for operation, want in (
        ("add.rn", wide[0] + wide[1]),
        ("sub.rn", wide[0] - wide[1]),
        ("mul.rn", wide[0] * wide[1]),
        ("fma.rn", wide[0] * wide[1] + wide[2]),
    ):
        n = 3 if "fma" in operation else 2
        got = apply(f"{operation}.{half}x2", "b32", ["b32"] * n, as_words[:n])
        got = torch.from_numpy(got.view(np.int16)).view(dtype)
        once = want.to(dtype)  # from float64 by way of float32: at most one unit off
        ok = once.isfinite()
        assert torch.equal(got.isnan(), once.isnan())
        step = torch.finfo(dtype).eps * once[ok].double().abs() + torch.finfo(dtype).smallest_normal
        assert ((got[ok].double() - want[ok]).abs() <= 0.51 * step).all()


def test_conversions_of_integers():
    (a,) = pairs("s32", 1)
    same(apply("cvt.s64.s32", "b64", ["b32"], [a]), a.astype(np.int64))
    same(apply("cvt.u64.u32", "b64", ["b32"], [a.view(np.uint32)]), a.view(np.uint32).astype(np.uint64))
    same(apply("cvt.rn.f32.s32", "b32", ["b32"], [a]), a.astype(np.float32))
    same(
        apply("mul.wide.s32", "b64", ["b32", "b32"], [a, a[::-1].copy()]), a.astype(np.int64) * a[::-1].astype(np.int64)
    )
    u, w = pairs("u16")
    same(apply("mul.hi.u16", "b16", ["b16", "b16"], [u, w]), (u.astype(np.uint32) * w >> 16).astype(np.uint16))
    (h, g), (c, _) = pairs("s16"), pairs("s32")
    n = min(len(h), len(c))
    same(
        apply("mad.wide.s16", "b32", ["b16", "b16", "b32"], [h[:n], g[:n], c[:n]]),
        (h[:n].astype(np.int64) * g[:n] + c[:n]).astype(np.int32),
    )
    (x,) = pairs("f32", 1)
    want = np.clip(
        np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e300, neginf=-1e300)), -(2**31), 2**31 - 1
    )
    same(apply("cvt.rzi.s32.f32", "b32", ["b32"], [x]), want.astype(np.int32))


def test_bit_fields_and_permutations():
    (a,) = pairs("u32", 1)
    python = [int(x) for x in a]
    got = apply("bfe.u32", "b32", ["b32"], [a], "4, 14")
    assert [int(x) for x in got] == [x >> 4 & 0x3FFF for x in python]
    got = apply("bfe.s32", "b32", ["b32"], [a], "28, 8").view(np.int32)
    assert [int(x) for x in got] == [(x >> 28) - (16 if x >> 31 else 0) for x in python]
    b = a[::-1].copy()
    got = apply("prmt.b32", "b32", ["b32", "b32"], [a, b], "0x9140")
    for x, y, z in zip(python, b.tolist(), got.tolist(), strict=True):
        own = [*x.to_bytes(4, "little"), *y.to_bytes(4, "little")]
        assert z.to_bytes(4, "little") == bytes([own[0], own[4], own[1], 255 if own[1] & 128 else 0])


@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
def test_shuffles(mode):
    a = rng.integers(0, 2**32, 64, np.uint32, endpoint=False)
    lane = np.arange(64) % 32
    for n in (0, 1, 5, 16, 31):
        source = {"bfly": lane ^ n, "idx": lane * 0 + n, "up": lane - n, "down": lane + n}[mode]
        source = np.where((source < 0) | (source > 31), lane, source)
        got = apply(f"shfl.sync.{mode}.b32", "b32", ["b32"], [a], f"{n}, {0 if mode == 'up' else 31}, -1")
        assert np.array_equal(got, a[np.arange(64) // 32 * 32 + source])


def test_reductions_and_votes_of_warps():
    a = rng.integers(-1000, 1000, 96).astype(np.int32)
    for name, function in (("add", np.sum), ("max", np.max), ("min", np.min)):
        want = np.repeat(function(a.reshape(3, 32), axis=1), 32).astype(np.int32)
        same(apply(f"redux.sync.{name}.s32", "b32", ["b32"], [a], "-1"), want)
    p = (a > 500).astype(np.uint32)
    want = [sum(int(x) << k for k, x in enumerate(p[32 * w : 32 * w + 32])) for w in range(3)]
    assert apply("vote.sync.ballot.b32", "b32", ["pred"], [p], "-1")[::32].tolist() == want
    assert apply("vote.sync.any.pred", "pred", ["pred"], [p], "-1")[::32].tolist() == [int(w > 0) for w in want]


def test_two_floats_in_a_register():
    a, b, c = (x[: len(x) // 2 * 2] for x in pairs("f32", 3))
    words = [x.view(np.uint64) for x in (a, b, c)]
    with np.errstate(all="ignore"):
        same(apply("add.f32x2", "b64", ["b64"] * 2, words[:2]), a + b)
        same(apply("mul.f32x2", "b64", ["b64"] * 2, words[:2]), a * b)
    got = apply("fma.rn.f32x2", "b64", ["b64"] * 3, words).view(np.float32)
    exact = a.astype(np.longdouble) * b + c
    ok = np.isfinite(exact) & (np.abs(exact) < 3e38)
    assert np.array_equal(got[ok], exact[ok].astype(np.float32))
