"""The grid that a matrix is rounded to, and rounding to it without calibration: rtn.

    W[o, i] ~ (code[o, i] - zero[o, g]) * scale[o, g],  g = i // group_size,  code in 0 ... 2^bits - 1

Letters: O outputs (rows), I inputs (columns), G groups. The scale of a group is searched: the largest weight rarely
deserves a level of its own, so ranges down to half of the full one are tried ("clip search"), each with the scale that
the file's dtype can hold, and the one with the least weighted square error wins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .quantized import Quantized
from .rounding import LANES, can_round_groups, find_scales, nearest_level, round_groups
from .tasks import one_thread_each

BITS = (3, 4, 8)
GROUP_SIZES = (32, 64, 128, -1)
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE_ROWS = 256
TILE_ELEMENTS = {"cpu": 1 << 17}
"""Rounded at a time: on a CPU a few temporaries of it stay in the cache."""
REFINEMENTS = 3


NOT_FINITE = "the weight holds NaN or Inf"


class NotFinite(ValueError):
    """A weight holds NaN or Inf."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What a matrix is rounded to.

    group_size: columns that share a scale, -1 for the whole row. symmetric: the zero is 2^(bits - 1) everywhere.
    scale_dtype: what the checkpoint stores scales in; they are rounded to it before any code is chosen. signed_scales:
    below 8 bits a symmetric group may have a negative scale. Its levels are -2^(bits - 1) ... 2^(bits - 1) - 1 times
    the scale, so the sign says which end has one level more, and a reader multiplies by it as by any other (llama.cpp's
    Q4_0 always does this): 8 % less error at 4 bits in groups of 128, 12 % in groups of 32.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    signed_scales: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: there are grids of {', '.join(map(str, BITS))} bits")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size={self.group_size}: it is one of {', '.join(map(str, GROUP_SIZES))}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scales are stored as bfloat16, float16 or float32, not {self.scale_dtype}")

    def group_columns(self, columns: int) -> int:
        """Columns per group for a matrix of so many. ValueError where they do not fall into groups."""
        size = columns if self.group_size == -1 else self.group_size
        if columns < 1 or columns % size:
            raise ValueError(f"{columns} columns do not fall into groups of {size}")
        return size


def ratios(bits: int, symmetric: bool) -> list[float]:
    """Scales that are tried, as parts of the one that the range asks for.

    The full range first; an optimal range for a bell-shaped group of 128 is 0.7 to 0.9 of it at 4 bits, 0.5 to 0.8 at
    3, and indistinguishable from it at 8.
    """
    if bits == 8:
        return [1.0, 1.004, 0.99, 0.98, 0.96]
    full = [1.0] if not symmetric else [2 ** (bits - 1) / (2 ** (bits - 1) - 1), 1.07, 1.03, 1.0]
    lowest = 0.5 if bits == 4 else 0.4
    return full + [1 - 0.03 * k for k in range(1, round((1 - lowest) / 0.03) + 1)]


def search_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales float32 [O, G] (exact in grid.scale_dtype) and zeros uint8 [O, G] for a weight [O, I] of any float dtype.

    importance: [I], what a square error in a column costs (the Hessian's diagonal, for instance); equal costs without.
    ValueError for NaN or Inf.
    """
    rows, columns = weight.shape
    size = grid.group_columns(columns)
    cost = torch.ones(columns, device=weight.device) if importance is None else importance.to(weight.device).float()
    if cost.shape != (columns,):
        raise ValueError(f"importance {list(cost.shape)} for {columns} columns")
    tried = torch.tensor(ratios(grid.bits, grid.symmetric), device=weight.device)
    # The kernels walk groups in steps of 16 columns: others are filled up with zeros, which cost nothing.
    missing = -size % LANES
    cost = pad(cost.view(-1, size), (0, missing)).flatten().contiguous()
    # Only ratios of costs matter; at this height neither their products overflow nor do they vanish.
    cost = cost / cost.amax().clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.empty(rows, columns // size, device=weight.device)
    zeros = torch.empty(scales.shape, dtype=torch.uint8, device=weight.device)

    tile = TILE_ROWS if weight.device.type == "cpu" else rows

    def search(at: int) -> None:
        part = weight[at : at + tile].float()
        _check_finite(part)
        part = pad(part.unflatten(1, (-1, size)), (0, missing)).flatten(1).contiguous()
        scales[at : at + tile], zeros[at : at + tile] = find_scales(
            part,
            cost,
            tried,
            bits=grid.bits,
            group_size=size + missing,
            symmetric=grid.symmetric,
            signed_scales=grid.signed_scales and grid.bits < 8,
            scale_dtype=grid.scale_dtype,
            refinements=REFINEMENTS,
        )

    with one_thread_each(weight.device) as tasks:
        tasks.run(search, range(0, rows, tile))
    return scales, zeros


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes uint8 [O, I]: every weight to its nearest level. scales, zeros: [O, G]."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    step = max(1, TILE_ELEMENTS.get(weight.device.type, rows * columns) // columns)
    top = float(2**bits - 1)

    def encode(at: int) -> None:
        part = weight[at : at + step].to(torch.float32, copy=True)
        _check_finite(part)
        zero = zeros[at : at + step].float().unsqueeze(2)
        part = part.unflatten(1, (scales.shape[1], -1)).div_(scales[at : at + step].unsqueeze(2))
        codes[at : at + step] = nearest_level(part, zero, top).add_(zero).flatten(1)

    with one_thread_each(weight.device) as tasks:
        tasks.run(encode, range(0, rows, step))
    return codes


def rtn(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Quantized:
    """Round a weight [O, I] to the nearest levels of the grid that `search_scales` finds."""
    size = grid.group_columns(weight.shape[1])
    if importance is None and can_round_groups(weight, size):
        codes, scales, zeros = _rtn_at_once(weight, grid, size)
    else:
        scales, zeros = search_scales(weight, grid, importance)
        codes = round_to_grid(weight, scales, zeros, grid.bits)
    return Quantized(codes, scales, zeros, grid.bits, size, grid.symmetric)


def _rtn_at_once(weight: Tensor, grid: Grid, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros as `search_scales` and `round_to_grid` have them, without a copy in float32."""
    rows, columns = weight.shape
    tried = torch.tensor(ratios(grid.bits, grid.symmetric))
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, zeros = torch.empty(rows, columns // size), torch.empty(rows, columns // size, dtype=torch.uint8)

    def encode(at: int) -> None:
        part = slice(at, at + TILE_ROWS)
        is_finite = round_groups(
            weight[part],
            tried,
            codes[part],
            scales[part],
            zeros[part],
            bits=grid.bits,
            group_size=size,
            symmetric=grid.symmetric,
            signed_scales=grid.signed_scales and grid.bits < 8,
            scale_dtype=grid.scale_dtype,
            refinements=REFINEMENTS,
        )
        if not is_finite:
            raise NotFinite(NOT_FINITE)

    with one_thread_each() as tasks:
        tasks.run(encode, range(0, rows, TILE_ROWS))
    return codes, scales, zeros


def _check_finite(weight: Tensor) -> None:
    """A sum is NaN or Inf where an element is; only then (it may also overflow) is every element looked at."""
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise NotFinite(NOT_FINITE)
