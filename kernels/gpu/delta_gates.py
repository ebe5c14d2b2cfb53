"""First kernel of the chunked delta rule: what a chunk of 64 tokens needs to know of its gates and norms.

Grid (NK, chunks of all sequences): a program reads q and k of one key head in one chunk, [64, DK] twice, and the gate
projections of the value heads on that key head. It writes per chunk and head, float32, the 64 tokens side by side, with
c_i = g_1 + ... + g_i inside the chunk, g = -e^A_log softplus(a + dt_bias), beta = sigmoid(b), |q| and |k| the l2 norms:

    table   [chunks, 2] int32      first token of the chunk and how many it has (0: there is no such chunk)
    decays  [chunks, NV, 2, 64]    c in two parts, high and low (below)
    factors [chunks, NV, 5, 64]    what rows and columns of the other kernels' matrices are multiplied by:
                                   0: beta / |k|             1: beta          2: beta e^c / |k|
                                   3: e^(c_64 - c) / |k|     4: e^c DK^-0.5 / |q|
    remains [chunks, NV]           e^c_64, what is left of the state after the chunk
    norms   [chunks, NK, 2, 64]    DK^-0.5 / |q|, 1 / |k|

q and k are not stored normalized: the other kernels multiply the raw tensors, whose products are exact, and put the
norms into rows and columns of float32 results. That is one rounding less per element, and 8 bytes per token and head
instead of 4 DK.

Decays are used as e^(c_i - c_j), i >= j. After a reset (g very negative) c is large, and the difference of two of them
has lost digits. So c = high + low: high sums g rounded to multiples of 2^-11 (exact in float32 up to 2^13), low the
rest (below 2^-12 each). g is held at -128 here, where e^g is 0 in float32 already: 64 of them stay at 2^13, and g =
-inf makes no inf - inf. No exponent is ever positive.

Rows past the end of a sequence get g = 0, beta = 0 and zero vectors: they change nothing in a chunk, and c_64 is that
of the last token. All rows of a chunk are written, so nothing uninitialized is read later.

Traffic: q and k once, 2 DK + 4 values in, 28 NV + 8 NK bytes out per token: a hundredth of the whole. It is a kernel of
its own so that the sequential one (`delta_state.py`) finds its factors ready, and because every other one needs them.
"""

import triton
import triton.language as tl

from .compile_case import CompileCase
from .delta_decode import L2_EPS, softplus
from .sequences import locate_block
from .target import Target

CHUNK_TOKENS = 64
SHORT_TOKENS = 16
"""Sequences of up to so many tokens have no chunks: `delta_recurrent.py` takes them."""
FACTORS = 5
LEAST_G: tl.constexpr = tl.constexpr(-128.0)


@triton.jit
def delta_gates_kernel(
    qkv,
    a,
    b,
    A_log,
    dt_bias,
    cu_seqlens,
    table,
    decays,
    factors,
    remains,
    norms,
    scale,
    qkv_stride,
    a_stride,
    b_stride,
    batch,
    NK: tl.constexpr,
    NV: tl.constexpr,
    DK: tl.constexpr,
    CHUNK: tl.constexpr,
    SHORT: tl.constexpr,
    BATCH: tl.constexpr,
):
    key_head, chunk = tl.program_id(0), tl.program_id(1)
    _, _, first, rows = locate_block(cu_seqlens, chunk, batch, BATCH, CHUNK, SHORT + 1)
    rows = tl.maximum(rows, 0)
    if key_head == 0:
        tl.store(table + chunk * 2, first)
        tl.store(table + chunk * 2 + 1, rows)
    if rows == 0:
        return
    row = tl.arange(0, CHUNK)
    inside = row < rows
    token = first.to(tl.int64) + row
    tile = qkv + token[:, None] * qkv_stride + key_head * DK + tl.arange(0, DK)[None, :]
    q = tl.load(tile, mask=inside[:, None], other=0.0).to(tl.float32)
    k = tl.load(tile + NK * DK, mask=inside[:, None], other=0.0).to(tl.float32)
    q_norm = tl.rsqrt(tl.sum(q * q, 1) + L2_EPS) * scale
    k_norm = tl.rsqrt(tl.sum(k * k, 1) + L2_EPS)
    norm = norms + (chunk.to(tl.int64) * NK + key_head) * (2 * CHUNK) + row
    tl.store(norm, q_norm)
    tl.store(norm + CHUNK, k_norm)
    for member in tl.static_range(NV // NK):
        head = key_head * (NV // NK) + member
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
        step = tl.load(a + token * a_stride + head, mask=inside, other=0.0).to(tl.float32)
        g = -rate * softplus(step + tl.load(dt_bias + head).to(tl.float32))
        g = tl.where(inside, tl.where(g < LEAST_G, LEAST_G, g), 0.0)  # not tl.maximum: a NaN stays one
        coarse = tl.floor(g * 2048.0 + 0.5) * (1.0 / 2048.0)
        high, low = tl.cumsum(coarse, 0), tl.cumsum(g - coarse, 0)
        end_high, end_low = tl.sum(coarse, 0), tl.sum(g - coarse, 0)
        strength = tl.load(b + token * b_stride + head, mask=inside, other=0.0).to(tl.float32)
        beta = tl.where(inside, 1.0 / (1.0 + tl.exp(-strength)), 0.0)
        since_start = tl.exp(high + low)
        at = chunk.to(tl.int64) * NV + head
        tl.store(decays + at * (2 * CHUNK) + row, high)
        tl.store(decays + at * (2 * CHUNK) + CHUNK + row, low)
        tl.store(remains + at, tl.exp(end_high + end_low))
        factor = factors + at * (5 * CHUNK) + row
        tl.store(factor, beta * k_norm)
        tl.store(factor + CHUNK, beta)
        tl.store(factor + 2 * CHUNK, beta * k_norm * since_start)
        tl.store(factor + 3 * CHUNK, k_norm * tl.exp((end_high - high) + (end_low - low)))
        tl.store(factor + 4 * CHUNK, q_norm * since_start)


@triton.jit
def locate_chunk(table, chunk, head, NK: tl.constexpr, NV: tl.constexpr):
    """(first token of a chunk, how many it has, key head of a value head, where chunk and head are in `factors`)."""
    first = tl.load(table + chunk * 2).to(tl.int64)
    return first, tl.load(table + chunk * 2 + 1), head // (NV // NK), chunk.to(tl.int64) * NV + head


@triton.jit
def decay_between(decays, CHUNK: tl.constexpr):
    """e^(c_i - c_j) [CHUNK, CHUNK] of a chunk and head for i >= j, 1 above the diagonal. decays: where its c begins."""
    row = tl.arange(0, CHUNK)
    high, low = tl.load(decays + row), tl.load(decays + CHUNK + row)
    stretch = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(row[:, None] >= row[None, :], stretch, 0.0))


def gates_warps(target: Target) -> int:
    """256 threads for a tile of 64 x 128, twice."""
    return 256 // target.warp_threads


def compile_cases(target: Target, key_heads: int, value_heads: int) -> tuple[CompileCase, ...]:
    """Heads of 128 in bf16, one sequence."""
    return (
        CompileCase(
            name="delta_gates",
            kernel=delta_gates_kernel,
            signature={"qkv": "*bf16", "a": "*bf16", "b": "*bf16", "A_log": "*fp32", "dt_bias": "*fp32"}
            | {"cu_seqlens": "*i32", "table": "*i32", "decays": "*fp32", "factors": "*fp32", "remains": "*fp32"}
            | {"norms": "*fp32", "scale": "fp32"}
            | {"qkv_stride": "i32", "a_stride": "i32", "b_stride": "i32", "batch": "i32"},
            constants={"NK": key_heads, "NV": value_heads, "DK": 128, "CHUNK": CHUNK_TOKENS}
            | {"SHORT": SHORT_TOKENS, "BATCH": 1},
            aligned=("qkv", "A_log", "dt_bias", "cu_seqlens", "table", "decays", "factors", "norms", "qkv_stride"),
            num_warps=gates_warps(target),
        ),
    )
