"""`expert_matmul` on the GPU: rows sorted by expert, each times its expert's matrix; the host need not know which.

How many rows an expert has stands in `offsets`, on the device. Both kernels are launched over all the programs that any
split of the rows could need, and a program looks up its expert there (`code_values.expert_of_row`, `expert_of_tile`):

    gemv     one row per program: a few rows, mostly of different experts, or a device without matrix units
    tiles    rows are cut into tiles within experts: min(R, E + R / tile rows) of them at most, the others return
    unpack   where there are many rows and no tiles (Turing, float32): expert by expert through the vendor's matmul.
             This one reads `offsets` back, and so waits for the device; it is prefill only, outside of graphs

The height of a tile follows the average, R / E rows: a program with fewer costs what it reads, and that is the weight.
Matrices may be int4, int8, or plain [E, N, K] in x's dtype.
"""

from itertools import pairwise

import torch
import triton
from torch import Tensor

from ..layout.packing import BLOCK_COLUMNS, QuantizedWeight
from .compile_case import CompileCase
from .gemv import gemv_kernel
from .matmul import as_rows, check_weight, divide_up, group_of, sizes, target_for, tile_constants, unpack
from .matmul_cases import gemv_case, tiles_case
from .matmul_paths import (
    PATHS,
    choose_expert_path,
    gemv_configuration,
    has_tiles,
    tile_configuration,
)
from .matmul_tiles import matmul_tiles_kernel
from .target import Target


def expert_matmul(x: Tensor, weight: QuantizedWeight | Tensor, offsets: Tensor, path: str | None = None) -> Tensor:
    """Rows offsets[e]:offsets[e+1] of x [R, K] times matrix e of the stack [E, N, K] -> [R, N] in x's dtype.

    offsets: int32 [E + 1], from 0 to R, on x's device: the rows are sorted by expert, and an expert may have none. What
    they hold is not checked (it is on the device); rows outside of offsets[0]:offsets[E] stay unwritten.
    path: one of "gemv", "tiles", "unpack" instead of the chosen one. ValueError as in `quantized_matmul`.
    """
    _check(x, weight, offsets)
    experts = offsets.shape[0] - 1
    quantized = isinstance(weight, QuantizedWeight)
    rows = as_rows(x, x.shape[1])
    out = torch.empty(rows.shape[0], weight.rows if quantized else weight.shape[1], dtype=x.dtype, device=x.device)
    if out.numel():
        if quantized and weight.order is not None:
            rows = rows.index_select(1, weight.order)
        target = target_for(x.device)
        chosen = path or choose_expert_path(target, x.dtype, rows.shape[0], experts)[0]
        if chosen == "gemv":
            _multiply_by_gemv(rows, weight, offsets, out)
        elif chosen == "tiles":
            _multiply_by_tiles(rows, weight, offsets, out, target)
        elif chosen == "unpack":
            _multiply_unpacked(rows, weight, offsets, out)
        else:
            raise ValueError(f"there is no path {chosen!r}: one of {', '.join(PATHS)}")
    return out


def _multiply_by_gemv(x: Tensor, weight: QuantizedWeight | Tensor, offsets: Tensor, out: Tensor) -> None:
    codes, scales, zeros, bits, group = _parts(weight)
    use = gemv_configuration(1, bits)
    given = _sizes(x, weight)
    columns, blocks = given[2], given[-1]
    gemv_kernel[(divide_up(out.shape[1], use.columns), 1, x.shape[0])](
        x,
        codes.view(torch.int32) if bits == 4 else codes,
        scales,
        zeros,
        None,
        offsets,
        out,
        *given,
        blocks,
        BITS=bits,
        GROUP=group,
        ROWS=1,
        BN=use.columns,
        BLOCKS=use.blocks,
        PARTIAL=False,
        WHOLE=columns % BLOCK_COLUMNS == 0 and blocks % use.blocks == 0,
        **_experts(offsets),
        num_warps=use.num_warps,
        enable_fp_fusion=True,
    )


def _multiply_by_tiles(
    x: Tensor, weight: QuantizedWeight | Tensor, offsets: Tensor, out: Tensor, target: Target
) -> None:
    if not has_tiles(target, x.dtype):
        raise ValueError(f"{target.name} has no tiles for {x.dtype}: leave `path` out, or take 'gemv' or 'unpack'")
    codes, scales, zeros, bits, group = _parts(weight)
    rows, experts = x.shape[0], offsets.shape[0] - 1
    use = tile_configuration(target, divide_up(rows, experts), bits, group)
    tiles = min(rows, experts + rows // use.rows)
    given = _sizes(x, weight)
    matmul_tiles_kernel[(tiles * divide_up(out.shape[1], use.columns), 1)](
        x,
        codes,
        scales,
        zeros,
        None,
        offsets,
        out,
        *given,
        given[-1],
        BITS=bits,
        GROUP=group,
        PARTIAL=False,
        WHOLE_BLOCKS=given[2] % BLOCK_COLUMNS == 0,
        **_experts(offsets),
        **tile_constants(use, target, x, None),
        num_warps=use.num_warps,
        num_stages=use.num_stages,
        enable_fp_fusion=True,
    )


def _multiply_unpacked(x: Tensor, weight: QuantizedWeight | Tensor, offsets: Tensor, out: Tensor) -> None:
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if end > begin:
            matrix = weight[expert] if isinstance(weight, Tensor) else unpack(weight, x.dtype, expert)
            torch.matmul(x[begin:end], matrix.T, out=out[begin:end])


def _parts(weight: QuantizedWeight | Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, int, int]:
    """Codes, scales, zero points, bits and columns per scale; a plain stack is its own codes of 16 or 32 bits."""
    if isinstance(weight, QuantizedWeight):
        return weight.codes, weight.scales, weight.zeros, weight.bits, group_of(weight)
    return weight, None, None, 16, 0


def _sizes(x: Tensor, weight: QuantizedWeight | Tensor) -> tuple[int, ...]:
    if isinstance(weight, QuantizedWeight):
        return sizes(x, weight)
    rows, columns = weight.shape[1:]
    return x.shape[0], rows, columns, x.stride(0), rows, divide_up(columns, BLOCK_COLUMNS)


def _experts(offsets: Tensor) -> dict[str, int]:
    experts = offsets.shape[0] - 1
    return {"EXPERTS": experts, "EXPERT_SLOTS": triton.next_power_of_2(experts)}


def _check(x: Tensor, weight: QuantizedWeight | Tensor, offsets: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)}: give rows [R, K], sorted by expert")
    stack = weight.codes if isinstance(weight, QuantizedWeight) else weight
    if stack.dim() != 3:
        raise ValueError(f"the weight is {list(stack.shape)}: give a stack [E, N, K], or use quantized_matmul")
    if isinstance(weight, QuantizedWeight):
        check_weight(weight, x)
    elif weight.shape[2] != x.shape[1] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"the weight is {weight.dtype} {list(weight.shape)} and x {x.dtype} {list(x.shape)}: "
            "give contiguous matrices with x's dtype and columns"
        )
    if offsets.shape != (stack.shape[0] + 1,) or offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise ValueError(f"offsets are {offsets.dtype} {list(offsets.shape)}: give int32 [{stack.shape[0] + 1}]")
    if offsets.device != x.device or stack.device != x.device:
        raise ValueError(f"x is on {x.device}, the weight on {stack.device}, offsets on {offsets.device}: move them")


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """int4, int8 and plain experts, row by row and in tiles of a few and of many rows."""
    cases = [gemv_case(target, 1, bits, experts=True) for bits in (4, 16)]
    if target.matrix_instruction is not None:
        cases += [tiles_case(target, rows, bits, experts=True) for rows in (8, 128) for bits in (4, 16)]
        cases += [tiles_case(target, 8, 8, experts=True), tiles_case(target, 64, 4, 32, True, experts=True)]
    return tuple(cases)
