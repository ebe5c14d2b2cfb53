"""Quantized experts, matrix by matrix, into one stack [experts, rows, columns], and out of it."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from .packing import QuantizedWeight, empty


def stack_weights(weights: Iterable[QuantizedWeight], count: int, what: str = "a stack of experts") -> QuantizedWeight:
    """`count` matrices of one shape and storage as one weight; memory: the stack and one matrix at a time.

    Zero points: if any matrix has them, those without get the code that stands for 0. ValueError, beginning with
    `what`, where matrices differ, are more or fewer than `count`, or have columns in different orders.
    """
    stack: QuantizedWeight | None = None
    expert = -1
    for expert, weight in enumerate(weights):
        if stack is None:
            shape = (weight.rows, weight.columns, weight.bits, weight.group_size, weight.scales.dtype)
            has_zeros = weight.zeros is not None
            stack = empty(*shape, has_zeros, weight.order, weight.codes.device, stack=(count,))
        if expert >= count:
            break
        _check_alike(stack, weight, expert, what)
        if weight.zeros is not None and stack.zeros is None:
            stack = replace(stack, zeros=torch.full_like(stack.scales, stack.zero_point))
        stack.codes[expert], stack.scales[expert] = weight.codes, weight.scales
        if stack.zeros is not None and weight.zeros is not None:
            stack.zeros[expert] = weight.zeros
    if stack is None or expert + 1 != count:
        raise ValueError(f"{what}: there are not {count} experts as config.json says; a shard is missing")
    return stack


def expert_of(stack: QuantizedWeight, expert: int) -> QuantizedWeight:
    """One matrix of a stack, in the stack's memory."""
    zeros = None if stack.zeros is None else stack.zeros[expert]
    return replace(stack, codes=stack.codes[expert], scales=stack.scales[expert], zeros=zeros)


def _check_alike(stack: QuantizedWeight, weight: QuantizedWeight, expert: int, what: str) -> None:
    first, other = (
        (one.rows, one.columns, one.bits, one.group_size, one.scales.dtype, one.codes.shape[-2:])
        for one in (stack, weight)
    )
    if first != other:
        raise ValueError(
            f"{what}: expert {expert} is {weight.rows} x {weight.columns} in {weight.bits} bits and groups of "
            f"{weight.group_size}, unlike expert 0; experts of one layer are stored alike"
        )
    same = weight.order is stack.order or (
        weight.order is not None and stack.order is not None and torch.equal(weight.order, stack.order)
    )
    if not same:
        raise ValueError(f"{what}: experts with columns in different orders (act-order); quantize with static groups")
