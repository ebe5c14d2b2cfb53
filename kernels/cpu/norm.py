"""Norms, rope and the causal convolution on the CPU: the operations of csrc/norm.h, csrc/conv.h and csrc/attention.h.

Signatures and meaning are those of `reference/dense.py`; float64 and what the C library cannot take go to the twins
there. Everything is computed in float32 and rounded once to the tensor's dtype.
"""

import torch
from torch import Tensor

from ..reference import attention as reference_attention
from ..reference import dense as reference
from .library import CpuLibrary, cpu_library
from .operations import DTYPES, Program, operation, pointer, rows_of, slots_of


def c_library(*tensors: Tensor) -> CpuLibrary | None:
    """The C kernels, if there are any and they know the dtypes of these tensors."""
    library = cpu_library()
    known = all(tensor.dtype in DTYPES and tensor.dtype != torch.int8 for tensor in tensors)
    return library if library.path == "c" and known else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] -> (1 + weight) * x / rms(x)."""
    library = c_library(x, weight)
    if library is None:
        return reference.rms_norm(x, weight, eps)
    rows, y = _flat(x), torch.empty(x.shape, dtype=x.dtype)
    _run_norm(library, rows, weight, eps, 1.0, _flat(y))
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, and that sum, rounded to its dtype before the norm sees it."""
    library = c_library(x, residual, weight)
    if library is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    total, y = residual.clone(memory_format=torch.contiguous_format), torch.empty(x.shape, dtype=x.dtype)
    _run_norm(library, _flat(x), weight, eps, 1.0, _flat(y), residual=_flat(total))
    return y, total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] -> weight * x / rms(x) * silu(gate)."""
    library = c_library(x, gate, weight)
    if library is None:
        return reference.gated_rms_norm(x, gate, weight, eps)
    y = torch.empty(x.shape, dtype=x.dtype)
    _run_norm(library, _flat(x), weight, eps, 0.0, _flat(y), gate=_flat(gate))
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D]: of its first R dims, pairs i and i + R / 2 are turned by cos, sin float32 [T, R / 2]."""
    library = c_library(x, cos, sin)
    tokens, heads, size = x.shape
    if library is None or size % 16 or size > 512:
        return reference_attention.rope(x, cos, sin)
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    turn = operation(
        "ROPE_STORE",
        q=rows_of(x.view(tokens, -1)),
        q_out=rows_of(y.view(tokens, -1)),
        q_head_stride=size,
        cosines=pointer(cos),
        sines=pointer(sin),
        tokens=tokens,
        heads=heads,
        head_dim=size,
        half=cos.shape[-1],
    )
    program = Program(library)
    program.add(turn, x, y, cos, sin)
    program.run()
    return y


def causal_conv1d_prefill(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    """SiLU of the depthwise convolution of x [T, C]; history from, and the last W - 1 inputs to, state[slots[b]]."""
    library = c_library(x, weight, state)
    if library is None or not state.is_contiguous() or weight.shape[1] > 4:
        return reference.causal_conv1d_prefill(x, weight, state, slots, cu_seqlens)
    y = torch.empty(x.shape, dtype=x.dtype)
    _run_conv(library, "CONV_PREFILL", x, weight, state, y, slots, None, cu_seqlens, slots.numel(), 0)
    return y


def causal_conv1d_update(x: Tensor, weight: Tensor, state: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The same for S tokens of each of B sequences: history from state[source[b]], after token s to state[target[b,
    s]]."""
    library = c_library(x, weight, state)
    if library is None or not state.is_contiguous() or weight.shape[1] > 4:
        return reference.causal_conv1d_update(x, weight, state, source, target)
    batch, steps, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype)
    rows = (
        x.as_strided((batch * steps, channels), (_token_stride(x), 1)) if _rows_regular(x) else x.reshape(-1, channels)
    )
    _run_conv(library, "CONV_UPDATE", rows, weight, state, y.view(-1, channels), source, target, None, batch, steps)
    return y


def _run_norm(
    library: CpuLibrary,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    y: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    weight = weight.contiguous()
    norm = operation(
        "NORM",
        x=rows_of(x),
        residual=rows_of(residual),
        weight=rows_of(weight),
        gate=rows_of(gate),
        y=rows_of(y),
        rows=x.shape[0],
        columns=x.shape[1],
        eps=eps,
        offset=offset,
    )
    program = Program(library)
    program.add(norm, x, residual, weight, gate, y)
    program.run()


def _run_conv(
    library: CpuLibrary,
    kind: str,
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    y: Tensor,
    source: Tensor,
    target: Tensor | None,
    cu_seqlens: Tensor | None,
    sequences: int,
    steps: int,
) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight = weight.contiguous()
    indices = [None if index is None else index.to(torch.int32).contiguous() for index in (source, target, cu_seqlens)]
    convolution = operation(
        kind,
        x=rows_of(x),
        weight=rows_of(weight),
        y=rows_of(y),
        state=slots_of(state),
        source=pointer(indices[0]),
        target=pointer(indices[1]),
        cu_seqlens=pointer(indices[2]),
        sequences=sequences,
        steps=steps,
        channels=x.shape[1],
        taps=weight.shape[1],
    )
    program = Program(library)
    program.add(convolution, x, weight, state, y, indices)
    program.run()


def _flat(x: Tensor) -> Tensor:
    """[..., H] as rows [R, H], a view where strides allow."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().view(-1, x.shape[-1])


def _token_stride(x: Tensor) -> int:
    """Elements from one token of [B, S, ...] to the next."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0) if x.shape[0] > 1 else x[0, 0].numel()


def _rows_regular(x: Tensor) -> bool:
    """Whether the tokens of x [B, S, C] are equally far apart."""
    return x.stride(-1) == 1 and (x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
