"""Second kernel of the chunked delta rule: the triangular system of a chunk, solved for all its keys and values at
once.

With M_ij = beta_i e^(c_i - c_j) (k_i . k_j) below the diagonal (k normalized, c from `delta_gates.py`) the corrections
of a chunk that meets the state S are d = (I + M)^-1 (beta v - beta e^c S k) = u - w S^T with

    u = (I + M)^-1 diag(beta) V      [64, DV]         w = (I + M)^-1 diag(beta e^c) K      [64, DK]

so that only u and w are left for the sequential kernel (`delta_state.py`). They are stored as

    keys   [chunks, NV, 64, DK]      w, in qkv's dtype
    values [chunks, NV, DV, 64]      u transposed, float32: values are rows of the state; the scan of chunks makes it d

Grid (NV, chunks): the value heads of a chunk run side by side and share its keys in L2. A program needs 64 x 64 x (DK +
2 DK + 2 DV) multiply-adds; k is read from memory twice, v once.

The inverse (I + M)^-1, all on chip:
    1. the four 16 x 16 blocks on the diagonal as one [4, 16, 16], by elimination: after step p row p is final, and
       every row below takes its share of it. Column p of M and row p of the inverse are sums in which one term is not
       masked, so only sums go between threads. On CUDA the rows of a block lie in one warp.
    2. 16 -> 32 -> 64 by (I + M)^-1 = [[P, 0], [-Q C P, Q]], C the block of M left of Q: two small products each.

Why not powers of M (I - M + M^2 ...): they need ten products of 64^3, and with equal keys and no decay their terms grow
to binomial coefficients of 63 and cancel, where elimination is exact. Blocks are taken apart by reshape, permute and
split, which move data only where threads must meet; there is no round trip through memory.

Precision. K K^T: raw bf16 or fp16, exact products, float32 sums. The inverse: float32; its small products in PRECISION
(tf32x3 on CUDA, float32 on CDNA, bf16x3 on RDNA, which has no float32 matrix unit). The inverse meets k and v as two
terms, high and low, of their dtype (`dot_wide`): two products for one, and 16 digits for 8. Chunks with much alike keys
need it, where a rounded inverse costs 4 times the error of everything else. For float32 inputs all products are in
PRECISION.

Registers are what limits it. Factors of columns are loaded after the inverse, where they are used: loaded before, they
cost a register per column for its whole length. On RDNA an operand of a product lies in registers as a whole, so K K^T
and the last two products run in pieces there (DEPTH, COLUMNS).
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .compile_case import CompileCase
from .delta_gates import CHUNK_TOKENS, decay_between, locate_chunk
from .target import Target


@triton.jit
def dot_wide(wide, narrow, accumulator, PRECISION: tl.constexpr):
    """accumulator + wide @ narrow with wide, float32, in two terms of narrow's dtype: an error of 2^-17 in bfloat16."""
    if narrow.dtype == tl.float32:
        return tl.dot(wide, narrow, accumulator, input_precision=PRECISION)
    high = wide.to(narrow.dtype)
    low = (wide - high.to(tl.float32)).to(narrow.dtype)
    return tl.dot(low, narrow, tl.dot(high, narrow, accumulator))


@triton.jit
def invert_unit_lower(below, PRECISION: tl.constexpr):
    """(I + below)^-1 of a strictly lower triangular float32 [64, 64]."""
    # The diagonal blocks: of the four columns of blocks, a sum keeps the one that is on the diagonal.
    blocks = tl.reshape(below, (4, 16, 4, 16))
    here = tl.arange(0, 4)[:, None, None, None] == tl.arange(0, 4)[None, None, :, None]
    diagonal = tl.sum(tl.where(here, blocks, 0.0), 2)
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    inverse = tl.where((row == column) & (tl.arange(0, 4)[:, None, None] >= 0), 1.0, 0.0)
    for step in range(15):
        shares = tl.sum(tl.where(column == step, diagonal, 0.0), 2)
        final = tl.sum(tl.where(row == step, inverse, 0.0), 1)
        inverse -= shares[:, :, None] * final[:, None, :]

    # 16 -> 32, both pairs at once: their corners are the lower left quarters of the two diagonal blocks of 32.
    upper, lower = tl.split(tl.permute(tl.reshape(inverse, (2, 2, 16, 16)), (0, 2, 3, 1)))
    blocks = tl.reshape(below, (2, 32, 2, 32))
    here = tl.arange(0, 2)[:, None, None, None] == tl.arange(0, 2)[None, None, :, None]
    pair = tl.sum(tl.where(here, blocks, 0.0), 2)
    left, _ = tl.split(tl.permute(tl.reshape(pair, (2, 32, 2, 16)), (0, 1, 3, 2)))
    _, corner = tl.split(tl.permute(tl.reshape(left, (2, 2, 16, 16)), (0, 2, 3, 1)))
    fill = tl.dot(tl.dot(lower, corner, input_precision=PRECISION), upper, input_precision=PRECISION)
    halves = tl.join(tl.join(upper, tl.zeros_like(upper)), tl.join(-fill, lower))  # [2, 16, 16, right, below]
    inverse = tl.reshape(tl.permute(halves, (0, 4, 1, 3, 2)), (2, 32, 32))

    # 32 -> 64
    upper, lower = tl.split(tl.permute(inverse, (1, 2, 0)))
    left, _ = tl.split(tl.permute(tl.reshape(below, (64, 2, 32)), (0, 2, 1)))
    _, corner = tl.split(tl.permute(tl.reshape(left, (2, 32, 32)), (1, 2, 0)))
    fill = tl.dot(tl.dot(lower, corner, input_precision=PRECISION), upper, input_precision=PRECISION)
    halves = tl.join(tl.join(upper, tl.zeros_like(upper)), tl.join(-fill, lower))  # [32, 32, right, below]
    return tl.reshape(tl.permute(halves, (3, 0, 2, 1)), (64, 64))


@triton.jit
def delta_solve_kernel(
    qkv,
    table,
    decays,
    factors,
    norms,
    keys,
    values,
    qkv_stride,
    NK: tl.constexpr,
    NV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, chunk = tl.program_id(0), tl.program_id(1)
    first, rows, key_head, at = locate_chunk(table, chunk, head, NK, NV)
    if rows == 0:
        return
    row = tl.arange(0, CHUNK)
    inside = (row < rows)[:, None]
    tokens = qkv + first * qkv_stride + row[:, None] * qkv_stride
    k_tokens, v_tokens = tokens + (NK + key_head) * DK, tokens + 2 * NK * DK + head * DV

    products = tl.zeros((CHUNK, CHUNK), tl.float32)
    for begin in range(0, DK, DEPTH):
        k = tl.load(k_tokens + begin + tl.arange(0, DEPTH)[None, :], mask=inside, other=0.0)
        products = tl.dot(k, tl.trans(k), products, input_precision=PRECISION)
    factor = factors + at * (5 * CHUNK) + row
    strength = tl.load(factor)
    norm = tl.load(norms + (chunk.to(tl.int64) * NK + key_head) * (2 * CHUNK) + CHUNK + row)
    products *= decay_between(decays + at * (2 * CHUNK), CHUNK) * (strength[:, None] * norm[None, :])
    inverse = invert_unit_lower(tl.where(row[:, None] > row[None, :], products, 0.0), PRECISION)

    column = tl.arange(0, COLUMNS)
    for_keys = inverse * tl.load(factor + 2 * CHUNK)[None, :]
    for begin in range(0, DK, COLUMNS):
        k = tl.load(k_tokens + begin + column[None, :], mask=inside, other=0.0)
        w = dot_wide(for_keys, k, tl.zeros((CHUNK, COLUMNS), tl.float32), PRECISION)
        tile = keys + at * (CHUNK * DK) + row[:, None] * DK + begin + column[None, :]
        tl.store(tile, w.to(keys.dtype.element_ty))
    for_values = inverse * tl.load(factor + CHUNK)[None, :]
    for begin in range(0, DV, COLUMNS):
        v = tl.load(v_tokens + begin + column[None, :], mask=inside, other=0.0)
        u = dot_wide(for_values, v, tl.zeros((CHUNK, COLUMNS), tl.float32), PRECISION)
        tl.store(values + at * (CHUNK * DV) + (begin + column[:, None]) * CHUNK + row[None, :], tl.trans(u))


def precision(target: Target, element_bytes: int) -> str:
    """How float32 operands are multiplied: as close to float32 as the matrix units come; tf32 alone is never enough."""
    if target.backend == "cuda":
        return "tf32x3"
    return "ieee" if target.name.startswith("gfx9") or element_bytes == 4 else "bf16x3"


@dataclass(frozen=True, slots=True)
class SolveConfiguration:
    """depth: keys' elements at a time in K K^T. columns: of w and u at a time."""

    depth: int
    columns: int
    num_warps: int


def solve_configuration(target: Target, key_dim: int, value_dim: int, element_bytes: int) -> SolveConfiguration:
    """What compiles without spills for heads of 128; smaller heads take all they have."""
    if element_bytes == 4:
        depth, columns, warps = 32, 16, 8
    elif target.name.startswith("gfx11"):
        depth, columns, warps = 64, 16, 4
    elif target.name.startswith("gfx12"):
        depth, columns, warps = 64, 32, 4
    else:
        depth, columns, warps = 128, 64, 4
    return SolveConfiguration(min(depth, key_dim), min(columns, key_dim, value_dim), warps)


def compile_cases(target: Target, key_heads: int, value_heads: int) -> tuple[CompileCase, ...]:
    """Heads of 128 in bf16."""
    use = solve_configuration(target, 128, 128, 2)
    return (
        CompileCase(
            name="delta_solve",
            kernel=delta_solve_kernel,
            signature={"qkv": "*bf16", "table": "*i32", "decays": "*fp32", "factors": "*fp32", "norms": "*fp32"}
            | {"keys": "*bf16", "values": "*fp32", "qkv_stride": "i32"},
            constants={"NK": key_heads, "NV": value_heads, "DK": 128, "DV": 128, "CHUNK": CHUNK_TOKENS}
            | {"DEPTH": use.depth, "COLUMNS": use.columns, "PRECISION": precision(target, 2)},
            aligned=("qkv", "table", "decays", "factors", "norms", "keys", "values", "qkv_stride"),
            num_warps=use.num_warps,
            num_stages=1,
            matrix=True,
        ),
    )
