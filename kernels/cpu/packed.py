"""Quantized matmuls where there is no C library: aten's packed matmuls for bfloat16, or dequantize and F.linear.

`aten._weight_int4pack_mm_for_cpu` computes W = scale * (code - 8) + bias per group, so a zero point z becomes
(8 - z) * scale; it is fast for bfloat16 only (its float32 and float16 forms take 30 times longer) and takes groups of
32, 64, 128 or 256. `aten._weight_int8pack_mm` takes one scale per row. A weight is packed when it is first used; the
packed form is kept for as long as the weight lives, so this path holds int4 codes twice (the packed form cannot be read
back for float32).
"""

import itertools
import weakref

import torch
from torch import Tensor

from ..layout.packing import QuantizedWeight, dequantize, unpack_int4
from ..layout.weight_stack import expert_of

INT4_GROUPS = (32, 64, 128, 256)
_packed: dict[int, tuple[Tensor, Tensor]] = {}


def packed_path(dtype: torch.dtype, weight: QuantizedWeight) -> str:
    """ "int4pack", "int8pack" or "dequantize": which of them multiplies x of that dtype by this weight."""
    whole = weight.rows % 16 == 0 and weight.columns % 128 == 0 and weight.codes.dim() == 2
    if dtype == torch.bfloat16 and whole and weight.bits == 4 and weight.group_size in INT4_GROUPS:
        return "int4pack"
    per_row = weight.scales.shape[-2] == 1 and weight.zeros is None
    if dtype == torch.bfloat16 and whole and weight.bits == 8 and per_row:
        return "int8pack"
    return "dequantize"


def packed_matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the weight, plus bias: as `cpu_matmul.quantized_matmul`, by torch alone."""
    path = packed_path(x.dtype, weight)
    if path == "dequantize":
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    rows = x.reshape(-1, weight.columns).contiguous()
    if weight.order is not None:
        rows = rows[:, weight.order.long()]
    if path == "int4pack":
        codes, scales_and_zeros = _int4_of(weight)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, weight.group_size, scales_and_zeros)
    else:
        y = torch.ops.aten._weight_int8pack_mm(rows, weight.codes, weight.scales[0].to(x.dtype))
    y = y.view(*x.shape[:-1], weight.rows)
    return y if bias is None else y + bias


def packed_expert_matmul(x: Tensor, weight: QuantizedWeight, offsets: Tensor) -> Tensor:
    """As `cpu_matmul.expert_matmul`, expert by expert, by torch alone."""
    y = x.new_empty(x.shape[0], weight.rows)
    bounds = offsets.tolist()
    for expert, (first, last) in enumerate(itertools.pairwise(bounds)):
        if last > first:
            y[first:last] = torch.nn.functional.linear(x[first:last], dequantize(expert_of(weight, expert), x.dtype))
    return y


def _int4_of(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    key = id(weight.codes)
    if key not in _packed:
        codes = unpack_int4(weight.codes).to(torch.int32)
        scales = weight.scales.float()
        zeros = torch.full_like(scales, 8) if weight.zeros is None else weight.zeros.float()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        pairs = torch.stack([scales, (8 - zeros) * scales], -1).to(torch.bfloat16).contiguous()
        _packed[key] = packed, pairs
        weakref.finalize(weight.codes, _packed.pop, key, None)
    return _packed[key]
