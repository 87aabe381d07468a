"""The report of machine code: what it reads out of a disassembly, and its model."""

from __future__ import annotations

import pytest

from bench.sass_model import blocks
from bench.sass_report import counts, ctas, loops, parse, pieces

LINES = """
        /*0000*/                   LDG.E R2, desc[UR18][R2.64] ;          /* 0x0000000c02027981 */
        /*0010*/                   MUFU.EX2 R1, R2 ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64], P1 ;
        /*0040*/                   LDGSTS.E [R5], desc[UR8][R2.64] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0080*/              @!P2 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
        /*10000*/                  NOP ;
"""


def test_a_disassembly_is_counted_by_loop():
    code = parse(LINES)
    assert [one.address for one in code][-2:] == [0xA0, 0x10000] and code[6].target == 0x20
    (inner,) = loops(code)  # not the one around it, nor the trap at the end
    assert [one.address for one in inner] == [0x20, 0x30, 0x40, 0x50, 0x60]
    found = counts(inner)
    assert found == {
        "instructions": 5, "products": 1, "exponentials": 0, "barriers": 1, "copies": 2, "narrow": 1, "loads": 0
    }  # fmt: skip
    outside = pieces("forward_kernel", code)["outside"]
    assert outside["instructions"] == 6 and outside["loads"] == 1 and outside["exponentials"] == 1
    with pytest.raises(ValueError, match="expected instructions"):
        parse("no code")


def test_what_fits_on_an_sm():
    assert ctas(255, 8, 114688) == 1  # eight warps of 256 registers a thread fill it
    assert ctas(158, 4, 57344) == 3
    assert ctas(128, 8, 40960) == 2
    assert ctas(16, 4, 0) == 16  # 64 warps
    assert ctas(32, 1, 100 * 1024) == 2  # shared memory


@pytest.mark.parametrize("kernel", ["forward", "gradient_kv"])
@pytest.mark.parametrize(("length", "group", "m", "n"), [(1, 1, 64, 64), (224, 4, 64, 64), (300, 3, 32, 128)])
def test_the_model_counts_blocks_as_the_masks_are(kernel, length, group, m, n):
    """Against the pairs of queries and keys themselves."""
    found = list(blocks(kernel, length, group, m, n))
    if kernel == "forward":
        for tile, (whole, masked) in enumerate(found):
            queries = [row // group for row in range(tile * m, min((tile + 1) * m, length * group))]
            assert whole * n <= queries[0] + 1  # all of the tile see these
            assert (whole + masked - 1) * n <= queries[-1] < (whole + masked) * n
        assert len(found) == -(-length * group // m)
    else:
        for tile, (whole, masked) in enumerate(found):
            keys = range(tile * n, min((tile + 1) * n, length))
            assert masked // group * m >= keys[-1] - keys[0]
            assert (whole + masked) // group == -(-(length - keys[0]) // m) and not (whole + masked) % group
