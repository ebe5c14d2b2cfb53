"""The runtime layout in tiles of 16 rows, as the CPU's kernels read it: the same numbers in another order.

A block of 128 columns of 16 rows is 16 steps. Step s holds, of every row, columns 2 s and 2 s + 1 of each quarter of
the block (32 columns), as 32 bits of int4 codes (what `packing.py` has in its words 2 s and 2 s + 1) or as twice 32
bits of int8 codes:

    int4, step s      row 0                 row 1       ...     row 15              64 bytes: a cache line,
                      words 2 s, 2 s + 1                                            an AVX-512 register
    int8, step s      bytes 2 s, 32 + 2 s, 2 s + 1, 33 + 2 s of row 0, row 1, ..., row 15
                      the same of columns 64 on

so one shift and one mask turn a line into pairs of columns with a row in each lane, which a pair of activations is
broadcast to: no sum over lanes, and 16 rows' scales are one load. Steps follow one another block by block, tile by
tile: a matrix is read from its first byte to its last. Scales and zero points: [tiles, groups, 16].

Measured on a Zen 4 core, against rows one after the other with columns in lanes (docs/cpu.md): 1.6 ns in place of 2.3
for 64 bytes that are near (groups of 32: 1.7 in place of 3.0), and 1.05 to 1.34 times as fast from memory.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # packing.py dequantizes both orders
    from .packing import QuantizedWeight

TILE_ROWS = 16
_STEPS = 16
_CHUNK_BYTES = 1 << 20  # moved at a time: stays in the cache


def _new(bytes: int) -> Tensor:
    return torch.empty(bytes, dtype=torch.uint8)


def tile(weight: "QuantizedWeight", room: Callable[[int], Tensor] = _new) -> "QuantizedWeight":
    """A copy of the weight (or stack) in tiles; a weight in tiles is returned as it is.

    room: memory for so many bytes, uint8 [bytes], that begins at a multiple of 16 bytes.
    """
    if weight.tiled:
        return weight
    lines, rows = weight.bits // 4, weight.codes.reshape(-1, weight.codes.shape[-1]).view(torch.uint8)
    blocks, row_bytes = rows.shape[1] // (64 * lines), rows.shape[1]
    tiles = rows.view(-1, TILE_ROWS, blocks, 64 * lines)
    codes = room(rows.numel()).view(torch.int32).view(-1, blocks, _STEPS, lines, TILE_ROWS)
    step = max(_CHUNK_BYTES // (TILE_ROWS * row_bytes), 1)
    for first in range(0, tiles.shape[0], step):
        codes[first : first + step] = _to_steps(tiles[first : first + step], lines)
    zeros = None if weight.zeros is None else _tile_groups(weight.zeros.to(weight.scales.dtype), room)
    return replace(
        weight,
        codes=codes.view(*weight.stack, -1, *codes.shape[1:]),
        scales=_tile_groups(weight.scales, room),
        zeros=zeros,
        tiled=True,
    )


def untile(weight: "QuantizedWeight") -> "QuantizedWeight":
    """A copy of the weight row by row, as `packing.py` says; a weight that lies so already is returned as it is."""
    if not weight.tiled:
        return weight
    *stack, tiles, blocks, _, lines, _ = weight.codes.shape
    steps = weight.codes.reshape(-1, blocks, _STEPS, lines, TILE_ROWS)
    rows = _from_steps(steps, lines).reshape(*stack, tiles * TILE_ROWS, blocks * 64 * lines)
    codes = rows.view(torch.uint16 if weight.bits == 4 else torch.int8)
    zeros = None if weight.zeros is None else _untile_groups(weight.zeros)
    return replace(weight, codes=codes, scales=_untile_groups(weight.scales), zeros=zeros, tiled=False)


def gather_rows(weight: "QuantizedWeight", rows: Tensor) -> "QuantizedWeight":
    """Rows int64 [n] of one matrix of either layout, row by row: n rows without padding behind them."""
    if not weight.tiled:
        zeros = None if weight.zeros is None else weight.zeros[:, rows]
        # torch indexes int16 on every device, uint16 on the CPU only
        codes = weight.codes.view(torch.int16)[rows].view(torch.uint16) if weight.bits == 4 else weight.codes[rows]
        return replace(weight, codes=codes, scales=weight.scales[:, rows], zeros=zeros, rows=rows.shape[0])
    at, lane = rows // TILE_ROWS, rows % TILE_ROWS
    _, blocks, _, lines, _ = weight.codes.shape
    steps = weight.codes[at, :, :, :, lane].unsqueeze(-1)
    codes = _from_steps(steps, lines).reshape(rows.shape[0], blocks * 64 * lines)
    return replace(
        weight,
        codes=codes.view(torch.uint16 if weight.bits == 4 else torch.int8),
        scales=weight.scales[at, :, lane].T,
        zeros=None if weight.zeros is None else weight.zeros[at, :, lane].T,
        rows=rows.shape[0],
        tiled=False,
    )


def _to_steps(rows: Tensor, lines: int) -> Tensor:
    """Bytes uint8 [tiles, 16, blocks, 64 or 128] -> int32 [tiles, blocks, 16 steps, lines, 16]."""
    if lines == 1:
        return rows.view(torch.int32).permute(0, 2, 3, 1).unsqueeze(3)
    pairs = rows.view(torch.int16).unflatten(-1, (2, 2, _STEPS))  # [tiles, row, block, line, quarter of it, step]
    first, second = pairs.select(-2, 0), pairs.select(-2, 1)
    low, high = (first & 0xFF) | (second << 8), (first >> 8 & 0xFF) | (second & -0x100)
    return torch.stack((low, high), -1).view(torch.int32).squeeze(-1).permute(0, 2, 4, 3, 1)


def _from_steps(steps: Tensor, lines: int) -> Tensor:
    """int32 [tiles, blocks, 16 steps, lines, rows] -> bytes uint8 [tiles, rows, blocks, 64 or 128]."""
    if lines == 1:
        return steps.squeeze(3).permute(0, 3, 1, 2).contiguous().view(torch.uint8)
    pairs = steps.contiguous().view(torch.uint8).unflatten(-1, (-1, 2, 2))
    return pairs.permute(0, 4, 1, 3, 6, 2, 5).flatten(3)


def _tile_groups(groups: Tensor, room: Callable[[int], Tensor]) -> Tensor:
    """[..., groups, rows'] -> [..., tiles, groups, 16]."""
    tiled = groups.unflatten(-1, (-1, TILE_ROWS)).transpose(-2, -3)
    return room(groups.nbytes).view(groups.dtype).view(tiled.shape).copy_(tiled)


def _untile_groups(groups: Tensor) -> Tensor:
    """[..., tiles, groups, 16] -> [..., groups, rows']."""
    return groups.transpose(-2, -3).flatten(-2)
