"""Fourth kernel of the chunked delta rule: the outputs of all chunks at once, from the states that entered them.

    o_i = e^c_i S q_i + sum over j <= i of e^(c_i - c_j) (q_i . k_j) d_j        (q, k normalized, q scaled by DK^-0.5)

with S and d from `delta_state.py` (`entering`, `values`), c and the norms from `delta_gates.py`.

Grid (NV, chunks): as in `delta_solve.py`. A program makes the scores [64, 64] of its chunk once, in float32 registers,
and goes through the DV elements of its outputs in COLUMNS at a time: q S^T from memory, scores d on top, one store. q
and k are multiplied raw and the norms come after; scores and d meet as two terms each (`dot_wide`; low x low is left
out), so what is rounded is S, once, and the output.

Cost: 64 x (64 DK + DK DV + 3 x 64 DV) multiply-adds; traffic per token and head 2 DK for q and k (shared by the heads
on a key head in L2), DV DK / 64 of the state, 4 bytes x DV of d, DV out: the state's share is the largest, and it is
why chunks are not shorter. DEPTH: elements of q, k and S at a time, less than all where operands lie in registers
(RDNA).
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .compile_case import CompileCase
from .delta_gates import CHUNK_TOKENS, decay_between, locate_chunk
from .delta_solve import dot_wide, precision
from .target import Target


@triton.jit
def delta_output_kernel(
    qkv,
    table,
    decays,
    factors,
    norms,
    values,
    entering,
    out,
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
    depth = tl.arange(0, DEPTH)[None, :]
    q_tokens = qkv + first * qkv_stride + row[:, None] * qkv_stride + key_head * DK

    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for begin in range(0, DK, DEPTH):
        q = tl.load(q_tokens + begin + depth, mask=inside, other=0.0)
        k = tl.load(q_tokens + NK * DK + begin + depth, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    norm = norms + (chunk.to(tl.int64) * NK + key_head) * (2 * CHUNK) + row
    q_norm, k_norm = tl.load(norm), tl.load(norm + CHUNK)
    scores *= decay_between(decays + at * (2 * CHUNK), CHUNK) * (q_norm[:, None] * k_norm[None, :])
    scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)

    recall = tl.load(factors + at * (5 * CHUNK) + 4 * CHUNK + row)
    column = tl.arange(0, COLUMNS)
    for start in range(0, DV, COLUMNS):
        value = start + column
        result = tl.zeros((CHUNK, COLUMNS), tl.float32)
        states = entering + at * (DV * DK) + value[:, None] * DK
        for begin in range(0, DK, DEPTH):
            q = tl.load(q_tokens + begin + depth, mask=inside, other=0.0)
            s = tl.load(states + begin + depth)
            result = tl.dot(q, tl.trans(s), result, input_precision=PRECISION)
        result *= recall[:, None]
        d = tl.load(values + at * (DV * CHUNK) + value[:, None] * CHUNK + row[None, :])
        high = d.to(qkv.dtype.element_ty)
        result = dot_wide(scores, tl.trans(high), result, PRECISION)
        if qkv.dtype.element_ty != tl.float32:
            low = (d - high.to(tl.float32)).to(high.dtype)
            result = tl.dot(scores.to(high.dtype), tl.trans(low), result)
        tile = out + (first + row[:, None]) * (NV * DV) + head * DV + value[None, :]
        tl.store(tile, result.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class OutputConfiguration:
    """depth: elements of q, k and the state at a time. columns: of the output at a time."""

    depth: int
    columns: int
    num_warps: int


def output_configuration(target: Target, key_dim: int, value_dim: int, element_bytes: int) -> OutputConfiguration:
    """What compiles without spills for heads of 128: 64 columns where accumulators leave registers for them."""
    if element_bytes == 4:
        depth, columns, warps = 32, 16, 8
    elif target.name.startswith("gfx11"):
        depth, columns, warps = 64, 16, 4
    elif target.name.startswith("gfx9") or target.name in ("sm_90", "sm_100"):
        depth, columns, warps = 128, 64, 4
    else:
        depth, columns, warps = 128, 32, 4
    return OutputConfiguration(min(depth, key_dim), min(columns, value_dim), warps)


def compile_cases(target: Target, key_heads: int, value_heads: int) -> tuple[CompileCase, ...]:
    """Heads of 128 in bf16."""
    use = output_configuration(target, 128, 128, 2)
    return (
        CompileCase(
            name="delta_output",
            kernel=delta_output_kernel,
            signature={"qkv": "*bf16", "table": "*i32", "decays": "*fp32", "factors": "*fp32", "norms": "*fp32"}
            | {"values": "*fp32", "entering": "*bf16", "out": "*bf16", "qkv_stride": "i32"},
            constants={"NK": key_heads, "NV": value_heads, "DK": 128, "DV": 128, "CHUNK": CHUNK_TOKENS}
            | {"DEPTH": use.depth, "COLUMNS": use.columns, "PRECISION": precision(target, 2)},
            aligned=("qkv", "table", "decays", "factors", "norms", "values", "entering", "out", "qkv_stride"),
            num_warps=use.num_warps,
            num_stages=1,
            matrix=True,
        ),
    )
