"""The emulator's memory: what is copied where, and every fault that it must find."""

from __future__ import annotations

import pytest
import torch
from emulator import Fault, Kernel
from snippets import run, text

pytestmark = pytest.mark.integration

AT = "shl.b32 %r1, %r0, 2; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d0, %d10; add.s64 %d12, %d1, %d10;"
LANE = "and.b32 %r2, %r0, 31; shr.u32 %r3, %r0, 5;"


def words(n: int = 128) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32) * 7 + 1


def test_shared_memory_passes_values_from_thread_to_thread():
    out = torch.zeros(128, dtype=torch.int32)
    body = f"""{AT} ld.global.b32 %r4, [%d12]; st.shared.b32 [%r1], %r4; bar.sync 0;
        xor.b32 %r5, %r1, 508; ld.shared.b32 %r6, [%r5]; st.global.b32 [%d11], %r6;"""
    assert not run(body, out, words())
    assert torch.equal(out, words().flip(0))
    races = run(body.replace("bar.sync 0;", ""), out, words())
    assert list(races) == ["reads without a barrier after the write: ld.shared.b32"]
    # within a warp its own barrier is enough, between warps not
    in_warp = body.replace("xor.b32 %r5, %r1, 508", "xor.b32 %r5, %r1, 124")
    assert not run(in_warp.replace("bar.sync 0", "bar.warp.sync -1"), out, words())
    assert run(in_warp.replace("bar.sync 0;", ""), out, words())
    assert run(body.replace("bar.sync 0", "bar.warp.sync -1"), out, words())


def test_a_write_after_a_read_needs_a_barrier():
    body = f"""{AT} st.shared.b32 [%r1], %r0; bar.sync 0; xor.b32 %r5, %r1, 508; ld.shared.b32 %r6, [%r5];
        bar.sync 0; st.shared.b32 [%r1], %r6; st.global.b32 [%d11], %r6; mov.b64 %d13, %d1;"""
    out = torch.zeros(128, dtype=torch.int32)
    assert not run(body, out, words())
    at = body.rindex("bar.sync 0;")
    races = run(body[:at] + body[at + 11 :], out, words())
    assert list(races) == ["writes without a barrier after the read: st.shared.b32"]


def test_two_threads_may_write_the_same_value_alone():
    out = torch.zeros(128, dtype=torch.int32)
    body = f"{AT} mov.b32 %r4, 5; st.shared.b32 [0], VALUE; st.global.b32 [%d11], %r4; mov.b64 %d13, %d1;"
    assert not run(body.replace("VALUE", "%r4"), out, words())
    assert any("two threads write" in race for race in run(body.replace("VALUE", "%r0"), out, words()))


def test_neighboring_bytes_are_apart():
    """As threads store a mask: a byte each, which one of them reads after a barrier, or two of them write."""
    out = torch.zeros(128, dtype=torch.int32)
    body = f"""{AT} cvt.u16.u32 %h1, %r0; st.shared.b8 [%r0], %h1; bar.sync 0; ld.shared.b8 %h2, [%r0];
        cvt.u32.u16 %r6, %h2; st.global.b32 [%d11], %r6; mov.b64 %d13, %d1;"""
    assert not run(body, out, words())
    assert torch.equal(out, torch.arange(128, dtype=torch.int32))
    both = body.replace("st.shared.b8 [%r0]", "and.b32 %r7, %r0, 63; st.shared.b8 [%r7]").replace("bar.sync 0;", "")
    assert any("two threads write" in race for race in run(both, out, words()))


def test_shared_memory_that_nobody_wrote():
    out = torch.zeros(128, dtype=torch.int32)
    races = run(f"{AT} ld.shared.b32 %r4, [%r1]; st.global.b32 [%d11], %r4; mov.b64 %d13, %d1;", out, words())
    assert list(races) == ["reads shared memory that nobody wrote: ld.shared.b32"]


@pytest.mark.parametrize("vector", ["v2.b32 {%r4, %r5}", "v4.b32 {%r4, %r5, %r6, %r7}", "v2.b64 {%d20, %d21}"])
def test_vectors(vector):
    size = {"v2.b32": 8, "v4.b32": 16, "v2.b64": 16}[vector.split()[0]]
    given = torch.arange(32 * size, dtype=torch.uint8)
    out = torch.zeros_like(given)
    kind, registers = vector.split(" ", 1)
    body = f"""mul.wide.u32 %d10, %r0, {size}; add.s64 %d11, %d0, %d10; add.s64 %d12, %d1, %d10;
        ld.global.{kind} {registers}, [%d12]; st.global.{kind} [%d11], {registers};"""
    assert not run(body, out, given, threads=32)
    assert torch.equal(out, given)


def test_bytes_are_extended_by_their_type():
    given, out = torch.arange(-64, 64, dtype=torch.int8), torch.zeros(256, dtype=torch.int32)
    body = f"""{AT} cvt.u64.u32 %d14, %r0; add.s64 %d15, %d1, %d14; ld.global.s8 %r4, [%d15]; ld.global.u8 %r5, [%d15];
        st.global.b32 [%d11], %r4; st.global.b32 [%d11+512], %r5;"""
    assert not run(body, out, given)
    assert torch.equal(out[:128], given.int()) and torch.equal(out[128:], given.view(torch.uint8).int())


@pytest.mark.parametrize("offset", [-4, 512, 4096])
def test_out_of_bounds_of_a_tensor(offset):
    out = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(Fault, match="out of bounds of global memory"):
        run(f"{AT} ld.global.b32 %r4, [%d12+{offset}]; st.global.b32 [%d11], %r4;", out, words())
    with pytest.raises(Fault, match="out of bounds of global memory"):
        run(f"{AT} st.global.b32 [%d11+{offset}], %r0; mov.b64 %d13, %d1;", out, words())


def test_out_of_bounds_of_shared_memory():
    with pytest.raises(Fault, match="out of bounds of shared memory"):
        run(f"{AT} st.shared.b32 [%r1+4], %r0; mov.b64 %d13, %d1;", words(), words(), shared=512)


def test_misaligned_accesses():
    with pytest.raises(Fault, match="misaligned access to global memory"):
        run(f"{AT} ld.global.v2.b32 {{%r4, %r5}}, [%d12]; st.global.b32 [%d11], %r4;", words(), words(), threads=64)
    with pytest.raises(Fault, match="misaligned access to shared memory"):
        run("st.shared.b32 [2], %r0;", words())


def test_what_several_threads_have_read_is_not_written():
    """The last of them alone is not the only one: among the lanes of a warp, and among CTAs."""
    all_read = """mov.b32 %r1, 0; setp.eq.u32 %p2, %r0, 0; @%p2 st.shared.b32 [%r1], %r0; bar.sync 0;
        ld.shared.b32 %r4, [%r1]; setp.eq.u32 %p1, %r0, 31; MORE @%p1 st.shared.b32 [%r1], %r4; mov.b64 %d9, %d0;"""
    races = run(all_read.replace("MORE", "add.s32 %r4, %r4, 1;"), words(), threads=32)
    assert list(races) == ["writes without a barrier after the read: st.shared.b32"]
    assert not run(all_read.replace("MORE", "add.s32 %r4, %r4, 1; bar.warp.sync -1;"), words(), threads=32)
    in_place = """mov.u32 %r9, %ctaid.x; mul.wide.u32 %d10, %r9, 4; add.s64 %d11, %d0, %d10; setp.eq.u32 %p1, %r0, 0;
        @%p1 ld.global.b32 %r4, [%d11]; @%p1 ld.global.b32 %r5, [%d11+4]; add.s32 %r4, %r4, %r5;
        @%p1 st.global.b32 [%d11], %r4;"""
    assert list(grid_of(in_place, words(4), ctas=3)) == ["writes what another CTA reads: st.global.b32"]


@pytest.mark.parametrize(
    "statement",
    ["cp.async.wait_group 0", "bar.warp.sync -1", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r6]"],
)
def test_instructions_of_whole_warps(statement):
    body = (
        f"{AT} {LANE} st.shared.b32 [%r1], %r0; bar.sync 0; setp.ne.u32 %p1, %r2, 3; mov.b32 %r6, 0; mov.b64 %d13, %d1;"
    )
    with pytest.raises(Fault, match="threads of a warp are missing"):
        run(f"{body} @%p1 {statement};", words(), words())
    with pytest.raises(Fault, match="a part of a warp"):
        run(f"{body} redux.sync.add.s32 %r5, %r2, 0xffff;", words(), words())


@pytest.mark.parametrize(
    "statement",
    [
        "shfl.sync.bfly.b32 %r1, %r2, 1;",
        "shfl.sync.bfly.b32 %h1, %h2, 1, 31, -1;",
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r7}, {%r8,%r9,%r10,%r11};",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1,%r2}, {%r5,%r6,%r7,%r8}, {%r9,%r10}, {%r11,%r12};",
        "st.global.v8.b64 [%d0], {%d1,%d2,%d3,%d4,%d5,%d6,%d7,%d8};",
    ],
)
def test_operands_that_an_instruction_does_not_take(statement):
    with pytest.raises(Fault, match="not emulated"):
        Kernel(text(statement))


def test_copies_of_more_than_they_may():
    with pytest.raises(Fault, match="more than there is room for"):
        run("mov.b32 %r2, 4096; mov.b32 %r3, 0; cp.async.cg.shared.global [%r3], [%d0], 16, %r2;", words())


def test_a_branch_that_diverges_and_joins():
    out = torch.zeros(128, dtype=torch.int32)
    body = f"""{AT} {LANE} mov.b32 %r4, 0; setp.lt.u32 %p1, %r2, 10;
        @%p1 bra A; add.s32 %r4, %r4, 100; bra.uni B;
        A: add.s32 %r4, %r4, 1; setp.lt.s32 %p2, %r4, 3; @%p2 bra A;
        B: add.s32 %r4, %r4, 1000; st.global.b32 [%d11], %r4; mov.b64 %d13, %d1;"""
    assert not run(body, out, words())
    assert torch.equal(out, torch.where(torch.arange(128) % 32 < 10, 1003, 1100).int())


def test_barriers_in_divergent_code():
    """Warps may come one after the other, by any way; a barrier that a thread leaves out is a fault."""
    body = f"""{AT} {LANE} setp.eq.b32 %p1, %r3, 2; @%p1 bra FAR; bra.uni MEET;
        MEET: bar.sync 0; bra.uni END; FAR: st.shared.b32 [%r1], %r0; bra.uni MEET; END: mov.b64 %d13, %d1;"""
    assert not run(body, words(), words())
    for guard in (
        "setp.eq.b32 %p1, %r3, 2; @!%p1 bra OVER; bar.sync 0; OVER:",
        "setp.lt.u32 %p1, %r2, 7; @%p1 bar.sync 0;",
    ):
        with pytest.raises(Fault, match="barrier that not all threads"):
            run(f"{AT} {LANE} {guard} mov.b64 %d13, %d1;", words(), words())


def test_a_kernel_that_does_not_end():
    with pytest.raises(Fault, match="more instructions"):
        run("L: bra.uni L;", words(), threads=32)


@pytest.mark.parametrize(
    "statement", ["frobnicate.b32 %r4, %r5;", "add.s32 %r4, %d5, %r6;", "atom.global.cas.b32 %r4, [%d0], %r5;"]
)
def test_what_is_not_emulated_is_refused(statement):
    with pytest.raises(Fault, match="not emulated|other sizes"):
        Kernel(text(statement))


def test_a_register_that_is_not_declared():
    with pytest.raises(ValueError, match="not declared"):
        Kernel(text("add.s32 %r4, %q5, %r6;"))


# ---- cp.async

COPY = """shl.b32 %r1, %r0, 4; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d0, %d10; add.s64 %d12, %d1, %d10;
    cp.async.cg.shared.global [%r1], [%d12], 0x10, SIZE; cp.async.commit_group; WAIT SYNC
    xor.b32 %r5, %r1, 2032; ld.shared.v4.b32 {%r4, %r6, %r7, %r8}, [%r5];
    st.global.v4.b32 [%d11], {%r4, %r6, %r7, %r8};"""


@pytest.mark.parametrize("size", [16, 4, 0])
def test_copies_fill_up_with_zeros(size):
    given, out = words(512), torch.full((512,), -1, dtype=torch.int32)
    body = COPY.replace("SIZE", str(size)).replace("WAIT", "cp.async.wait_group 0;").replace("SYNC", "bar.sync 0;")
    assert not run(body, out, given)
    want = given.view(128, 4).clone()
    want[:, size // 4 :] = 0
    assert torch.equal(out.view(128, 4), want.flip(0))


@pytest.mark.parametrize(
    ("wait", "sync", "race"),
    [
        ("", "bar.sync 0;", "reads what cp.async may still write"),
        ("cp.async.wait_group 1;", "bar.sync 0;", "reads what cp.async may still write"),
        ("cp.async.wait_group 0;", "", "reads without a barrier after the write"),
    ],
)
def test_copies_are_waited_for(wait, sync, race):
    body = COPY.replace("SIZE", "16").replace("WAIT", wait).replace("SYNC", sync)
    races = run(body, torch.zeros(512, dtype=torch.int32), words(512))
    assert list(races) == [f"{race}: ld.shared.v4.b32"]


def test_groups_of_copies_are_waited_for_in_order():
    """Two groups: after a wait that leaves one, the first can be read and the second not."""
    body = """shl.b32 %r1, %r0, 2; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d0, %d10; add.s64 %d12, %d1, %d10;
        cp.async.ca.shared.global [%r1], [%d12], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r1+512], [%d12], 4; cp.async.commit_group;
        cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r4, [%r1+OFFSET]; st.global.b32 [%d11], %r4;"""
    out = torch.zeros(128, dtype=torch.int32)
    assert not run(body.replace("OFFSET", "0"), out, words())
    assert run(body.replace("OFFSET", "512"), out, words())


# ---- CTAs


def grid_of(body: str, *tensors: torch.Tensor, ctas: int) -> object:
    return Kernel(text(body, len(tensors))).run((ctas,), 32, 0, list(tensors))[0]


def test_ctas_must_not_write_the_same_memory():
    apart = "mov.u32 %r9, %ctaid.x; shl.b32 %r1, %r9, 5; add.s32 %r1, %r1, %r0; mul.wide.u32 %d10, %r1, 4;"
    body = "add.s64 %d11, %d0, %d10; st.global.b32 [%d11], %r1;"
    out = torch.zeros(96, dtype=torch.int32)
    assert not grid_of(apart + body, out, ctas=3)
    assert torch.equal(out, torch.arange(96, dtype=torch.int32))
    races = grid_of("mov.b32 %r1, %r0; mul.wide.u32 %d10, %r1, 4;" + body, out, ctas=2)
    assert list(races) == ["two CTAs write: st.global.b32"]


def test_atomic_additions_are_no_races():
    total = torch.zeros(1, dtype=torch.float32)
    add = "mov.b32 %r4, 0f3F800000; red.global.add.f32 [%d0], %r4;"
    assert not grid_of(add, total, ctas=3)
    assert total.item() == 96.0
    scoped = add.replace("red.global", "red.relaxed.cta.global")
    assert not grid_of(scoped, total, ctas=1) and grid_of(scoped, total, ctas=2)
    for ctas in (1, 2):  # a plain store among them is one
        assert grid_of(f"setp.eq.u32 %p1, %r0, 5; {add} @%p1 st.global.b32 [%d0], %r0;", total, ctas=ctas)
