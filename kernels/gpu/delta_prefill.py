"""The gated delta rule over prompts: chunks of 64 tokens in four kernels, any number of sequences, state in and state
out.

    delta_gates    NK programs per chunk    cumulative decays, beta, norms: factors of rows and columns     a few bytes
    delta_solve    NV programs per chunk    (I + M)^-1 of the chunk, applied to its keys (w) and values (u)  parallel
    delta_state    NV DV / ROWS per sequence    S from chunk to chunk, corrections d = u - w S^T             sequential
    delta_output   NV programs per chunk    outputs from S and d                                             parallel

Each file says what its kernel computes, how it is tiled and what it costs; the math is in `reference/delta.py`. Why
four: a single kernel that did all of it for a chunk would hold keys, values, state, scores and the inverse at once, and
spills on every target (on sm_100 it asks for more tensor memory than there is, and compiles to nothing). The split is
that of flash-linear-attention (fla/ops/gated_delta_rule/chunk_fwd.py, common/chunk_delta_h.py, chunk_o.py) with its
first two kernels in one; what differs is the precision (no normalized copies of q and k, two terms where a rounded
operand would be multiplied) and the V-major state.

The host never waits for the device: how many chunks there are follows from cu_seqlens, which only the device knows, so
kernels are launched for the most there can be and find their chunks themselves (`sequences.py`).

Error against float64, in bfloat16: that of rounding the output, plus a tenth (2^-9 / sqrt(3) on average), where
products of rounded operands, as elsewhere, double it and more for chunks of similar keys. The tenth is the state,
rounded to meet q (`entering`). In the first tokens of a prompt outputs are little but that: 1.4 times the rounding
alone for one token, with 1.9 seen among heads of 16 to 64 (few numbers, so chance has its say), 1.7 for 3 tokens, 1.35
at most for 17 and 1.25 from 24 on (120 to 900 random inputs each, with these roundings put into float64).

So sequences of up to SHORT_TOKENS = 16 tokens go token by token in float32 (`delta_recurrent.py`), whoever else is in
the batch: a result must not depend on that. Programs see how long their sequence is, the host does not, so every call
launches both. Cost: one more launch for long prompts, whose programs end after two loads; a call of up to 16 tokens in
all has this one instead of four, and no scratch. A state in two terms would do, too, at twice the scratch and traffic
of the states, which are the largest part of both.

Scratch, bytes per token (`prefill_scratch_bytes`; E = 2 for 16-bit inputs, 4 for float32), tokens of each sequence
rounded up to 64: NV (28 + 4 / 64) + 8 NK + 8 / 64 for gates, E NV DK for w, 4 NV DV for u and d, E NV DV DK / 64 for
states. With 16 and 32 heads of 128 (9B) that is 33.6 KiB + 8.1 KiB for d in float32: 41.8 KB in 16 bits.

Where there is no matrix unit for the dtype (`chunks_refused`), the same rule runs token by token
(`delta_recurrent.py`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import delta_gates, delta_output, delta_recurrent, delta_solve, delta_state
from .compile_case import CompileCase
from .delta_decode import check_delta_inputs
from .delta_gates import CHUNK_TOKENS, FACTORS, SHORT_TOKENS
from .sequences import MOST_GRID_BLOCKS, check_sequences, most_blocks, power_of_two, token_stride
from .target import Target, target_of


def gated_delta_rule_prefill(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    key_heads: int,
    workspace: Tensor | None = None,
) -> Tensor:
    """The delta rule over T tokens of B sequences -> [T, NV, DV] in qkv's dtype.

    qkv: [T, 2 NK DK + NV DV] bf16 | fp16 | fp32, the convolution's output: queries, keys, values; a, b: [T, NV] in any
    of these (token rows may lie apart in all three); A_log, dt_bias: [NV]; key_heads: NK, a divisor of NV; DK, DV:
    powers of two from 16 to 256. state: [slots, NV, DV, DK] float32 | bfloat16, read from slots[b] and replaced there,
    rounded once at the end; a fresh sequence has zeros, or a negative slot, for which nothing is stored. slots: int32
    [B], each once; cu_seqlens: int32 [B + 1] (`sequences.py`): rows from cu_seqlens[B] on are left as they were
    allocated. workspace: uint8, `prefill_scratch_bytes` of it; allocated where it is None. What is in it does not
    matter. ValueError where shapes, dtypes or strides do not fit.
    """
    if qkv.dim() != 2:
        raise ValueError(f"qkv is {list(qkv.shape)}: the delta rule of a prompt takes [T, C]")
    check_delta_inputs(qkv, a, b, A_log, dt_bias, state, key_heads)
    sequences = check_sequences(cu_seqlens, slots, qkv.device)
    tokens, (_, value_heads, value_dim, _) = qkv.shape[0], state.shape
    out = torch.empty((tokens, value_heads, value_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return out
    target = target_of(qkv.device)
    inputs = (qkv, a, b, A_log, dt_bias, state, slots, cu_seqlens, key_heads)
    if chunks_refused(target, qkv.dtype):
        delta_recurrent.launch_recurrent(*inputs, out)
        return out
    delta_recurrent.launch_recurrent(*inputs, out, SHORT_TOKENS)
    if tokens <= SHORT_TOKENS:
        return out
    if most_blocks(tokens, sequences, CHUNK_TOKENS) > MOST_GRID_BLOCKS:
        raise ValueError(f"{tokens} tokens in one call: give {(MOST_GRID_BLOCKS - sequences) * CHUNK_TOKENS} at most")
    _launch_chunks(target, *inputs, workspace, out)
    return out


def chunks_refused(target: Target, dtype: torch.dtype) -> str | None:
    """Why the chunked kernels do not run on a target in a dtype, so that prompts go token by token; None where they
    do."""
    if target.matrix_instruction is None:
        return f"{target.name}: Triton has no matrix unit there, prompts go through the delta rule token by token"
    if dtype == torch.float32 and target.name.startswith("gfx1"):
        return f"{target.name}: its matrix unit has no float32, prompts go through the delta rule token by token"
    return None


def prefill_scratch_bytes(
    tokens: int,
    sequences: int,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: int = 2,
) -> int:
    """Bytes of workspace for `tokens` tokens of `sequences` sequences, qkv having elements of `element_bytes`.

    As many chunks as there can be: sequences that are not multiples of 64 tokens cost up to 63 tokens each.
    """
    sizes = _scratch(tokens, sequences, key_heads, value_heads, key_dim, value_dim)
    return sum(_padded(count * (element_bytes if dtype is None else dtype.itemsize)) for count, dtype in sizes)


def _scratch(
    tokens: int, sequences: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int
) -> tuple[tuple[int, torch.dtype | None], ...]:
    """(elements, dtype or None for qkv's) of table, decays, factors, remains, norms, keys, values, entering."""
    chunks = most_blocks(tokens, sequences, CHUNK_TOKENS)
    rows = chunks * value_heads * CHUNK_TOKENS
    return (
        (2 * chunks, torch.int32),
        (2 * rows, torch.float32),
        (FACTORS * rows, torch.float32),
        (chunks * value_heads, torch.float32),
        (2 * chunks * key_heads * CHUNK_TOKENS, torch.float32),
        (rows * key_dim, None),
        (rows * value_dim, torch.float32),
        (chunks * value_heads * value_dim * key_dim, None),
    )


def _padded(size_bytes: int) -> int:
    """Every part begins at a multiple of 256 bytes, so that 128-bit loads are aligned."""
    return -(-size_bytes // 256) * 256


def _parts(
    workspace: Tensor, sizes: tuple[tuple[int, torch.dtype | None], ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The workspace cut up."""
    begin = 0
    for count, fixed in sizes:
        kind = fixed or dtype
        size_bytes = count * kind.itemsize
        yield workspace[begin : begin + size_bytes].view(kind)
        begin += _padded(size_bytes)


def _launch_chunks(
    target: Target,
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    key_heads: int,
    workspace: Tensor | None,
    out: Tensor,
) -> None:
    tokens, sequences = qkv.shape[0], slots.shape[0]
    _, value_heads, value_dim, key_dim = state.shape
    chunks = most_blocks(tokens, sequences, CHUNK_TOKENS)
    sizes = (tokens, sequences, key_heads, value_heads, key_dim, value_dim)
    needed_bytes = prefill_scratch_bytes(*sizes, qkv.element_size())
    if workspace is None:
        workspace = torch.empty(needed_bytes, dtype=torch.uint8, device=qkv.device)
    _check_workspace(workspace, needed_bytes, qkv.device)
    table, decays, factors, remains, norms, keys, values, entering = _parts(workspace, _scratch(*sizes), qkv.dtype)
    stride = token_stride("qkv", qkv)
    heads = {"NK": key_heads, "NV": value_heads, "DK": key_dim, "CHUNK": CHUNK_TOKENS}
    short = {"SHORT": SHORT_TOKENS, "BATCH": power_of_two(sequences)}
    precision = delta_solve.precision(target, qkv.element_size())
    solve = delta_solve.solve_configuration(target, key_dim, value_dim, qkv.element_size())
    carry = delta_state.state_configuration(target, value_dim, qkv.element_size())
    finish = delta_output.output_configuration(target, key_dim, value_dim, qkv.element_size())
    delta_gates.delta_gates_kernel[(key_heads, chunks)](
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
        key_dim**-0.5,
        stride,
        token_stride("a", a),
        token_stride("b", b),
        sequences,
        **heads,
        **short,
        num_warps=delta_gates.gates_warps(target),
    )
    delta_solve.delta_solve_kernel[(value_heads, chunks)](
        qkv,
        table,
        decays,
        factors,
        norms,
        keys,
        values,
        stride,
        **heads,
        DV=value_dim,
        DEPTH=solve.depth,
        COLUMNS=solve.columns,
        PRECISION=precision,
        num_warps=solve.num_warps,
        num_stages=1,
    )
    delta_state.delta_state_kernel[(value_dim // carry.rows, value_heads, sequences)](
        qkv,
        state,
        slots,
        cu_seqlens,
        factors,
        remains,
        keys,
        values,
        entering,
        stride,
        **heads,
        **short,
        DV=value_dim,
        ROWS=carry.rows,
        PIECE=carry.piece,
        PRECISION=precision,
        num_warps=carry.num_warps,
        num_stages=carry.num_stages,
    )
    delta_output.delta_output_kernel[(value_heads, chunks)](
        qkv,
        table,
        decays,
        factors,
        norms,
        values,
        entering,
        out,
        stride,
        **heads,
        DV=value_dim,
        DEPTH=finish.depth,
        COLUMNS=finish.columns,
        PRECISION=precision,
        num_warps=finish.num_warps,
        num_stages=1,
    )


def _check_workspace(workspace: Tensor, needed_bytes: int, device: torch.device) -> None:
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        raise ValueError(f"the workspace is {workspace.dtype} {list(workspace.shape)}: give contiguous uint8 [bytes]")
    if workspace.numel() < needed_bytes or workspace.device != device or workspace.data_ptr() % 16:
        raise ValueError(
            f"the workspace has {workspace.numel()} bytes on {workspace.device}: give {needed_bytes} on {device}, "
            "beginning at a multiple of 16"
        )


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """Qwen3.5-9B's heads, 16 and 32 of 128: the four kernels where they run, and the recurrent one."""
    heads = (16, 32)
    cases: tuple[CompileCase, ...] = ()
    if not chunks_refused(target, torch.bfloat16):
        for kernel in (delta_gates, delta_solve, delta_state, delta_output):
            cases += kernel.compile_cases(target, *heads)
    return cases + delta_recurrent.compile_cases(target, *heads)
