"""`quantized_matmul` on the GPU: checks what the kernels rely on, chooses one and launches it.

Three ways (`matmul_paths.py` chooses and says why): gemv (`gemv.py`), tiles on the matrix units (`matmul_tiles.py`),
and unpacking for the vendor's matmul (`unpack.py`). The first two never hold a weight in 16 bits: their only roundings
are float32 sums and the result's. Unpacked weights are rounded to x's dtype once, as any bf16 checkpoint is.

Memory: with splits of K, splits * M * N * 4 bytes of sums; unpacked, N * K elements of x's dtype (the planner's
"unpacked weights"); where the weight has an order of its own (GPTQ act-order), a gathered copy of x.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout.packing import BLOCK_COLUMNS, QuantizedWeight
from .compile_case import CompileCase
from .gemv import gemv_kernel
from .matmul_cases import float_type, gemv_case, tiles_case
from .matmul_paths import (
    MOST_SPLITS,
    PATHS,
    GemvConfiguration,
    TileConfiguration,
    choose_path,
    gemv_configuration,
    has_tiles,
    splits_for,
    tile_configuration,
)
from .matmul_tiles import matmul_tiles_kernel
from .split_sums import add_splits_kernel
from .target import Target, target_of
from .unpack import unpack_kernel

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_INDEX_LIMIT = 1 << 31
_WARPS = 4
_INTERPRETED_PROCESSORS = 108


def quantized_matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, path: str | None = None) -> Tensor:
    """x [..., K] bf16 | fp16 | fp32 times the matrix [N, K], plus bias [N] -> [..., N] in x's dtype.

    path: one of "gemv", "tiles", "unpack" instead of the chosen one. Results of one path are the same bits in every
    run. ValueError where shapes, types, devices or the layout do not fit, or a path does not exist on the device.
    """
    check_weight(weight, x)
    if weight.codes.dim() != 2:
        raise ValueError(f"the weight is a stack of {weight.codes.shape[0]} matrices: use expert_matmul")
    if bias is not None and (bias.shape != (weight.rows,) or bias.device != x.device or not bias.is_contiguous()):
        raise ValueError(f"bias is {list(bias.shape)} on {bias.device}: give contiguous [{weight.rows}] on {x.device}")
    rows = as_rows(x, weight.columns)
    out = torch.empty(rows.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    if out.numel():
        if weight.order is not None:
            rows = rows.index_select(1, weight.order)
        target = target_for(x.device)
        chosen = path or choose_path(target, x.dtype, rows.shape[0])[0]
        if chosen == "gemv":
            multiply_by_gemv(rows, weight, bias, out)
        elif chosen == "tiles":
            multiply_by_tiles(rows, weight, bias, out, target)
        elif chosen == "unpack":
            multiply_unpacked(rows, weight, bias, out)
        else:
            raise ValueError(f"there is no path {chosen!r}: one of {', '.join(PATHS)}")
    return out.view(*x.shape[:-1], weight.rows)


def multiply_by_gemv(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    out: Tensor,
    splits: int = 0,
    use: GemvConfiguration | None = None,
) -> None:
    """out [M, N] = x [M, K] times the matrix; splits of K and the configuration: 0 and None choose."""
    use = use or gemv_configuration(x.shape[0], weight.bits)
    tiles, row_tiles = divide_up(weight.rows, use.columns), divide_up(x.shape[0], use.rows)
    blocks, per_split, splits = _cut(weight, tiles * row_tiles, use.num_warps, x, splits, use.blocks)
    sums = _sums(out, splits)
    gemv_kernel[(tiles, splits, row_tiles)](
        x,
        weight.codes.view(torch.int32) if weight.bits == 4 else weight.codes,
        weight.scales,
        weight.zeros,
        bias,
        None,
        sums,
        *sizes(x, weight),
        per_split,
        BITS=weight.bits,
        GROUP=group_of(weight),
        ROWS=use.rows,
        BN=use.columns,
        BLOCKS=use.blocks,
        EXPERTS=0,
        EXPERT_SLOTS=1,
        PARTIAL=splits > 1,
        WHOLE=weight.columns % BLOCK_COLUMNS == 0 and blocks % use.blocks == 0 and per_split % use.blocks == 0,
        num_warps=use.num_warps,
        enable_fp_fusion=True,
    )
    _add(sums, bias, out, splits)


def multiply_by_tiles(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    out: Tensor,
    target: Target,
    splits: int = 0,
    assembly: bool | None = None,
    use: TileConfiguration | None = None,
) -> None:
    """The same on matrix units; assembly: None for the default (CUDA: on, elsewhere and interpreted: off)."""
    if not has_tiles(target, x.dtype):
        raise ValueError(f"{target.name} has no tiles for {x.dtype}: leave `path` out, or take 'gemv' or 'unpack'")
    use = use or tile_configuration(target, x.shape[0], weight.bits, group_of(weight))
    tiles = divide_up(weight.rows, use.columns) * divide_up(x.shape[0], use.rows)
    _, per_split, splits = _cut(weight, tiles, use.num_warps, x, splits, 1)
    sums = _sums(out, splits)
    matmul_tiles_kernel[(tiles, splits)](
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        bias,
        None,
        sums,
        *sizes(x, weight),
        per_split,
        BITS=weight.bits,
        GROUP=group_of(weight),
        EXPERTS=0,
        EXPERT_SLOTS=1,
        PARTIAL=splits > 1,
        WHOLE_BLOCKS=weight.columns % BLOCK_COLUMNS == 0,
        **tile_constants(use, target, x, assembly),
        num_warps=use.num_warps,
        num_stages=use.num_stages,
        enable_fp_fusion=True,
    )
    _add(sums, bias, out, splits)


def multiply_unpacked(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor) -> None:
    """The same by torch's matmul with the unpacked matrix, in x's dtype."""
    matrix = unpack(weight, x.dtype)
    if bias is None:
        torch.matmul(x, matrix.T, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, matrix.T, out=out)


def unpack(weight: QuantizedWeight, dtype: torch.dtype, expert: int | None = None) -> Tensor:
    """The matrix [N, K] that the codes (of one expert of a stack) stand for, in `dtype`, columns as they lie."""
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    if expert is not None:
        codes, scales, zeros = codes[expert], scales[expert], None if zeros is None else zeros[expert]
    matrix = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.codes.device)
    blocks = blocks_of(weight)
    tile_rows = unpack_rows(target_for(codes.device))
    unpack_kernel[(divide_up(weight.rows, tile_rows), blocks)](
        codes,
        scales,
        zeros,
        matrix,
        weight.rows,
        weight.columns,
        weight.codes.shape[-2],
        blocks,
        BITS=weight.bits,
        GROUP=group_of(weight),
        ROWS=tile_rows,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
    return matrix


def divide_up(number: int, by: int) -> int:
    """The quotient, rounded up (`triton.cdiv` works on kernels' constants, too, and takes 2 microseconds for that)."""
    return -(-number // by)


def as_rows(x: Tensor, columns: int) -> Tensor:
    """x [..., K] as [M, K] with the elements of a row side by side; a copy only where there is no such view."""
    rows = x if x.dim() == 2 else x.reshape(-1, columns)
    return rows if rows.stride(1) == 1 and rows.stride(0) >= columns else rows.contiguous()


def check_weight(weight: QuantizedWeight, x: Tensor) -> None:
    """ValueError, one sentence, where a kernel could not trust the weight, alone or with x."""
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    rows, width = codes.shape[-2:]
    columns = width * 4 if weight.bits == 4 else width
    if x.dtype not in TYPES:
        raise ValueError(f"x is {x.dtype}: the kernels take bfloat16, float16 and float32")
    if x.shape[-1] != weight.columns:
        raise ValueError(f"x is {list(x.shape)} and the weight has {weight.columns} columns: the last must be equal")
    if codes.dtype != (torch.uint16 if weight.bits == 4 else torch.int8) or weight.bits not in (4, 8):
        raise ValueError(f"codes of {weight.bits} bits are {codes.dtype}: int4 lies in uint16, int8 in int8")
    if (
        rows % 16
        or columns % BLOCK_COLUMNS
        or not 0 <= rows - weight.rows < 16
        or not 0 <= columns - weight.columns < 128
    ):
        raise ValueError(
            f"codes {list(codes.shape)} are not those of {weight.rows} x {weight.columns}: pack them by `packing.py`"
        )
    if weight.group_size % 32 or scales.shape != (*codes.shape[:-2], -(-columns // weight.group_size), rows):
        raise ValueError(f"scales {list(scales.shape)} do not fit groups of {weight.group_size} of {rows} x {columns}")
    if scales.dtype not in TYPES or (zeros is not None and (zeros.shape != scales.shape or zeros.dtype not in TYPES)):
        raise ValueError("scales and zero points must have one shape, in bfloat16, float16 or float32")
    tensors = (codes, scales) if zeros is None else (codes, scales, zeros)
    if any(tensor.device != x.device or not tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"the weight must be contiguous and on {x.device}, where x is: it is on {codes.device}")
    if rows * columns >= _INDEX_LIMIT:
        raise ValueError(f"a matrix of {rows} x {columns} needs 64-bit offsets: cut its rows in two")


def group_of(weight: QuantizedWeight) -> int:
    """Columns per scale as the kernels take it: 0 for one scale per row."""
    return 0 if weight.scales.shape[-2] == 1 else weight.group_size


def blocks_of(weight: QuantizedWeight) -> int:
    """Blocks of 128 columns of a row."""
    return weight.codes.shape[-1] * (4 if weight.bits == 4 else 1) // BLOCK_COLUMNS


def sizes(x: Tensor, weight: QuantizedWeight) -> tuple[int, ...]:
    """M, N, K, the stride of x, padded rows, blocks: what the two matmul kernels take in this order."""
    return x.shape[0], weight.rows, weight.columns, x.stride(0), weight.codes.shape[-2], blocks_of(weight)


def tile_constants(use: TileConfiguration, target: Target, x: Tensor, assembly: bool | None) -> dict[str, Any]:
    """What the configuration, the target and x's dtype decide of `matmul_tiles_kernel`'s constants."""
    if assembly is None:
        assembly = target.backend == "cuda" and x.is_cuda
    return {
        "BM": use.rows,
        "BN": use.columns,
        "WEIGHT_FIRST": use.weight_first,
        "EMULATED": target.backend == "hip" and x.dtype == torch.bfloat16,
        "ASSEMBLY": assembly,
    }


def unpack_rows(target: Target) -> int:
    """Rows of a program of `unpack_kernel`: 16 bytes of codes per thread."""
    return _WARPS * target.warp_threads // 4


def sum_columns(target: Target) -> int:
    """Columns of a program of `add_splits_kernel`: 16 bytes of sums per thread."""
    return _WARPS * target.warp_threads * 4


@cache
def target_for(device: torch.device) -> Target:
    """`target_of`, remembered: asking the driver costs more than a launch."""
    return target_of(device)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cut(
    weight: QuantizedWeight, programs: int, num_warps: int, x: Tensor, splits: int, turn: int
) -> tuple[int, int, int]:
    """(blocks, blocks per split, splits): whole turns per split, and no split without blocks."""
    blocks = blocks_of(weight)
    splits = splits or splits_for(programs, num_warps, blocks, x.shape[0], processors(x.device))
    per_split = divide_up(divide_up(blocks, splits), turn) * turn
    return blocks, per_split, divide_up(blocks, per_split)


def _sums(out: Tensor, splits: int) -> Tensor:
    return out if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)


def _add(sums: Tensor, bias: Tensor | None, out: Tensor, splits: int) -> None:
    if splits > 1:
        columns = sum_columns(target_for(out.device))
        grid = (divide_up(out.shape[1], columns), out.shape[0])
        fixed = {"SPLITS": splits, "COLUMNS": columns}
        add_splits_kernel[grid](sums, bias, out, *out.shape, **fixed, num_warps=_WARPS, enable_fp_fusion=True)


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """Each kernel at each configuration that a number of rows leads to, and the storage that asks most of it."""
    cases = [gemv_case(target, 1, 4), gemv_case(target, 4, 4, asymmetric=True), gemv_case(target, 1, 8)]
    if target.matrix_instruction is not None:
        cases += [tiles_case(target, rows, 4) for rows in (8, 16, 32, 64, 128)]
        cases += [tiles_case(target, 16, 4, 32, True), tiles_case(target, 64, 4, 32, True)]
        cases += [tiles_case(target, 8, 8), tiles_case(target, 64, 8, 128, True)]
    return (*cases, _unpack_case(target, 4), _unpack_case(target, 8), _add_case(target))


def _unpack_case(target: Target, bits: int) -> CompileCase:
    kind = float_type(target)
    signature = {"codes": "*u16" if bits == 4 else "*i8", "scales": kind, "zeros": kind, "out": kind}
    return CompileCase(
        name=f"w{bits}a16_unpack",
        kernel=unpack_kernel,
        signature={**signature, "N": "i32", "K": "i32", "padded_rows": "i32", "blocks": "i32"},
        constants={"BITS": bits, "GROUP": 128, "ROWS": unpack_rows(target)},
        aligned=(*signature, "N", "K", "padded_rows"),
        num_warps=_WARPS,
    )


def _add_case(target: Target) -> CompileCase:
    signature = {"sums": "*fp32", "out": float_type(target), "M": "i32", "N": "i32"}
    return CompileCase(
        name="add_splits",
        kernel=add_splits_kernel,
        signature=signature,
        constants={"bias": None, "SPLITS": MOST_SPLITS, "COLUMNS": sum_columns(target)},
        aligned=("sums", "out", "N"),
        num_warps=_WARPS,
    )
