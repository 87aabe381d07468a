"""The emulator's matrix instructions: layouts as the PTX manual describes them, products against float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from emulator import Fault
from snippets import run

pytestmark = pytest.mark.integration

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
OWN = "mul.wide.u32 %d10, %r0, BYTES; add.s64 %d11, %d0, %d10; add.s64 %d12, %d1, %d10;"


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def registers(first: int, count: int) -> str:
    return ", ".join(f"%r{first + k}" for k in range(count))


def words_of(x: torch.Tensor) -> torch.Tensor:
    """Pairs of two-byte elements as 32-bit words."""
    return x.contiguous().view(torch.int16).flatten().view(torch.int32)


# ---- mma.sync: fragments by the formulas of the manual

LANES = [(lane >> 2, lane % 4) for lane in range(32)]  # (group, thread within it)


@pytest.mark.parametrize("name", DTYPES)
def test_products_of_a_warp(name):
    a, b = random(16, 16, dtype=DTYPES[name]), random(16, 8, dtype=DTYPES[name], seed=1)
    c = random(16, 8, dtype=torch.float32, seed=2)
    given = torch.zeros(32, 10, dtype=torch.int32)
    for lane, (group, thread) in enumerate(LANES):
        rows = [group + (8 if k in (2, 3, 6, 7) else 0) for k in range(8)]
        columns = [thread * 2 + (k & 1) + (8 if k >= 4 else 0) for k in range(8)]
        given[lane, :4] = words_of(a[rows, columns])
        given[lane, 4:6] = words_of(b[[thread * 2 + (k & 1) + (8 if k >= 2 else 0) for k in range(4)], [group] * 4])
        given[lane, 6:] = c[[group, group, group + 8, group + 8], [thread * 2 + (k & 1) for k in range(4)]].view(
            torch.int32
        )
    out = torch.zeros(32, 4, dtype=torch.float32)
    body = "mul.wide.u32 %d10, %r0, 40; add.s64 %d12, %d1, %d10; mul.wide.u32 %d10, %r0, 16; add.s64 %d11, %d0, %d10;"
    body += "".join(f"ld.global.b32 %r{10 + k}, [%d12+{4 * k}];" for k in range(10))
    body += f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{{registers(30, 4)}}}, {{{registers(10, 4)}}},"
    body += f"{{{registers(14, 2)}}}, {{{registers(16, 4)}}}; st.global.v4.b32 [%d11], {{{registers(30, 4)}}};"
    assert not run(body, out, given, threads=32)
    want = a.double() @ b.double() + c.double()
    for lane, (group, thread) in enumerate(LANES):
        for k in range(4):
            got = out[lane, k].item()
            assert got == pytest.approx(
                want[group + (8 if k >= 2 else 0), thread * 2 + (k & 1)].item(), rel=1e-6, abs=1e-6
            )


def test_products_of_a_warp_in_tf32():
    """Inputs lose 13 bits of their fraction."""
    a, b = random(16, 8, dtype=torch.float32), random(8, 8, dtype=torch.float32, seed=1)
    given = torch.zeros(32, 6, dtype=torch.int32)
    for lane, (group, thread) in enumerate(LANES):
        rows, columns = [group, group + 8, group, group + 8], [thread, thread, thread + 4, thread + 4]
        given[lane, :4] = a[rows, columns].view(torch.int32)
        given[lane, 4:] = b[[thread, thread + 4], [group, group]].view(torch.int32)
    out = torch.zeros(32, 4, dtype=torch.float32)
    body = "mul.wide.u32 %d10, %r0, 24; add.s64 %d12, %d1, %d10; mul.wide.u32 %d10, %r0, 16; add.s64 %d11, %d0, %d10;"
    body += "".join(f"ld.global.b32 %r{10 + k}, [%d12+{4 * k}];" for k in range(6))
    body += "".join(f"mov.b32 %r{20 + k}, 0f00000000;" for k in range(4))
    body += f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{registers(30, 4)}}}, {{{registers(10, 4)}}},"
    body += f"{{{registers(14, 2)}}}, {{{registers(20, 4)}}}; st.global.v4.b32 [%d11], {{{registers(30, 4)}}};"
    assert not run(body, out, given, threads=32)
    short = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    want = short[0] @ short[1]
    for lane, (group, thread) in enumerate(LANES):
        for k in range(4):
            assert out[lane, k].item() == pytest.approx(
                want[group + (8 if k >= 2 else 0), thread * 2 + (k & 1)].item(), rel=1e-6
            )


# ---- ldmatrix and stmatrix


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_between_shared_memory_and_registers(count, transposed):
    """Lane l has elements 2 (l mod 4) and the next of row l / 4 of every matrix."""
    given = torch.arange(count * 64, dtype=torch.int16)
    out, back = torch.zeros(32, count, dtype=torch.int32), torch.zeros(count * 64, dtype=torch.int16)
    suffix = f"aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    four = f"{{{registers(4, 4)}}}"
    body = f"""mov.u64 %d9, %d2; setp.lt.u32 %p1, %r0, {count * 8}; shl.b32 %r1, %r0, 4; cvt.u64.u32 %d10, %r1;
        add.s64 %d12, %d1, %d10; @%p1 ld.global.v4.b32 {four}, [%d12]; @%p1 st.shared.v4.b32 [%r1], {four};
        bar.warp.sync -1; and.b32 %r2, %r1, {count * 128 - 1};
        ldmatrix.sync.{suffix} {{{registers(20, count)}}}, [%r2];
        mul.wide.u32 %d13, %r0, {4 * count}; add.s64 %d14, %d0, %d13;"""
    body += "".join(f"st.global.b32 [%d14+{4 * k}], %r{20 + k};" for k in range(count))
    body += f"""stmatrix.sync.{suffix} [%r2+1024], {{{registers(20, count)}}}; bar.warp.sync -1;
        add.s64 %d15, %d9, %d10; @%p1 ld.shared.v4.b32 {four}, [%r1+1024]; @%p1 st.global.v4.b32 [%d15], {four};"""
    assert not run(body, out, given, back, threads=32)
    matrices = given.view(count, 8, 8)
    if transposed:
        matrices = matrices.transpose(1, 2)
    for lane in range(32):
        got = out[lane].view(torch.int16).view(count, 2)
        assert torch.equal(got, matrices[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])
    assert torch.equal(back, given)


# ---- wgmma

# swizzle -> (code in the descriptor, bytes of a row)
SWIZZLES = {128: (1, 128), 64: (2, 64), 32: (3, 32), 0: (0, 16)}


def laid_out(x: torch.Tensor, swizzle: int, along_rows: bool) -> tuple[torch.Tensor, int, int, int]:
    """(bytes in shared memory, leading offset, stride offset, bytes from one 16 k to the next) of x (rows, k).

    K-major: atoms of 8 rows, each of the swizzle's bytes along k. Along rows (MN-major): atoms of 8 k, each of the
    swizzle's bytes along the rows. Chunk c of line l of an atom lies at chunk c ^ (l mod 8) of 8, of fewer accordingly.
    """
    rows, depth = x.shape
    span = SWIZZLES[swizzle][1]
    per = span // 2  # elements of a line
    lines, inner = (depth, rows) if along_rows else (rows, depth)
    data = (x.t() if along_rows else x).contiguous().view(torch.int16).numpy()  # (lines, inner)
    atoms_across, atoms_down = inner // per, lines // 8
    out = np.zeros(rows * depth, np.int16)
    for line in range(lines):
        for at in range(0, inner, 8):
            across, chunk = at // per, at % per // 8
            atom = (line // 8) * atoms_across + across if along_rows else across * atoms_down + line // 8
            chunk ^= line % 8 * span // 128 % (span // 16)  # lines of 128 bytes: those of 64 are two in one
            byte = atom * 8 * span + line % 8 * span + chunk * 16
            out[byte // 2 : byte // 2 + 8] = data[line, at : at + 8]
    atom = 8 * span
    if along_rows:
        offsets = (atom, atoms_across * atom) if swizzle else (atoms_across * atom, atom)  # they change roles
        return torch.from_numpy(out), *offsets, 2 * atoms_across * atom
    step = 32 if span > 32 else 32 // span * atoms_down * atom
    return torch.from_numpy(out), atoms_down * atom, atom, step


def descriptor(at: int, leading: int, stride: int, swizzle: int) -> int:
    return (at >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | SWIZZLES[swizzle][0] << 62


def shared_copy(tensor: int, size: int, at: int) -> str:
    """128 threads copy ``size`` bytes of tensor number ``tensor`` to shared memory."""
    body = "shl.b32 %r1, %r0, 4; cvt.u64.u32 %d10, %r1;"
    for first in range(0, size, 2048):
        body += f"setp.lt.u32 %p1, %r1, {size - first}; add.s64 %d12, %d{tensor}, %d10;"
        body += f"@%p1 ld.global.v4.b32 {{{registers(4, 4)}}}, [%d12+{first}];"
        body += f"@%p1 st.shared.v4.b32 [%r1+{at + first}], {{{registers(4, 4)}}};"
    return body


def product_of_a_warpgroup(a, b, swizzle, transposed, name, edit=lambda body: body):
    """(a b^T, races): a (64, 32), b (N, 32) in two steps of 16, from shared memory."""
    n = len(b)
    raw_a, raw_b = laid_out(a, swizzle, transposed[0]), laid_out(b, swizzle, transposed[1])
    out = torch.zeros(128, n // 2, dtype=torch.float32)
    body = shared_copy(1, a.numel() * 2, 0) + shared_copy(2, b.numel() * 2, 16384)
    body += "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
    for step in range(2):
        first = descriptor(step * raw_a[3], *raw_a[1:3], swizzle)
        second = descriptor(16384 + step * raw_b[3], *raw_b[1:3], swizzle)
        body += f"mov.b64 %d20, {first}; mov.b64 %d21, {second}; mov.pred %p2, {step};"
        body += f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} {{{registers(100, n // 2)}}},"
        body += f" %d20, %d21, %p2, 1, 1, {int(transposed[0])}, {int(transposed[1])};"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    body += f"mul.wide.u32 %d13, %r0, {n * 2}; add.s64 %d14, %d0, %d13;"
    body += "".join(f"st.global.b32 [%d14+{4 * k}], %r{100 + k};" for k in range(n // 2))
    races = run(edit(body), out, raw_a[0], raw_b[0])
    made = torch.zeros(64, n)
    for thread in range(128):
        for k in range(n // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + (8 if k % 4 >= 2 else 0)
            made[row, k // 4 * 8 + thread % 4 * 2 + k % 2] = out[thread, k]
    return made, races


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_products_of_a_warpgroup(swizzle, transposed, name):
    depth = 64 if swizzle == 128 else 32  # at least one line of the swizzle
    a, b = random(64, depth, dtype=DTYPES[name]), random(64, depth, dtype=DTYPES[name], seed=1)
    made, races = product_of_a_warpgroup(a, b, swizzle, transposed, name)
    assert not races
    torch.testing.assert_close(made.double(), a[:, :32].double() @ b[:, :32].double().t(), rtol=1e-5, atol=1e-5)


PART = "setp.lt.u32 %p9, %r0, 32; @%p9"  # the first warp alone
EDITS = {
    "a register before its wait": lambda body: body.replace("wgmma.wait_group.sync.aligned 0;", ""),
    "reads without a barrier after the write": lambda body: body.replace("bar.sync 0;", ""),
    "reads what no fence made visible to the async proxy": lambda body: body.replace(
        "fence.proxy.async.shared::cta;", ""
    ),
    "reads shared memory that nobody wrote": lambda body: body.replace(shared_copy(2, 4096, 16384), ""),
    "overwrites an operand of a matrix instruction in flight": lambda body: body.replace(
        "wgmma.commit_group.sync.aligned;",
        "st.shared.v4.b32 [%r1], {%r4, %r4, %r4, %r4}; wgmma.commit_group.sync.aligned;",
    ),
    "writes without a barrier after the read": lambda body: body.replace(
        "wgmma.wait_group.sync.aligned 0;",
        "wgmma.wait_group.sync.aligned 0; st.shared.v4.b32 [%r1], {%r4, %r4, %r4, %r4};",
    ),
    "a register of wgmma that was written after the last wgmma.fence": lambda body: body.replace(
        "mov.pred %p2, 0;", "mov.b32 %r100, 0; mov.pred %p2, 1;"
    ),
}


@pytest.mark.parametrize("race", EDITS)
def test_races_of_a_warpgroup(race):
    a, b = (random(64, 32, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    _, races = product_of_a_warpgroup(a, b, 64, (False, False), "bf16", EDITS[race])
    assert any(found.startswith(race + ":") for found in races), races


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda body: body.replace("wgmma.wait_group", f"{PART} wgmma.wait_group"), "part of a warpgroup"),
        (lambda body: body.replace("wgmma.fence", f"{PART} wgmma.fence"), "part of a warpgroup"),
        (lambda body: body.replace("mov.pred %p2, 0;", "setp.ne.u32 %p2, %r0, 0;"), "do not agree"),
        (
            lambda body: body.replace("mov.pred %p2, 0;", f"or.b64 %d21, %d21, {3 << 49}; mov.pred %p2, 0;"),
            "base offset",
        ),
        (lambda body: body.replace("k16.f32.bf16.bf16", "k16.f16.f16.f16"), "not emulated"),
    ],
)
def test_faults_of_a_warpgroup(edit, fault):
    a, b = (random(64, 32, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    with pytest.raises(Fault, match=fault):
        product_of_a_warpgroup(a, b, 64, (False, False), "bf16", edit)


def test_a_product_of_what_another_one_still_writes():
    a, b = (random(64, 32, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    more = f"{{{registers(200, 32)}}}, {{{registers(100, 4)}}}, %d21, 0, 1, 1, 0;"
    more = f"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {more} wgmma.commit_group"
    _, races = product_of_a_warpgroup(
        *(a, b, 64, (False, False), "bf16"), lambda body: body.replace("wgmma.commit_group", more)
    )
    assert any(found.startswith("a register before its wait: wgmma") for found in races), races


def test_a_matrix_outside_of_shared_memory():
    a, b = (random(64, 32, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    with pytest.raises(Fault, match="outside of shared memory"):
        wrong = descriptor(1 << 17, 0, 512, 64)
        product_of_a_warpgroup(
            *(a, b, 64, (False, False), "bf16"),
            lambda body: body.replace("mov.pred %p2, 0;", f"mov.b64 %d21, {wrong}; mov.pred %p2, 0;"),
        )


# ---- tcgen05

ALLOCATED = """setp.lt.u32 %p4, %r0, 32; mov.b32 %r9, 40960;
    @%p4 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9], 64; bar.sync 0; ld.shared.b32 %r7, [%r9];
    shr.u32 %r52, %r0, 5; and.b32 %r52, %r52, 3; shl.b32 %r52, %r52, 21; add.s32 %r53, %r7, %r52;
    mul.wide.u32 %d10, %r0, 4; add.s64 %d11, %d0, %d10; setp.lt.u32 %p8, %r0, 128;"""
LOADED = """tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r60}, [%r53 + 3]; tcgen05.wait::ld.sync.aligned; bar.sync 0;
    @%p4 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 64; st.global.b32 [%d11], %r60;"""
STORED = "@%p8 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r53 + 3], {%r0}; tcgen05.wait::st.sync.aligned; bar.sync 0;"


def test_values_in_tensor_memory():
    """Warps four apart share lanes: what the first four store, all eight load, after a wait and a barrier."""
    out = torch.zeros(256, dtype=torch.int32)
    assert not run(ALLOCATED + STORED + LOADED, out, threads=256)
    assert torch.equal(out, torch.arange(256, dtype=torch.int32) % 128)
    races = run(ALLOCATED + STORED.replace("bar.sync 0;", "") + LOADED, out, threads=256)
    assert [race.split(":")[0:2] for race in races] == [["tensor memory", " no barrier after another warp's store"]]
    body = ALLOCATED + STORED.replace("tcgen05.wait::st.sync.aligned;", "") + LOADED
    assert any("still stored to" in race for race in run(body, out, threads=128))


def product_in_tensor_memory(a, b, rows, edit=lambda body: body):
    """(a b^T, races): a (rows, 64), b (64, 64) in four steps of 16 from shared memory, the result in tensor memory."""
    raw_a, raw_b = laid_out(a, 128, False), laid_out(b, 128, False)
    n = len(b)
    out = torch.zeros(128, n, dtype=torch.float32)
    shape = 1 << 4 | 1 << 7 | 1 << 10 | (n >> 3) << 17 | (rows >> 4) << 24
    body = "setp.lt.u32 %p4, %r0, 32; mov.b32 %r9, 40960;"
    body += "@%p4 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9], 64;"
    body += shared_copy(1, a.numel() * 2, 0) + shared_copy(2, b.numel() * 2, 16384)
    body += "setp.eq.u32 %p5, %r0, 0; mov.b32 %r8, 41024; @%p5 mbarrier.init.shared::cta.b64 [%r8], 1;"
    body += "bar.sync 0; fence.proxy.async.shared::cta; ld.shared.b32 %r7, [%r9];"
    body += "elect.sync %r50|%p6, -1; and.pred %p6, %p6, %p4;"
    body += f"mov.b32 %r51, {shape};"
    for step in range(4):
        words = [descriptor(at + step * 32, *x[1:3], 0) | 1 << 46 | 2 << 61 for at, x in ((0, raw_a), (16384, raw_b))]
        body += f"mov.b64 %d20, {words[0]}; mov.b64 %d21, {words[1]}; mov.pred %p7, {int(step > 0)};"
        body += "@%p6 tcgen05.mma.cta_group::1.kind::f16 [%r7 + 0], %d20, %d21, %r51, %p7;"
    body += "cvt.u64.u32 %d22, %r8; @%p6 tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%d22];"
    body += "{ .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared.b64 complete, [%r8], 0;"
    body += "@!complete bra.uni waitLoop; }"
    body += "shr.u32 %r52, %r0, 5; shl.b32 %r52, %r52, 21; add.s32 %r53, %r7, %r52;"
    if rows == 128:
        body += f"tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {{{registers(100, n)}}}, [%r53 + 0];"
    else:
        body += f"tcgen05.ld.sync.aligned.16x32bx2.x{n // 2}.b32 {{{registers(100, n // 2)}}}, [%r53 + 0], {n // 2};"
    body += "tcgen05.wait::ld.sync.aligned; bar.sync 0;"
    body += "@%p4 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 64;"
    body += f"mul.wide.u32 %d13, %r0, {n * 4}; add.s64 %d14, %d0, %d13;"
    body += "".join(f"st.global.b32 [%d14+{4 * k}], %r{100 + k};" for k in range(n if rows == 128 else n // 2))
    races = run(edit(body), out, raw_a[0], raw_b[0])
    if rows == 128:
        return out, races
    made = torch.zeros(64, n)
    for thread in range(128):
        half = thread % 32 // 16
        made[thread // 32 * 16 + thread % 16, half * n // 2 : (half + 1) * n // 2] = out[thread, : n // 2]
    return made, races


@pytest.mark.parametrize("rows", [64, 128])
def test_products_in_tensor_memory(rows):
    a, b = random(rows, 64, dtype=torch.bfloat16), random(64, 64, dtype=torch.bfloat16, seed=1)
    made, races = product_in_tensor_memory(a, b, rows)
    assert not races
    torch.testing.assert_close(made.double(), a.double() @ b.double().t(), rtol=1e-5, atol=1e-5)


def without(text):
    return lambda body: body.replace(text, "", 1)


TENSOR_EDITS = {
    "tensor memory of a product in flight": without("@!complete bra.uni waitLoop;"),
    "reads without a barrier after the write": without("bar.sync 0;"),
    "reads what no fence made visible to the async proxy": lambda body: body.replace(
        "fence.proxy",
        "setp.eq.u32 %p9, %r0, 64; @%p9 fence.proxy",  # of a thread that neither writes all nor reads
    ),
    "a register before its wait": without("tcgen05.wait::ld.sync.aligned;"),
    "tensor memory is given back without a barrier after the load": lambda body: body.replace(" bar.sync 0;@", "@"),
    "no barrier after the mbarrier was made": without("bar.sync 0;"),
    "touches an mbarrier": lambda body: body.replace(
        "bar.sync 0; fence", "@%p5 st.shared.b64 [%r8], %d0; bar.sync 0; fence"
    ),
    "a product that some threads alone wait for": lambda body: body.replace(
        "waitLoop: mbarrier", "mov.pred complete, 1; waitLoop: @%p4 mbarrier"
    ),
}


@pytest.mark.parametrize("race", TENSOR_EDITS)
def test_races_in_tensor_memory(race):
    a, b = random(128, 64, dtype=torch.bfloat16), random(64, 64, dtype=torch.bfloat16, seed=1)
    _, races = product_in_tensor_memory(a, b, 128, TENSOR_EDITS[race])
    assert any(found.startswith(race + ":") for found in races), races


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda body: body.replace("@%p5 mbarrier.init.shared::cta.b64 [%r8], 1;", ""), "not initialized"),
        (lambda body: body.replace("shl.b32 %r52, %r52, 21", "shl.b32 %r52, %r52, 20"), "belong to another warp"),
        (lambda body: body.replace("[%r9], 64", "[%r9], 32"), "outside of the tensor memory"),
        (lambda body: body.replace("and.pred %p6, %p6, %p4", "or.pred %p6, %p6, %p4"), "more than one thread"),
        (lambda body: body.replace("[%r8], 0;", "[%r8], 1;"), "more instructions"),  # waits for a second product
        (lambda body: re.sub(r"@%p4 tcgen05.dealloc[^;]*;", "", body), "not given back"),
        (
            lambda body: body.replace(
                "shr.u32 %r52", "@%p4 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 64; shr.u32 %r52"
            ),
            "outside of the tensor memory",
        ),
    ],
)
def test_faults_in_tensor_memory(edit, fault):
    a, b = random(128, 64, dtype=torch.bfloat16), random(64, 64, dtype=torch.bfloat16, seed=1)
    with pytest.raises(Fault, match=fault):
        product_in_tensor_memory(a, b, 128, edit)
