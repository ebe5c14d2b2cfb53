"""The gated delta rule over prompts, token by token: for short ones, and for devices where the chunked kernels have no
matrix unit to run on.

Those are Turing (Triton has no tensor cores below 8.0), and RDNA for float32 inputs (WMMA has no float32). Why short
prompts: `delta_prefill.py`. Same arguments, same results as the chunked rule; nothing but the state in and out and the
outputs touches memory, no scratch. Programs of sequences longer than `most_tokens` end at once.

Grid (DV / ROWS, NV, B); a program takes ROWS rows of a head's state through all tokens of its sequence, in the tile of
`delta_decode.py` and with its arithmetic (`delta_token`). q, k, v and the gates of the next token are loaded before the
current one is worked on, so that the loop waits for arithmetic and not for memory: two reductions of 3 shuffles, one
after the other with the update, per token.

Cost: 4 DK DV multiply-adds per token and head, against a tenth of that on matrix units in chunks. On a T4 the 32 heads
of the 9B are 2 million per token: at 4 TFLOP/s about 1 ms per layer and 2,048 tokens is what arithmetic alone takes (an
estimate).
"""

import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .delta_decode import delta_token, state_tile, step_configuration
from .sequences import token_stride
from .target import Target, target_of

ANY_LENGTH = 2**31 - 1


@triton.jit
def delta_recurrent_kernel(
    qkv,
    a,
    b,
    A_log,
    dt_bias,
    state,
    slots,
    cu_seqlens,
    out,
    scale,
    most_tokens,
    qkv_stride,
    a_stride,
    b_stride,
    NK: tl.constexpr,
    NV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    head, sequence = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    if (end <= start) | (end - start > most_tokens):
        return
    slot = tl.load(slots + sequence).to(tl.int64)
    row, key, tile, held = state_tile(state, slot, head, NV, DK, DV, ROWS, INNER)
    A_log_head = tl.load(A_log + head).to(tl.float32)
    dt_bias_head = tl.load(dt_bias + head).to(tl.float32)
    q_column = qkv + head // (NV // NK) * DK + key
    v_column = qkv + 2 * NK * DK + head * DV + row

    first = start.to(tl.int64)
    at = first
    q, k = tl.load(q_column + at * qkv_stride), tl.load(q_column + NK * DK + at * qkv_stride)
    v = tl.load(v_column + at * qkv_stride)
    a_head, b_head = tl.load(a + at * a_stride + head), tl.load(b + at * b_stride + head)
    for token in range(end - start):
        at = first + tl.minimum(token + 1, end - start - 1)  # the next one; the last is loaded once more
        next_q, next_k = tl.load(q_column + at * qkv_stride), tl.load(q_column + NK * DK + at * qkv_stride)
        next_v = tl.load(v_column + at * qkv_stride)
        next_a, next_b = tl.load(a + at * a_stride + head), tl.load(b + at * b_stride + head)
        result, held = delta_token(
            held,
            q.to(tl.float32),
            k.to(tl.float32),
            v.to(tl.float32),
            a_head.to(tl.float32),
            b_head.to(tl.float32),
            A_log_head,
            dt_bias_head,
            scale,
        )
        tl.store(out + ((first + token) * NV + head) * DV + row, result.to(out.dtype.element_ty))
        q, k, v, a_head, b_head = next_q, next_k, next_v, next_a, next_b
    if slot >= 0:
        tl.store(tile + slot * (NV * DV * DK), held.to(state.dtype.element_ty))


def launch_recurrent(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    key_heads: int,
    out: Tensor,
    most_tokens: int = ANY_LENGTH,
) -> None:
    """Fills out [T, NV, DV] and the states of the sequences of up to `most_tokens` tokens; the arguments are those of
    `delta_prefill.gated_delta_rule_prefill`, checked there."""
    _, value_heads, value_dim, key_dim = state.shape
    use = step_configuration(target_of(qkv.device), key_dim, value_dim, state.element_size())
    delta_recurrent_kernel[(value_dim // use.rows, value_heads, slots.shape[0])](
        qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        slots,
        cu_seqlens,
        out,
        key_dim**-0.5,
        most_tokens,
        token_stride("qkv", qkv),
        token_stride("a", a),
        token_stride("b", b),
        NK=key_heads,
        NV=value_heads,
        DK=key_dim,
        DV=value_dim,
        ROWS=use.rows,
        INNER=use.inner,
        num_warps=use.num_warps,
    )


def compile_cases(target: Target, key_heads: int, value_heads: int) -> tuple[CompileCase, ...]:
    """Heads of 128: fp16 on Turing; bf16, for short prompts, elsewhere; float32 too on RDNA."""
    use = step_configuration(target, 128, 128, 4)
    kinds = {"f16": "*fp16"} if target.capability == 75 else {"bf16": "*bf16"}
    if target.name.startswith("gfx1"):
        kinds["f32"] = "*fp32"
    return tuple(
        CompileCase(
            name=f"delta_recurrent/{name}",
            kernel=delta_recurrent_kernel,
            signature={"qkv": kind, "a": kind, "b": kind, "A_log": "*fp32", "dt_bias": "*fp32", "state": "*fp32"}
            | {"slots": "*i32", "cu_seqlens": "*i32", "out": kind, "scale": "fp32", "most_tokens": "i32"}
            | {"qkv_stride": "i32", "a_stride": "i32", "b_stride": "i32"},
            constants={"NK": key_heads, "NV": value_heads, "DK": 128, "DV": 128, "ROWS": use.rows, "INNER": use.inner},
            aligned=("qkv", "A_log", "dt_bias", "state", "slots", "cu_seqlens", "out", "qkv_stride"),
            num_warps=use.num_warps,
            wide_loads=False,  # the state is read once; the loop reads q, k and v, a few bytes per thread
            large=("state",),
        )
        for name, kind in kinds.items()
    )
