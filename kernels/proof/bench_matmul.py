"""Matmuls of the GPU bench: quantized linears and stacks of experts, beside the vendor's matmul and other kernels."""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..gpu.experts import expert_matmul
from ..gpu.matmul import quantized_matmul
from ..layout.packing import QuantizedWeight, dequantize, empty
from ..reference import dense as reference
from .bench_rivals import matmul_rivals
from .bench_work import Setting, Work


def random_weight(setting: Setting, rows: int, columns: int, bits: int, stack: tuple[int, ...] = ()) -> QuantizedWeight:
    """Any codes, and scales around 0.01; columns a multiple of 128, as all of the family's are."""
    weight = empty(rows, columns, bits, setting.group_size, setting.dtype, False, None, setting.device, stack)
    weight.codes.view(torch.uint8).random_(0, 256)
    weight.scales.uniform_(0.005, 0.015)
    return weight


def matmul_work(setting: Setting, models: tuple[str, ...], tokens: int, rows: int, columns: int, bits: int) -> Work:
    """A linear [rows, columns] on `tokens` rows of x."""
    weight, x = random_weight(setting, rows, columns, bits), setting.random(tokens, columns)
    weights = _copies(setting, weight)
    return Work(
        operation="quantized_matmul",
        shape=f"{rows} x {columns} int{bits} g{weight.group_size}",
        models=models,
        tokens=tokens,
        bytes=weight.bytes + x.element_size() * tokens * (rows + columns),
        flops=2 * tokens * rows * columns,
        copies=len(weights),
        run=lambda i: quantized_matmul(x, weights[i]),
        twin=lambda dtype: reference.quantized_matmul(x.to(dtype), weight),
        standard=lambda: F.linear(x, dequantize(weight, x.dtype)),
        rivals=matmul_rivals(x, weight, setting.copies_for),
    )


def expert_work(
    setting: Setting,
    models: tuple[str, ...],
    tokens: int,
    experts: int,
    chosen: int,
    rows: int,
    columns: int,
    bits: int,
) -> Work:
    """Matrices [rows, columns] of as many experts; every token goes to `chosen` of them at random."""
    weight = random_weight(setting, rows, columns, bits, (experts,))
    weights = _copies(setting, weight)
    routed = torch.stack([torch.randperm(experts)[:chosen] for _ in range(tokens)]).flatten()
    counts = torch.bincount(routed, minlength=experts)
    offsets = setting.int32(accumulate([0, *counts.tolist()]))
    x = setting.random(tokens * chosen, columns)
    return Work(
        operation="expert_matmul",
        shape=f"{chosen} of {experts} {rows} x {columns} int{bits} g{weight.group_size}",
        models=models,
        tokens=tokens,
        bytes=weight.bytes * int((counts > 0).sum()) // experts + x.element_size() * x.shape[0] * (rows + columns),
        flops=2 * x.shape[0] * rows * columns,
        copies=len(weights),
        run=lambda i: expert_matmul(x, weights[i], offsets),
        twin=lambda dtype: reference.expert_matmul(x.to(dtype), weight, offsets),
        standard=lambda: _experts_by_torch(x, weight, offsets),
    )


def _experts_by_torch(x: Tensor, weight: QuantizedWeight, offsets: Tensor) -> Tensor:
    """Expert by expert, the matrix dequantized to x's dtype."""
    parts, bounds = [], offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            one = replace(weight, codes=weight.codes[expert], scales=weight.scales[expert])
            parts.append(F.linear(x[begin:end], dequantize(one, x.dtype)))
    return torch.cat(parts)


def _copies(setting: Setting, weight: QuantizedWeight) -> list[QuantizedWeight]:
    count = setting.copies_for(weight.bytes)
    rest = (replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone()) for _ in range(count - 1))
    return [weight, *rest]
