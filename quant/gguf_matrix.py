"""A matrix as GGML's blocks, between the method that chose its codes and the file that takes them.

Blocks lie along the rows of the GGUF file. For out_proj these have other columns than the checkpoint's
(`gguf_names.column_order`), so groups are found in the file's order, and the codes are chosen in the checkpoint's,
whose Hessian everything else of the layer shares.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cholesky import Factor
from .gguf_blocks import decode, encode
from .gguf_codes import code_bits, levels, with_codes
from .gptq import choose_codes
from .hessian import Cross

EMPTY_GROUP = 1e30  # in place of a scale of 0: every code but 0 is then too far away, and 0 times it is 0


@dataclass(frozen=True, slots=True, eq=False)
class GgufMatrix:
    """blocks: uint8 [O, row_bytes] of a kind. order: int64 [I], which column of the checkpoint stands at each place of
    the file; None: all as they are."""

    blocks: Tensor
    kind: str
    order: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return code_bits(self.kind)

    def __len__(self) -> int:
        return len(self.blocks)

    def rows(self, part: slice) -> "GgufMatrix":
        """Some of the rows."""
        return GgufMatrix(self.blocks[part], self.kind, self.order)

    def dequantize(self) -> Tensor:
        """What llama.cpp computes with, float32 [O, I], columns in the order of the checkpoint."""
        numbers = decode(self.blocks, self.kind)
        if self.order is None:
            return numbers
        return torch.empty_like(numbers).index_copy_(1, self.order, numbers)


def round_matrix(
    weight: Tensor, kind: str, order: Tensor | None = None, importance: Tensor | None = None
) -> GgufMatrix:
    """A weight [O, I] rounded to nearest; importance: float [I], both with columns in the order of the checkpoint."""
    if order is not None:
        weight, importance = weight[:, order], None if importance is None else importance[order]
    return GgufMatrix(encode(weight.cpu(), kind, importance), kind, order)


def solve_matrix(
    weight: Tensor, kind: str, factor: Factor, order: Tensor | None = None, cross: Cross | None = None
) -> GgufMatrix:
    """A weight [O, I] by GPTQ on the levels that its blocks' scales allow (`gptq.gptq` explains `cross`)."""
    rounded = round_matrix(weight, kind, order, factor.importance.cpu())
    found = levels(rounded.blocks, kind)
    place = torch.arange(weight.shape[1])
    if order is not None:
        place = torch.empty_like(order).index_copy_(0, order, place)
    device = weight.device
    scales = torch.where(found.scales == 0, EMPTY_GROUP, found.scales).to(device)
    codes = choose_codes(
        weight,
        factor,
        scales,
        torch.zeros(scales.shape, dtype=torch.uint8, device=device),
        found.bits,
        groups=(place // found.group_size).to(device),
        minima=found.minima.to(device),
        cross=cross,
    ).cpu()
    return GgufMatrix(with_codes(rounded.blocks, codes if order is None else codes[:, order], kind), kind, order)
