"""Matmul of several rows with int4, int8 or unquantized weights on the matrix units: one kernel, two orientations.

    out[m, n] = sum over groups g of scales[g, n] * (sum over columns k of g of x[m, k] * (code[n, k] - zero[g, n]))

Codes become bfloat16 or float16 integers, exactly (`code_values.py`); the dot of a group is accumulated in float32 and
only then scaled, in float32. So weights are never rounded to 16 bits, and the error is that of the sums alone (5e-8 of
the result for bfloat16 x, before the result is rounded; dequantize-then-dot has 2e-3).

Grid: (tiles of rows of x * tiles of BN rows of the weight, splits of K). Rows of x are the inner index, so that
programs that run together read the same codes. A program walks over its blocks of 128 columns. In each it reads BN x 64
bytes of codes; a nibble of them is BN x 32 columns of one group (the picture is in `layout/packing.py`), which one
`tl.dot` takes together with x [BM, 32]. Read as 16-bit words in the layout of the dot's operand, the four nibbles of a
word are the same element of four operands: one shared-memory read serves four dots, and nothing is shuffled.

Orientation. WEIGHT_FIRST makes the weight the left operand: warps are laid along its rows, each decodes its own, and
the tensor cores of sm_90 take it from registers; right for tiles of 64 tokens or more. Otherwise x is the left operand,
which keeps 16 or 32 tokens on HMMA (with 16, sm_90's HGMMA takes 1 instruction per weight more, sm_100's UTCHMMA 2).

Splits of K (few tokens: the weight's rows alone do not fill the device) write float32 sums [splits, M, N], which
`split_sums.py` adds in order: the same bits in every run. Without splits the program adds the bias and rounds.

Experts (EXPERTS > 0): x is sorted by expert, tiles are cut within experts, and a program finds its own from `offsets`.

Bounds: x is read at its own rows and columns only (16 rows of a tile of which one is real cost the traffic of one),
codes and scales in whole blocks of padded rows; nothing is written outside [M, N]. Sizes that a 32-bit index might not
hold are multiplied in 64 bits.
"""

# pyright: reportPossiblyUnboundVariable=false
# (whether a name is bound is decided by the kernel's constants)

import triton
import triton.language as tl

from .code_values import expert_of_tile, int4_values, int8_values, magic_number


@triton.jit
def matmul_tiles_kernel(
    x,
    codes,
    scales,
    zeros,
    bias,
    offsets,
    out,
    M,
    N,
    K,
    x_stride,
    padded_rows,
    blocks,
    blocks_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERT_SLOTS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PARTIAL: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    EMULATED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """GROUP: columns per scale; 0 for one scale per row (or none: BITS = 16). Blocks are of 128 columns.

    WHOLE_BLOCKS: K is a multiple of 128. zeros, bias, offsets and, for BITS = 16, scales may be None.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    # Columns of one dot: a nibble of a block; of int8 as many bytes, 64.
    RUN: tl.constexpr = 64 if BITS != 4 and GROUP % 64 == 0 else 32
    STEP: tl.constexpr = 128 if GROUP % 128 == 0 else (64 if GROUP % 64 == 0 else 32)  # columns that share a scale

    program, split = tl.program_id(0), tl.program_id(1)
    expert = 0
    if EXPERTS == 0:
        row_tiles = tl.cdiv(M, BM)
        begin, end = (program % row_tiles) * BM, M
    else:
        row_tiles = tl.num_programs(0) // tl.cdiv(N, BN)
        expert, begin, end = expert_of_tile(offsets, program % row_tiles, BM, EXPERTS, EXPERT_SLOTS)
        if expert >= EXPERTS:
            return
    m = begin + tl.arange(0, BM)
    n = (program // row_tiles) * BN + tl.arange(0, BN)
    row = tl.where(n < padded_rows, n, 0)
    column = tl.arange(0, RUN)
    real = (m < end)[:, None]
    x_rows = x + m.to(tl.int64)[:, None] * x_stride + column[None, :]
    first_row = tl.cast(expert, tl.int64) * padded_rows
    row_words = K if BITS == 16 else blocks * (32 if BITS == 4 else 128)
    code_rows = codes + (first_row + row)[:, None] * row_words + column[None, :]
    scale_rows = row
    if BITS != 16:
        groups = 1 if GROUP == 0 else (blocks * 128 + GROUP - 1) // GROUP
        scale_rows = first_row * groups + row

    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, blocks)
    if BITS != 16 and GROUP == 0:
        scale = tl.load(scales + scale_rows).to(tl.float32)
        taken = _taken(zeros, scale_rows, 0, padded_rows, BN, BITS, dtype, EMULATED)
    total = tl.zeros([BN, BM] if WEIGHT_FIRST else [BM, BN], tl.float32)
    for block in range(first_block, last_block):
        if BITS == 4:
            packed = tl.load(code_rows + block * 32)
        part = total
        for j in tl.static_range(128 // RUN):
            if GROUP > 0 and (j * RUN) % STEP == 0:
                group = (block * 128 + j * RUN) // GROUP
                scale = tl.load(scales + scale_rows + group * padded_rows).to(tl.float32)
                taken = _taken(zeros, scale_rows, group, padded_rows, BN, BITS, dtype, EMULATED)
                part = tl.zeros_like(total)
            at = block * 128 + j * RUN
            if WHOLE_BLOCKS:
                xs = tl.load(x_rows + at, mask=real, other=0.0)
            else:
                xs = tl.load(x_rows + at, mask=real & ((at + column)[None, :] < K), other=0.0)
            if BITS == 4:
                values = int4_values(packed, taken, j, dtype, EMULATED, ASSEMBLY)
            elif BITS == 8:
                values = int8_values(tl.load(code_rows + at), taken, zeros is not None, dtype, EMULATED, ASSEMBLY)
            elif WHOLE_BLOCKS:
                values = tl.load(code_rows + at)
            else:
                values = tl.load(code_rows + at, mask=(at + column)[None, :] < K, other=0.0)
            if EMULATED and BITS == 4:
                part = _dot(xs, tl.broadcast_to(-taken[:, None], [BN, RUN]), part, WEIGHT_FIRST)
            part = _dot(xs, values, part, WEIGHT_FIRST)
            if GROUP > 0 and (j * RUN + RUN) % STEP == 0:
                total += part * (scale[:, None] if WEIGHT_FIRST else scale[None, :])
        if GROUP == 0:
            total = part
    if BITS != 16 and GROUP == 0:
        total *= scale[:, None] if WEIGHT_FIRST else scale[None, :]

    inside = (m[:, None] < end) & (n[None, :] < N)
    place = (split.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    if WEIGHT_FIRST:
        total = tl.trans(total)
    if not PARTIAL and bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dot(xs, values, total, WEIGHT_FIRST: tl.constexpr):
    """total + xs [BM, k] times values [BN, k], as [BN, BM] or [BM, BN]."""
    return tl.dot(values, tl.trans(xs), total) if WEIGHT_FIRST else tl.dot(xs, tl.trans(values), total)


@triton.jit
def _taken(
    zeros, rows, group, padded_rows, BN: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, EMULATED: tl.constexpr
):
    """What is taken off codes: their zero point and the magic number, in the type that it is taken off in."""
    magic = magic_number(BITS, dtype)
    if zeros is None:
        taken = tl.full([BN], (8.0 if BITS == 4 else 0.0) + magic, tl.float32)
    else:
        taken = tl.load(zeros + rows + group * padded_rows).to(tl.float32) + magic
    if BITS == 4 or not EMULATED:
        taken = taken.to(dtype)
    return taken
