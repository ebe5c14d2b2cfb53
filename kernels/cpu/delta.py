"""The gated delta rule on the CPU, a decode step and a prompt alike token by token in C (csrc/delta.h).

Signatures and meaning are those of `reference/delta.py`. A decode step reads and writes each state once. A prompt keeps
16 rows of a state in L1 while tokens pass: 512 tokens of 16 heads take a third of the time of chunks of 64 by torch's
batched matmuls or less. A result does not depend on where a prompt is cut into chunks, to the last bit where the state
is float32.
"""

import torch
from torch import Tensor

from ..reference import delta as reference_delta
from .library import CpuLibrary
from .norm import c_library
from .operations import Program, operation, pointer, rows_of, slots_of


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
    """qkv [B, S, 2 NK DK + NV DV], a, b [B, S, NV] -> [B, S, NV, DV]; state from source [B], after token s to target
    [B, S]."""
    library = _library(qkv, a, b, state)
    if library is None:
        return reference_delta.gated_delta_rule_step(qkv, a, b, A_log, dt_bias, state, source, target, key_heads)
    batch, steps, _width = qkv.shape
    heads, value_dim = state.shape[1:3]
    y = torch.empty(batch * steps, heads * value_dim, dtype=qkv.dtype)
    rows = [x.reshape(batch * steps, x.shape[-1]) for x in (qkv, a, b)]
    _run(library, "DELTA_STEP", rows, A_log, dt_bias, state, y, source, target, None, batch, steps, key_heads)
    return y.view(batch, steps, heads, value_dim)


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
) -> Tensor:
    """qkv [T, 2 NK DK + NV DV], a, b [T, NV] of several sequences -> [T, NV, DV]; state[slots[b]] is read and
    replaced."""
    library = _library(qkv, a, b, state)
    if library is None:
        return reference_delta.gated_delta_rule_prefill(qkv, a, b, A_log, dt_bias, state, slots, cu_seqlens, key_heads)
    heads, value_dim = state.shape[1:3]
    y = torch.empty(qkv.shape[0], heads * value_dim, dtype=qkv.dtype)
    inputs = (A_log, dt_bias, state, y, slots, None, cu_seqlens, slots.numel(), 0, key_heads)
    _run(library, "DELTA_PREFILL", [qkv, a, b], *inputs)
    return y.view(-1, heads, value_dim)


def _library(qkv: Tensor, a: Tensor, b: Tensor, state: Tensor) -> CpuLibrary | None:
    """The C kernels where they take these: heads of a multiple of 16 up to 256, state in float32 or bfloat16."""
    value_dim, key_dim = state.shape[-2:]
    sizes = all(size % 16 == 0 and size <= 256 for size in (value_dim, key_dim))
    narrow = state.dtype in (torch.float32, torch.bfloat16) and state.is_contiguous()
    return c_library(qkv, a, b) if sizes and narrow else None


def _run(
    library: CpuLibrary,
    kind: str,
    inputs: list[Tensor],
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    y: Tensor,
    source: Tensor,
    target: Tensor | None,
    cu_seqlens: Tensor | None,
    sequences: int,
    steps: int,
    key_heads: int,
) -> None:
    qkv, a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    A_log, dt_bias = A_log.float().contiguous(), dt_bias.float().contiguous()
    indices = [None if index is None else index.to(torch.int32).contiguous() for index in (source, target, cu_seqlens)]
    heads, value_dim, key_dim = state.shape[1:]
    rule = operation(
        kind,
        qkv=rows_of(qkv),
        a=rows_of(a),
        b=rows_of(b),
        state=slots_of(state),
        y=rows_of(y),
        a_log=pointer(A_log),
        dt_bias=pointer(dt_bias),
        source=pointer(indices[0]),
        target=pointer(indices[1]),
        cu_seqlens=pointer(indices[2]),
        sequences=sequences,
        steps=steps,
        key_heads=key_heads,
        value_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
    )
    program = Program(library)
    program.add(rule, qkv, a, b, A_log, dt_bias, state, y, indices)
    program.run()
