"""The gated delta rule for decoding: S = 1..8 new tokens of each sequence in one kernel, state updated in place.

From the convolution's output and the two gate projections to the output of the rule: softplus gate, sigmoid beta,
l2norm of q and k, scale of q, decay, correction and read-out are all in here (the math: `reference/delta.py`). State
storage is float32 or bfloat16, arithmetic is float32; over the S tokens the state stays in registers as float32, and
what is stored after each of them is rounded on its own.

Grid (DV / ROWS, NV, B): a program owns ROWS rows of one head's state [DV, DK], of which nobody else reads or writes a
byte. So source and target slots of a sequence may be any, also the same: the rows are read before any is written.

Tile. State rows lie one after the other (V-major), so a row times k is a sum over neighbouring elements. Left to itself
Triton gives a whole warp to one row of 128, and every row costs five shuffles for each of two sums. Here a row is cut
into DK / INNER pieces of 128 bytes, and the tile is [DK / INNER, ROWS, INNER]: 8 threads share a row (16 bytes each,
whole cache lines together), 4 rows lie side by side in a warp, and the pieces are added inside a thread before 3
shuffles for four rows. 4 KiB per warp are in flight at once (8 loads of 128 bits per thread).

One pass over the state per token: S k and S q of the old state are summed side by side, and with d = beta (v - e^g S k)

    S' = e^g S + d k^T        o = S' q = e^g (S q) + d (k . q)

so the output waits for no second reduction. One warp per program: no barrier, and 16 or more programs per processor.

Traffic per token and head: DV DK state elements in and, per stored slot, out; everything else is 1/60 of it. The l2norm
of q and k is done again by every program of a head: 2 DK elements from L1 against ROWS DK of state.

A negative source starts from zeros, a negative target stores nothing (a padded batch, a state nobody will read).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .sequences import MOST_STEP_TOKENS, check_step_slots, token_stride
from .target import Target, target_of

L2_EPS: tl.constexpr = tl.constexpr(1e-6)
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
STATE_DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@triton.jit
def softplus(x):
    """log(1 + e^x), good to a few roundings of itself however small: log(1 + t) by 2 artanh(t / (2 + t)), |t| <= 1.

    log(1.0 + t) would be good to a rounding of 1, which a gate multiplies by e^A_log, and the state remembers."""
    rest = tl.exp(-tl.abs(x))
    s = rest / (2.0 + rest)
    square = s * s
    series = 1.0 / 13.0 + square * (1.0 / 15.0)
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return tl.maximum(x, 0.0) + 2.0 * (s + s * square * series)


@triton.jit
def state_tile(
    state,
    slot,
    head,
    NV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The program's part of a head's state: its rows [ROWS] and keys [PIECES, INNER], pointers to it in slot 0, and
    what slot `slot` has there in float32, zeros where that is negative."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, DK // INNER)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    tile = state + (head * DV * DK + row[None, :, None] * DK + key[:, None, :])
    readable = row[None, :, None] < tl.where(slot >= 0, DV, 0)
    return row, key, tile, tl.load(tile + slot * (NV * DV * DK), mask=readable, other=0.0).to(tl.float32)


@triton.jit
def delta_token(state, q, k, v, a, b, A_log, dt_bias, scale):
    """One token on a tile of state: (outputs [ROWS], new state). state: [PIECES, ROWS, INNER] float32; q, k: [PIECES,
    INNER] as the convolution left them; v: [ROWS]; a, b, A_log, dt_bias: scalars; all float32."""
    q_norm = tl.rsqrt(tl.sum(tl.sum(q * q, 0), 0) + L2_EPS) * scale
    k_norm = tl.rsqrt(tl.sum(tl.sum(k * k, 0), 0) + L2_EPS)
    q, k = q * q_norm, k * k_norm
    decay = tl.exp(-tl.exp(A_log) * softplus(a + dt_bias))
    beta = 1.0 / (1.0 + tl.exp(-b))
    predicted = tl.sum(tl.sum(state * k[:, None, :], 0), 1) * decay
    recalled = tl.sum(tl.sum(state * q[:, None, :], 0), 1) * decay
    correction = (v - predicted) * beta
    state = state * decay + correction[None, :, None] * k[:, None, :]
    return recalled + correction * tl.sum(tl.sum(q * k, 0), 0), state


@triton.jit
def delta_step_kernel(
    qkv,
    a,
    b,
    A_log,
    dt_bias,
    state,
    source,
    target,
    out,
    scale,
    qkv_stride,
    a_stride,
    b_stride,
    NK: tl.constexpr,
    NV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    slot = tl.load(source + sequence).to(tl.int64)
    row, key, tile, held = state_tile(state, slot, head, NV, DK, DV, ROWS, INNER)
    A_log_head = tl.load(A_log + head).to(tl.float32)
    dt_bias_head = tl.load(dt_bias + head).to(tl.float32)
    key_head = head // (NV // NK)
    for token in range(TOKENS):
        at = sequence.to(tl.int64) * TOKENS + token
        columns = qkv + at * qkv_stride
        q = tl.load(columns + key_head * DK + key).to(tl.float32)
        k = tl.load(columns + NK * DK + key_head * DK + key).to(tl.float32)
        v = tl.load(columns + 2 * NK * DK + head * DV + row).to(tl.float32)
        a_head = tl.load(a + at * a_stride + head).to(tl.float32)
        b_head = tl.load(b + at * b_stride + head).to(tl.float32)
        result, held = delta_token(held, q, k, v, a_head, b_head, A_log_head, dt_bias_head, scale)
        tl.store(out + (at * NV + head) * DV + row, result.to(out.dtype.element_ty))
        goal = tl.load(target + at).to(tl.int64)
        if goal >= 0:
            tl.store(tile + goal * (NV * DV * DK), held.to(state.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class StepConfiguration:
    """rows: of the state, per program. inner: neighbouring elements of a row that stay together in the tile."""

    rows: int
    inner: int
    num_warps: int


def step_configuration(target: Target, key_dim: int, value_dim: int, state_bytes: int) -> StepConfiguration:
    """One warp with 4 KiB of state, in pieces of 128 bytes; state_bytes: of one element."""
    inner = min(key_dim, 128 // state_bytes)
    rows = min(value_dim, max(1, 128 * target.warp_threads // (key_dim * state_bytes)))
    return StepConfiguration(rows, inner, 1)


def gated_delta_rule_step(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    source: Tensor,
    target: Tensor,
    key_heads: int,
) -> Tensor:
    """S = 1..8 tokens of each of B sequences -> [B, S, NV, DV] in qkv's dtype.

    qkv: [B, S, 2 NK DK + NV DV] bf16 | fp16 | fp32, the convolution's output: queries, keys, values; a, b: [B, S, NV]
    in any of these dtypes (token rows may lie apart in all three); A_log, dt_bias: [NV]; state: [slots, NV, DV, DK]
    float32 | bfloat16, read from slots source[b] and written to target[b, s] after token s; key_heads: NK, a divisor of
    NV. DK and DV are powers of two from 16 on. A target must not be another sequence's source or target. ValueError
    where shapes, dtypes or strides do not fit.
    """
    if qkv.dim() != 3 or not 1 <= qkv.shape[1] <= MOST_STEP_TOKENS:
        raise ValueError(f"qkv is {list(qkv.shape)}: a step takes [B, S, C] with S from 1 to {MOST_STEP_TOKENS}")
    batch, tokens, _ = qkv.shape
    check_delta_inputs(qkv, a, b, A_log, dt_bias, state, key_heads)
    check_step_slots(source, target, batch, tokens, qkv.device)
    _, value_heads, value_dim, key_dim = state.shape
    out = torch.empty((batch, tokens, value_heads, value_dim), dtype=qkv.dtype, device=qkv.device)
    if batch == 0:
        return out
    use = step_configuration(target_of(qkv.device), key_dim, value_dim, state.element_size())
    delta_step_kernel[(value_dim // use.rows, value_heads, batch)](
        qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        source,
        target,
        out,
        key_dim**-0.5,
        token_stride("qkv", qkv),
        token_stride("a", a),
        token_stride("b", b),
        NK=key_heads,
        NV=value_heads,
        DK=key_dim,
        DV=value_dim,
        TOKENS=tokens,
        ROWS=use.rows,
        INNER=use.inner,
        num_warps=use.num_warps,
    )
    return out


def check_delta_inputs(
    qkv: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor, key_heads: int
) -> None:
    """ValueError where the tensors are not what the kernels of the delta rule read."""
    if state.dim() != 4 or not state.is_contiguous() or state.dtype not in STATE_DTYPES:
        raise ValueError(
            f"state is {state.dtype} {list(state.shape)}: give contiguous float32 or bfloat16 [slots, NV, DV, DK]"
        )
    _, value_heads, value_dim, key_dim = state.shape
    for name, size in (("DV", value_dim), ("DK", key_dim)):
        if size < 16 or size & (size - 1) or size > 256:
            raise ValueError(f"the state's {name} is {size}: the delta kernels take powers of two from 16 to 256")
    if key_heads < 1 or value_heads % key_heads:
        raise ValueError(f"{value_heads} value heads on {key_heads} key heads: give a divisor")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    if qkv.shape[-1] != channels or qkv.dtype not in DTYPES:
        raise ValueError(f"qkv is {qkv.dtype} {list(qkv.shape)}: give bf16, fp16 or fp32 with {channels} channels")
    for name, gates in (("a", a), ("b", b)):
        if gates.shape != (*qkv.shape[:-1], value_heads) or gates.dtype not in DTYPES:
            wanted = [*qkv.shape[:-1], value_heads]
            raise ValueError(f"{name} is {gates.dtype} {list(gates.shape)}: give {wanted} floats")
    for name, vector in (("A_log", A_log), ("dt_bias", dt_bias)):
        if vector.shape != (value_heads,) or vector.dtype not in DTYPES or not vector.is_contiguous():
            raise ValueError(f"{name} is {vector.dtype} {list(vector.shape)}: give contiguous [{value_heads}] floats")
    devices = {tensor.device for tensor in (qkv, a, b, A_log, dt_bias, state)}
    if len(devices) > 1:
        raise ValueError(f"the delta rule's tensors are on {', '.join(sorted(map(str, devices)))}: move them together")


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """Qwen3.5-9B's heads (16 and 32 of 128), bf16 (fp16 on Turing): float32 state, bf16 state, and 4 tokens."""
    kind = "*fp16" if target.capability == 75 else "*bf16"
    cases = []
    for name, state, tokens in (("f32", "*fp32", 1), ("bf16", "*bf16", 1), ("f32_s4", "*fp32", 4)):
        use = step_configuration(target, 128, 128, 4 if state == "*fp32" else 2)
        cases.append(
            CompileCase(
                name=f"delta_step/{name}",
                kernel=delta_step_kernel,
                signature={name: kind for name in ("qkv", "a", "b", "out")}
                | {"A_log": "*fp32", "dt_bias": "*fp32", "state": state, "source": "*i32", "target": "*i32"}
                | {"scale": "fp32", "qkv_stride": "i32", "a_stride": "i32", "b_stride": "i32"},
                constants={"NK": 16, "NV": 32, "DK": 128, "DV": 128, "TOKENS": tokens}
                | {"ROWS": use.rows, "INNER": use.inner},
                aligned=("qkv", "A_log", "dt_bias", "state", "source", "target", "out", "qkv_stride"),
                num_warps=use.num_warps,
                wide_loads=tokens == 1,  # the loop over tokens loads but q, k and v; the state came before it
                large=("state",),
            )
        )
    return tuple(cases)
