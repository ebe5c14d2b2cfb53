"""The operations of Qwen3.5 in plain torch: matmuls on packed weights, the causal convolution, the norms.

Twins of the kernels, with their names and signatures: what a kernel is tested against, and what explains it. The delta
rule is in `delta.py`, rope and attention in `attention.py`. Written for truth, not for speed.

Precision, here as in the kernels: inputs of any dtype, accumulation in float32, the result in x's dtype. Where x is
float64 everything is float64, and the twin is the truth that errors are measured against.

Letters: B sequences, S tokens of each in one step, T tokens of all sequences laid end to end, sequence b at
cu_seqlens[b]:cu_seqlens[b+1]; C channels, W taps of the convolution; N rows and K columns of a matrix; E experts.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..layout.packing import QuantizedWeight, dequantize
from ..layout.weight_stack import expert_of


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quantized_matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the matrix [N, K], plus bias [N] -> [..., N]."""
    wide = accumulation_dtype(x)
    result = x.to(wide) @ dequantize(weight, wide).T
    return (result if bias is None else result + bias.to(wide)).to(x.dtype)


def expert_matmul(x: Tensor, weight: QuantizedWeight | Tensor, offsets: Tensor) -> Tensor:
    """Rows offsets[e]:offsets[e+1] of x [R, K] times matrix e of the stack [E, N, K] -> [R, N].

    offsets: int32 [E + 1], from 0 to R: the rows are sorted by expert, and an expert may have none.
    """
    wide, rows = accumulation_dtype(x), weight.shape[1] if isinstance(weight, Tensor) else weight.rows
    result = torch.zeros(x.shape[0], rows, dtype=x.dtype, device=x.device)
    for expert, (begin, end) in enumerate(spans(offsets)):
        if begin < end:
            is_plain = isinstance(weight, Tensor)
            matrix = weight[expert].to(wide) if is_plain else dequantize(expert_of(weight, expert), wide)
            result[begin:end] = (x[begin:end].to(wide) @ matrix.T).to(x.dtype)
    return result


def causal_conv1d_prefill(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    """SiLU of the depthwise convolution of x [T, C] with weight [C, W], whose last tap is the token itself -> [T, C].

    state [slots, C, W - 1]: the columns of input before each sequence, oldest first, read from slots[b] and replaced
    there by the last W - 1 of what came. A sequence shorter than that keeps old columns; a fresh one has zeros.
    """
    result = torch.empty_like(x)
    for slot, (begin, end) in zip(slots.tolist(), spans(cu_seqlens), strict=True):
        result[begin:end], columns = _convolve(x[begin:end], weight, state[slot])
        state[slot] = columns[:, end - begin :]
    return result


def causal_conv1d_update(x: Tensor, weight: Tensor, state: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The same for S new tokens of each of B sequences: x [B, S, C] -> [B, S, C].

    source int32 [B]: the slot that holds a sequence's columns; target int32 [B, S]: where they go after token s, so
    that drafts rejected after token s leave its state in a slot. A target may be the sequence's own source or repeat.
    """
    result, taps = torch.empty_like(x), weight.shape[1]
    for b, (slot, targets) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        result[b], columns = _convolve(x[b], weight, state[slot].clone())
        for s, goal in enumerate(targets):
            state[goal] = columns[:, s + 1 : s + taps]
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(1 + weight [H]) * x / rms(x) for x [..., H]: every norm of the model but the gated one."""
    wide = accumulation_dtype(x)
    return (_normalized(x.to(wide), eps) * (1 + weight.to(wide))).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, and that sum as it is stored: rounded to x's dtype before the norm sees it."""
    wide = accumulation_dtype(x)
    total = (residual.to(wide) + x.to(wide)).to(x.dtype)
    return rms_norm(total, weight, eps), total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight [D] * x / rms(x) * silu(gate) for x and gate [..., D]: the norm comes first, and the weight is plain."""
    wide = accumulation_dtype(x)
    gate = gate.to(wide)
    return (_normalized(x.to(wide), eps) * weight.to(wide) * gate * torch.sigmoid(gate)).to(x.dtype)


def spans(offsets: Tensor) -> list[tuple[int, int]]:
    """[(offsets[0], offsets[1]), (offsets[1], offsets[2]), ...]."""
    return list(pairwise(offsets.tolist()))


def _normalized(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _convolve(x: Tensor, weight: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, C] after history [C, W - 1]: the result [T, C] in x's dtype, and all columns [C, W - 1 + T]."""
    wide, (tokens, taps) = accumulation_dtype(x), (x.shape[0], weight.shape[1])
    columns = torch.cat((history.to(wide), x.T.to(wide)), dim=1)
    total = sum(weight[:, tap, None].to(wide) * columns[:, tap : tap + tokens] for tap in range(taps))
    total = torch.as_tensor(total)
    return (total * torch.sigmoid(total)).T.to(x.dtype), columns
