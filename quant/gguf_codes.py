"""The levels that a block's scales allow, and codes put into blocks whose scales stay: what a solver needs of GGML.

    blocks = encode(weight, "Q4_K", importance)          # scales, minima and rounded codes (`gguf_blocks.py`)
    found = levels(blocks, "Q4_K")                       # weight ~ code * scale + minimum
    blocks = with_codes(blocks, codes, "Q4_K")           # the solver's codes in place of the rounded ones

So the error compensation of GPTQ works on every block format, K-quants included, and the file is an ordinary one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..profiles.ggml import GGML_TYPES
from .gguf_blocks import half_at, nibbles, scales_and_minima, six_bit_codes

# Code bits, columns per scale, where codes begin in a block, and what is taken from a code before its scale.
_GRIDS = {"Q4_0": (4, 32, 2, 8), "Q4_1": (4, 32, 4, 0), "Q8_0": (8, 32, 2, 128), "Q4_K": (4, 32, 16, 0)}
_Q6_K = (6, 16, 0, 32)


class Levels(NamedTuple):
    """weight[o, i] ~ codes[o, i] * scales[o, g] + minima[o, g], g = i // group_size, codes 0 ... 2^bits - 1.

    scales, minima: float32 [O, G]; a scale is 0 where all weights of its group stand for the minimum.
    """

    scales: Tensor
    minima: Tensor
    bits: int
    group_size: int


def code_bits(kind: str) -> int:
    """Bits of a code: 4, 6 or 8."""
    return _grid(kind)[0]


def group_columns(kind: str) -> int:
    """Columns that share a scale: 16 or 32."""
    return _grid(kind)[1]


def levels(blocks: Tensor, kind: str) -> Levels:
    """What the codes of blocks uint8 [O, row_bytes] may stand for."""
    bits, size, _, zero = _grid(kind)
    flat = blocks.reshape(-1, GGML_TYPES[kind][1])
    if kind == "Q4_K":
        scales, minima = scales_and_minima(flat)
    elif kind == "Q6_K":
        scales = half_at(flat, 208) * flat[:, 192:208].view(torch.int8).float()
        minima = -zero * scales
    else:
        scales = half_at(flat, 0)
        minima = half_at(flat, 2) if kind == "Q4_1" else -zero * scales
    return Levels(scales.reshape(len(blocks), -1), minima.reshape(len(blocks), -1), bits, size)


def with_codes(blocks: Tensor, codes: Tensor, kind: str) -> Tensor:
    """Blocks uint8 [O, row_bytes] with other codes, uint8 [O, I]; everything else stays as it is."""
    count, size = GGML_TYPES[kind]
    flat, part = blocks.reshape(-1, size).clone(), codes.reshape(-1, count)
    begin = _grid(kind)[2]
    if kind == "Q8_0":
        flat[:, begin:] = part ^ 128
    elif kind == "Q4_K":
        pairs = part.view(-1, 4, 2, 32)
        flat[:, begin:] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    elif kind == "Q6_K":
        flat[:, :192] = six_bit_codes(part)
    else:
        flat[:, begin:] = nibbles(part)
    return flat.view(blocks.shape)


def _grid(kind: str) -> tuple[int, int, int, int]:
    return _Q6_K if kind == "Q6_K" else _GRIDS[kind]
