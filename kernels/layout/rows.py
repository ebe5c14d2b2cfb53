"""Rows of matrices, packed or not: taking them in another order, and laying matrices of one input on top of each other.

Rows of the runtime layout are independent (codes row by row, scales [groups, rows]), so both are lossless. Weights in
tiles (`tiles.py`) come after: these functions take none.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .packing import ROW_PAD, QuantizedWeight

Weight = Tensor | QuantizedWeight
Stacked = tuple[Weight, ...]
"""Matrices with one input, whose outputs are laid side by side: one wherever their storage allows it."""


def rows_of(weight: Weight) -> int:
    return weight.rows if isinstance(weight, QuantizedWeight) else weight.shape[-2]


def take_rows(weight: Weight, order: Sequence[int]) -> Weight:
    """Rows `order` of a matrix, which names each of its rows once."""
    if isinstance(weight, Tensor):
        return weight[torch.tensor(order, device=weight.device)]
    padding = range(weight.rows, weight.codes.shape[-2])
    index = torch.tensor([*order, *padding], device=weight.codes.device)
    zeros = None if weight.zeros is None else weight.zeros[..., index]
    return replace(weight, codes=weight.codes[..., index, :], scales=weight.scales[..., index], zeros=zeros)


def stack_rows(weights: Sequence[Weight]) -> Stacked:
    """The matrices [..., N_i, K] as one [..., N_1 + N_2 + ..., K] where they are stored alike, else as they are.

    Alike: the same dtype, or the same bits, groups, dtype of scales, zero points or none, no order of their own, and
    whole blocks of 16 rows, so that no padding comes to lie between them.
    """
    plain = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(plain) == len(weights) and len({weight.dtype for weight in plain}) == 1:
        return (torch.cat(plain, dim=-2),)
    packed = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(packed) < len(weights) or len({_storage(weight) for weight in packed}) > 1:
        return tuple(weights)
    if any(weight.order is not None for weight in packed) or any(weight.rows % ROW_PAD for weight in packed[:-1]):
        return tuple(weights)
    zeros = [weight.zeros for weight in packed if weight.zeros is not None]
    joined = replace(
        packed[0],
        codes=torch.cat([weight.codes for weight in packed], dim=-2),
        scales=torch.cat([weight.scales for weight in packed], dim=-1),
        zeros=torch.cat(zeros, dim=-1) if zeros else None,
        rows=sum(weight.rows for weight in packed),
    )
    return (joined,)


def _storage(weight: QuantizedWeight) -> tuple[object, ...]:
    return weight.bits, weight.group_size, weight.columns, weight.scales.dtype, weight.zeros is None
