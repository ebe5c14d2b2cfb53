"""What quantized codes stand for, inside Triton kernels: int4 and int8 to numbers without a conversion instruction.

A small integer q is or-ed into the mantissa of a float whose last place is worth 1: the result is 2^p + q, exactly, and
subtracting 2^p + zero gives q - zero, exactly. With p = 7 (bfloat16, 0x4300), 10 (float16, 0x6400) or 23 (float32,
0x4B000000). Scales are never applied here: whoever sums q - zero multiplies the sums, in float32.

The zero point is taken off as float16 or bfloat16, two at a time (half an instruction per weight), with one exception,
`EMULATED`: ROCm has no bfloat16 arithmetic, and a subtraction made of float32 ones costs 6 instructions per weight in
gfx942's listing. There int4 leaves it to a second `tl.dot`, of x with -(2^p + zero), for the matrix unit is idle while
few tokens are decoded; and int8 goes through float32, of which the upper half is the bfloat16.

Two nibbles, or four bytes, become floats by a few instructions on 32 bits where `ASSEMBLY` is set (CUDA: 0.9 logic
instructions per int4 weight against 2.4 to 3.4 for Triton's own code on 16-bit words; int8 without the slow I2F of
sm_80 to sm_89). The twins in pure Triton give the same bits; kernels take either.
"""

import triton
import triton.language as tl


@triton.jit
def magic_number(BITS: tl.constexpr, dtype: tl.constexpr):
    """2^p where it is taken off together with the zero point: int4. int8 is converted without it: 0."""
    magic: tl.constexpr = 1024.0 if dtype == tl.float16 else 128.0
    return magic if BITS == 4 else 0.0


@triton.jit
def int4_values(words, taken, J: tl.constexpr, dtype: tl.constexpr, EMULATED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Nibble J of uint16 words [N, 32], less `taken` [N] (2^p + zero; EMULATED: it is left in) -> dtype [N, 32]."""
    values = nibble_floats_by_assembly(words, J, dtype) if ASSEMBLY else nibble_floats(words, J, dtype)
    if not EMULATED:
        values -= taken[:, None]
    return values


@triton.jit
def nibble_floats(words, J: tl.constexpr, dtype: tl.constexpr):
    """2^p + nibble J of uint16 words, as float16 (p = 10) or bfloat16 (p = 7)."""
    magic: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
    return (((words >> (4 * J)) & 0xF) | magic).to(dtype, bitcast=True)


@triton.jit
def nibble_floats_by_assembly(words, J: tl.constexpr, dtype: tl.constexpr):
    """The same for two words at a time. (One string per type, so that the twin of each has a name.)"""
    if dtype == tl.float16:
        values = tl.inline_asm_elementwise(
            "{ .reg .b32 a; shr.u32 a, $1, %d; lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea; }" % (4 * J),  # noqa: UP031
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        values = tl.inline_asm_elementwise(
            "{ .reg .b32 a; shr.u32 a, $1, %d; lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea; }" % (4 * J),  # noqa: UP031
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return values


@triton.jit
def int8_values(codes, taken, ZEROS: tl.constexpr, dtype: tl.constexpr, EMULATED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int8 codes [N, n], less `taken` [N] (in float32 where EMULATED) where there are ZEROS -> dtype [N, n]."""
    if EMULATED:
        wide = codes.to(tl.float32)
        values = upper_half(wide - taken[:, None] if ZEROS else wide)
    else:
        values = int8_floats_by_assembly(codes, dtype) if ASSEMBLY else codes.to(dtype)
        if ZEROS:
            values -= taken[:, None]
    return values


@triton.jit
def int8_floats_by_assembly(codes, dtype: tl.constexpr):
    """int8 as float16 or bfloat16, four at a time."""
    if dtype == tl.float16:
        # 0x6400 | (code + 128) is 1024 + 128 + code
        values = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, m; mov.b32 m, 0x64806480; xor.b32 a, $2, 0x80808080;"
            " prmt.b32 b, a, 0x64646464, 0x4342; prmt.b32 a, a, 0x64646464, 0x4140;"
            " sub.f16x2 $0, a, m; sub.f16x2 $1, b, m; }",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        # bfloat16 holds seven of the eight bits: the sign, worth -128, makes -256 of the -128 that is added.
        values = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, one; mov.b32 one, 0x3f803f80;"
            " prmt.b32 a, $2, 0, 0x4140; prmt.b32 b, $2, 0, 0x4342;"
            " lop3.b32 c, a, 0x00800080, 0xc300c300, 0xea; lop3.b32 d, b, 0x00800080, 0xc300c300, 0xea;"
            " lop3.b32 a, a, 0x007f007f, 0x43004300, 0xea; lop3.b32 b, b, 0x007f007f, 0x43004300, 0xea;"
            " fma.rn.bf16x2 $0, a, one, c; fma.rn.bf16x2 $1, b, one, d; }",
            "=r,=r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return values


@triton.jit
def upper_half(values):
    """float32 integers of at most eight significant bits, as bfloat16: the lower half of their bits is 0."""
    return (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def expert_of_row(offsets, row, EXPERTS: tl.constexpr, SLOTS: tl.constexpr):
    """The expert whose rows offsets[e]:offsets[e + 1] include `row`; SLOTS: EXPERTS rounded up to a power of two."""
    expert = tl.arange(0, SLOTS)
    ends = tl.load(offsets + 1 + expert, mask=expert < EXPERTS, other=2147483647)
    return tl.sum((ends <= row).to(tl.int32), 0)


@triton.jit
def expert_of_tile(offsets, tile, ROWS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr):
    """Where the experts' rows are cut into tiles of ROWS, one expert each: (expert, first row, end) of that tile.

    The expert is EXPERTS or more where there are fewer tiles. Every program finds its own, from EXPERTS numbers that
    lie in the cache: so the host need not know how many rows an expert got.
    """
    expert = tl.arange(0, SLOTS)
    begins = tl.load(offsets + expert, mask=expert < EXPERTS, other=0)
    ends = tl.load(offsets + 1 + expert, mask=expert < EXPERTS, other=0)
    tiles = (ends - begins + ROWS - 1) // ROWS
    last_tiles = tl.cumsum(tiles, 0)
    chosen = tl.sum((last_tiles <= tile).to(tl.int32), 0)
    here = expert == chosen
    first_tile = tl.sum(tl.where(here, last_tiles - tiles, 0), 0)
    begin = tl.sum(tl.where(here, begins, 0), 0) + (tile - first_tile) * ROWS
    return chosen, begin, tl.sum(tl.where(here, ends, 0), 0)
