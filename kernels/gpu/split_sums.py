"""Sums of a matmul whose columns were split among programs, added in the order of the splits: the same bits every time.

Grid: (tiles of COLUMNS columns, rows). A thread reads four neighbouring float32 sums of every split at once, adds them,
adds the bias and rounds once, to the result's dtype. Atomic adds would save this launch and cost a zeroed buffer, a
second rounding and the order of the additions.
"""

import triton
import triton.language as tl


@triton.jit
def add_splits_kernel(sums, bias, out, M, N, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [M, N] = sums [SPLITS, M, N] added up + bias [N] (None: none)."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < N
    stride = tl.cast(M, tl.int64) * N
    total = tl.load(sums + m * N + n, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums + split * stride + m * N + n, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=inside)
