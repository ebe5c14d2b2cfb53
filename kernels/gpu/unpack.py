"""Quantized weights as a plain matrix, for the vendor's matmul: what remains of them with hundreds of rows of x.

Grid: (tiles of ROWS rows, blocks of 128 columns). A thread reads 16 bytes of codes and writes the 32 or 16 numbers they
stand for, in runs of 8 or 16 neighbouring columns: 128-bit loads and stores. (code - zero) is exact in float32, its
product with the scale is rounded to float32 and then to the dtype of the matrix, as `packing.dequantize` does.

Traffic: 2.5 bytes per int4 weight here and 2 more when the matmul reads them; `matmul_paths.py` has the table of when
that is worth it. Columns stay in the order of the codes (act-order is a matter of x), and nothing is written outside
[N, K].
"""

# pyright: reportPossiblyUnboundVariable=false
# (whether a name is bound is decided by the kernel's constants)

import triton
import triton.language as tl


@triton.jit
def unpack_kernel(
    codes,
    scales,
    zeros,
    out,
    N,
    K,
    padded_rows,
    blocks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """GROUP: columns per scale; 0 for one scale per row."""
    WORDS: tl.constexpr = 32 if BITS == 4 else 128
    RUN: tl.constexpr = 32 if BITS == 4 or GROUP % 128 != 0 else 128
    SHARED: tl.constexpr = 4 if GROUP % 128 == 0 else (2 if GROUP % 64 == 0 else 1)  # runs of 32 columns with one scale
    n, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    row = tl.where(n < padded_rows, n, 0)
    column = tl.arange(0, RUN)
    code_rows = codes + row.to(tl.int64)[:, None] * (blocks * WORDS) + block * WORDS + column[None, :]
    if BITS == 4:
        words = tl.load(code_rows)
    for j in tl.static_range(128 // RUN):
        at = block * 128 + j * RUN
        if j % SHARED == 0:
            near = (at // GROUP if GROUP > 0 else 0) * padded_rows + row
            scale = tl.load(scales + near).to(tl.float32)
            zero = tl.full([ROWS], 8.0 if BITS == 4 else 0.0, tl.float32)
            if zeros is not None:
                zero = tl.load(zeros + near).to(tl.float32)
        if BITS == 4:
            # 2^23 + nibble, exactly, without a conversion
            values = (((words >> (4 * j)) & 0xF).to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
            values -= zero[:, None] + 8388608.0
        else:
            values = tl.load(code_rows + j * RUN).to(tl.float32) - zero[:, None]
        inside = (n < N)[:, None] & (at + column < K)[None, :]
        place = out + n.to(tl.int64)[:, None] * K + at + column[None, :]
        tl.store(place, (values * scale[:, None]).to(out.dtype.element_ty), mask=inside)
