"""Third kernel of the chunked delta rule, the sequential one: carries the state of a head from chunk to chunk.

Per chunk, with w and u from `delta_solve.py` and the factors of `delta_gates.py`:

    entering <- S        d = u - w S^T        S <- e^c_64 S + (e^(c_64 - c) d)^T K

`entering` [chunks, NV, DV, DK] (qkv's dtype) and d (float32, in place of u in `values`) are what `delta_output.py`
needs to make the outputs of all chunks at once. The state comes from state[slots[b]] and goes back there at the end of
the sequence; a negative slot starts from zeros and stores nothing.

Grid (DV / ROWS, NV, B): rows of the state, one for each element of a value, do not know of each other, so a program
takes ROWS of them through all chunks of its sequence. S^T would be the textbook's form; here S is [ROWS, DK] as it is
in memory, d is [ROWS, 64], and both products keep rows where they are: S (as the left operand) and d are made from
accumulators of the product before, w and k are the right operands and stream in from memory, 16 bytes per thread.

S stays in float32 registers. It meets w in one term of qkv's dtype (the same rounding is stored in `entering`), d meets
k in two (`dot_wide`): what is added to the state must not carry the error of a rounded d, for the state forgets slowly.

Cost: 3 x 64 x DK x ROWS multiply-adds per chunk, one after the other; traffic per program and chunk 64 x DK w and k
each, and 256 bytes in and out per row. Programs of one head read the same w and k at about the same time: from L2. How
many rows and stages is a trade of programs against shared memory: sm_80, 90 and 100 have room for 64 rows (wgmma needs
them) and their next chunk; 32 rows leave two programs per processor where there are 100 KiB. RDNA holds right operands
in registers as a whole, so there 16 tokens at a time (PIECE) go through both products; the S that meets w stays the one
from before the chunk.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .compile_case import CompileCase
from .delta_gates import CHUNK_TOKENS, SHORT_TOKENS
from .delta_solve import dot_wide, precision
from .sequences import count_blocks
from .target import Target


@triton.jit
def _advance(
    held,
    entering,
    keys,
    values,
    factors,
    k_tokens,
    piece,
    rows,
    value,
    qkv_stride,
    DK: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """held after tokens piece..piece + PIECE of the chunk whose tensors the pointers begin; its decay is in it
    already."""
    row = piece + tl.arange(0, PIECE)
    key = tl.arange(0, DK)
    w = tl.load(keys + row[:, None] * DK + key[None, :])
    expected = tl.dot(entering, tl.trans(w), input_precision=PRECISION)  # [ROWS, PIECE]
    tile = values + value[:, None] * CHUNK + row[None, :]
    corrections = tl.load(tile) - expected
    tl.store(tile, corrections)
    fade = tl.load(factors + 3 * CHUNK + row)
    k = tl.load(k_tokens + row[:, None] * qkv_stride + key[None, :], mask=(row < rows)[:, None], other=0.0)
    return dot_wide(corrections * fade[None, :], k, held, PRECISION)


@triton.jit
def delta_state_kernel(
    qkv,
    state,
    slots,
    cu_seqlens,
    factors,
    remains,
    keys,
    values,
    entering,
    qkv_stride,
    NK: tl.constexpr,
    NV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    SHORT: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, sequence = tl.program_id(1), tl.program_id(2)
    first, start, end = count_blocks(cu_seqlens, sequence, BATCH, CHUNK, SHORT + 1)
    if end - start <= SHORT:
        return
    value = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, DK)
    slot = tl.load(slots + sequence).to(tl.int64)
    own = state + slot * (NV * DV * DK) + (head * DV + value[:, None]) * DK + key[None, :]
    held = tl.load(own, mask=value[:, None] < tl.where(slot >= 0, DV, 0), other=0.0).to(tl.float32)
    k_head = qkv + (NK + head // (NV // NK)) * DK
    for chunk in range(tl.cdiv(end - start, CHUNK)):
        at = (first + chunk).to(tl.int64) * NV + head
        token = start + chunk * CHUNK
        before = held.to(qkv.dtype.element_ty)
        tl.store(entering + at * (DV * DK) + value[:, None] * DK + key[None, :], before)
        held *= tl.load(remains + at)
        w, u, factor = keys + at * (CHUNK * DK), values + at * (DV * CHUNK), factors + at * (5 * CHUNK)
        k = k_head + token.to(tl.int64) * qkv_stride
        if PIECE == CHUNK:
            held = _advance(
                held, before, w, u, factor, k, 0, end - token, value, qkv_stride, DK, CHUNK, PIECE, PRECISION
            )
        else:
            for piece in range(0, CHUNK, PIECE):
                held = _advance(
                    held, before, w, u, factor, k, piece, end - token, value, qkv_stride, DK, CHUNK, PIECE, PRECISION
                )
    if slot >= 0:
        tl.store(own, held.to(state.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class StateConfiguration:
    """rows: of the state, per program. piece: tokens of a chunk that go through both products at once."""

    rows: int
    piece: int
    num_warps: int
    num_stages: int


def state_configuration(target: Target, value_dim: int, element_bytes: int) -> StateConfiguration:
    """What compiles without spills for heads of 128 and leaves the most in flight."""
    if element_bytes == 4 or target.name.startswith("gfx11"):
        rows, piece, stages = 16, 16, 1
    elif target.name.startswith("gfx12"):
        rows, piece, stages = 32, 16, 1
    elif target.backend == "hip" or target.shared_bytes < 128 * 1024:
        rows, piece, stages = 32, CHUNK_TOKENS, 2
    else:
        rows, piece, stages = 64, CHUNK_TOKENS, 2 if target.name == "sm_100" else 3
    return StateConfiguration(min(rows, value_dim), piece, 4, stages)


def compile_cases(target: Target, key_heads: int, value_heads: int) -> tuple[CompileCase, ...]:
    """Heads of 128 in bf16, a float32 state, one sequence."""
    use = state_configuration(target, 128, 2)
    return (
        CompileCase(
            name="delta_state",
            kernel=delta_state_kernel,
            signature={"qkv": "*bf16", "state": "*fp32", "slots": "*i32", "cu_seqlens": "*i32", "factors": "*fp32"}
            | {"remains": "*fp32", "keys": "*bf16", "values": "*fp32", "entering": "*bf16", "qkv_stride": "i32"},
            constants={"NK": key_heads, "NV": value_heads, "DK": 128, "DV": 128, "CHUNK": CHUNK_TOKENS}
            | {"SHORT": SHORT_TOKENS, "ROWS": use.rows, "PIECE": use.piece, "BATCH": 1}
            | {"PRECISION": precision(target, 2)},
            aligned=(
                "qkv",
                "qkv_stride",
                "state",
                "slots",
                "cu_seqlens",
                "factors",
                "remains",
                "keys",
                "values",
                "entering",
            ),
            num_warps=use.num_warps,
            num_stages=use.num_stages,
            matrix=True,
            large=("state",),
        ),
    )
