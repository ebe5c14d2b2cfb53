"""Matrix times one to four vectors, with int4, int8 or unquantized weights, in plain float32: no matrix unit.

    out[m, n] = sum over groups g of scales[g, n] * (sum over columns k of g of x[m, k] * (code[n, k] - zero[g, n]))

For Turing, which has no matrix unit in Triton, for float32 x, and for devices whose arithmetic is far ahead of their
memory (`matmul_paths.py`). Everything is exact but the sums: float32 throughout.

Grid: (tiles of BN rows of the weight, splits of K, tiles of ROWS rows of x). A program reads BN x BLOCKS blocks of
codes per turn, as 32-bit words: a thread has four neighbouring words (128 bits) of some rows. Word i of a block holds
columns 2 i and 2 i + 1, each with its neighbours at 32, 64 and 96 above it (`layout/packing.py`). Or-ing (word & 15 <<
p) into the mantissa of 2^(23 - p) gives 2^(23 - p) + nibble without a shift for five nibbles of eight, and one shift
serves the
other three: 1.1 logic instructions per weight, one FADD that takes the magic number and 8 off, and one FFMA per row of
x. A thread adds up its products of a group (and x itself, where there are zero points), scales the sum, and goes on;
threads are summed once, at the end.

One warp per program, where nothing has to wait: x comes to all threads through shuffles, not through shared memory and
barriers. Splits of K write float32 sums [splits, M, N] that `split_sums.py` adds in order; without splits the program
adds the bias and rounds. Experts: a program has one row of x, and finds its expert from `offsets`.

Bounds: x is read at rows below M (the last one repeated) and columns below K, codes and scales within whole blocks of
padded rows; nothing is written outside [M, N].
"""

# pyright: reportPossiblyUnboundVariable=false
# (whether a name is bound is decided by the kernel's constants)

import triton
import triton.language as tl

from .code_values import expert_of_row


@triton.jit
def gemv_kernel(
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
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERT_SLOTS: tl.constexpr,
    PARTIAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """GROUP: columns per scale; 0 for one scale per row (or none: BITS = 16). int4 codes are given as int32.

    WHOLE: K is a multiple of 128 and every split one of BLOCKS blocks, so that nothing needs a mask.
    """
    # A chunk is what one thread holds of a row: 16 bytes of codes, all of one block. A run is 32 columns of each block
    # (int4: a nibble of the words), or all of them.
    WORDS: tl.constexpr = 16 if BITS == 4 else 128
    LANE: tl.constexpr = 4 if BITS == 4 else (16 if BITS == 8 else 8)
    RUNS: tl.constexpr = 4 if BITS == 4 else 1
    SHARED: tl.constexpr = 4 if GROUP % 128 == 0 else (2 if GROUP % 64 == 0 else 1)  # runs of a block with one scale
    CHUNKS: tl.constexpr = BLOCKS * WORDS // LANE

    split, m = tl.program_id(1), tl.program_id(2) * ROWS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.where(n < padded_rows, n, 0)
    first_row = tl.cast(0, tl.int64)
    if EXPERTS > 0:
        first_row += expert_of_row(offsets, m, EXPERTS, EXPERT_SLOTS).to(tl.int64) * padded_rows
    word = tl.arange(0, BLOCKS * WORDS)
    row_words = K if BITS == 16 else blocks * WORDS
    code_rows = codes + (first_row + row)[:, None] * row_words + word[None, :]
    groups = 1 if GROUP == 0 else (blocks * 128 + GROUP - 1) // GROUP
    scale_rows = (first_row * groups + row)[:, None]
    # The column of a chunk's first code in run 0, and of every x that the words of a run are multiplied with.
    chunk = tl.arange(0, CHUNKS) // (WORDS // LANE) * 128
    if BITS == 4:
        pair = tl.arange(0, 2 * BLOCKS * WORDS)
        column = pair // 32 * 128 + pair % 32
    else:
        chunk += tl.arange(0, CHUNKS) % (WORDS // LANE) * LANE
        column = word

    first_block = split * blocks_per_split
    end_block = tl.minimum(first_block + blocks_per_split, blocks)
    totals = (tl.zeros([BN, CHUNKS], tl.float32),) * ROWS
    for block in range(first_block, end_block, BLOCKS):
        if WHOLE:
            packed = tl.load(code_rows + block * WORDS)
        else:
            end = tl.minimum(end_block * WORDS, row_words)
            packed = tl.load(code_rows + block * WORDS, mask=(block * WORDS + word < end)[None, :], other=0)
        for j in tl.static_range(RUNS):
            if j % SHARED == 0:
                sums = (tl.zeros([BN, BLOCKS * WORDS], tl.float32),) * ROWS
                x_sums = (tl.zeros([BLOCKS * WORDS], tl.float32),) * ROWS
            if BITS == 4:
                low, high = _nibbles(packed, j)
            else:
                low = packed.to(tl.float32)
            new_sums, new_x_sums = (), ()
            for r in tl.static_range(ROWS):
                x_row = x + tl.minimum(m + r, M - 1).to(tl.int64) * x_stride
                at = block * 128 + j * 32 + column
                if WHOLE:
                    xs = tl.load(x_row + at).to(tl.float32)
                else:
                    xs = tl.load(x_row + at, mask=(at < K) & (at < end_block * 128), other=0.0).to(tl.float32)
                if BITS == 4:
                    x_low, x_high = tl.split(tl.reshape(xs, [BLOCKS * WORDS, 2]))
                    new_sums += (sums[r] + low * x_low[None, :] + high * x_high[None, :],)
                    xs = x_low + x_high
                else:
                    new_sums += (sums[r] + low * xs[None, :],)
                new_x_sums += (x_sums[r] + xs,)
            sums, x_sums = new_sums, new_x_sums
            if j % SHARED == SHARED - 1 or BITS != 4:
                new_totals = ()
                group = (block * 128 + j * 32 + chunk) // GROUP if GROUP > 0 else tl.zeros_like(chunk)
                near = scale_rows + (group * padded_rows)[None, :]
                inside = (block * 128 + chunk < end_block * 128)[None, :]
                for r in tl.static_range(ROWS):
                    total = tl.sum(tl.reshape(sums[r], [BN, CHUNKS, LANE]), 2)
                    if zeros is not None:
                        zero = tl.load(zeros + near, mask=inside, other=0.0).to(tl.float32) - (
                            8.0 if BITS == 4 else 0.0
                        )
                        total -= zero * tl.sum(tl.reshape(x_sums[r], [CHUNKS, LANE]), 1)[None, :]
                    if BITS != 16:
                        total *= tl.load(scales + near, mask=inside, other=0.0).to(tl.float32)
                    new_totals += (totals[r] + total,)
                totals = new_totals

    for r in tl.static_range(ROWS):
        result = tl.sum(totals[r], 1)
        if not PARTIAL and bias is not None:
            result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        place = (split.to(tl.int64) * M + m + r) * N + n
        tl.store(out + place, result.to(out.dtype.element_ty), mask=n < tl.where(m + r < M, N, 0))


@triton.jit
def _nibbles(words, J: tl.constexpr):
    """Nibble J of the lower and of the upper half of int32 words, less 8, in float32."""
    # Where the lower half's nibble stands, and the upper half's, once its nibbles 1 to 3 are shifted by 12.
    LOW: tl.constexpr = 4 * J
    HIGH: tl.constexpr = 16 if J == 0 else 4 * J + 4
    low = (words & (15 << LOW)) | ((150 - LOW) << 23)
    high = ((words if J == 0 else words >> 12) & (15 << HIGH)) | ((150 - HIGH) << 23)
    low = low.to(tl.float32, bitcast=True) - ((1 << (23 - LOW)) + 8)
    high = high.to(tl.float32, bitcast=True) - ((1 << (23 - HIGH)) + 8)
    return low, high
