"""Matmuls on the CPU: `quantized_matmul`, `expert_matmul` and `dense_linear`, with the signatures of
`reference/dense.py`.

Activations are turned into int16 with one power of two per 128 columns (csrc/activations.h), products and sums of a
block are exact integers (csrc/matmul.h), so the only errors are that rounding and float32 sums over the groups.
Relative RMS error of the result before it is rounded to x's dtype (1024 columns, int4; with outliers: every 97th
feature 300 times larger), beside torch's matmul in that dtype, rounding of the result included:

    x bfloat16    one plane of int16      4e-6, with outliers 1.5e-4      2.8e-3
    x float16     one plane               1.1e-5, with outliers 1.5e-4    3.5e-4
    x float32     two planes, 30 bits     8e-8, with outliers 8e-8        1.5e-7

An input that is infinite or not a number makes its whole row of the result not a number. Nothing here rounds
activations to int8. AVX512-BF16 is not used where it exists: it multiplies as many pairs per instruction as VNNI's
int16 and needs the same unpacking, but sums in float32; int16 keeps every bit of a bfloat16 within 1/128 of the
largest of its block, and sums exactly.

Without the C library: aten's packed matmuls (`packed.py`), bfloat16 inside, or dequantize and F.linear.
"""

import ctypes
import itertools
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layout.packing import QuantizedWeight
from ..layout.tiles import TILE_ROWS, tile
from .library import CpuLibrary, cpu_library
from .operations import (
    BLOCK,
    DTYPES,
    Matrix,
    Program,
    Round,
    Rounded,
    Rows,
    address,
    operation,
    pointer,
    rounded_rows,
    rows_of,
)
from .packed import packed_expert_matmul, packed_matmul

GEMM_ROWS, GEMV_TOKENS = 32, 8  # as in csrc/matmul.h
MOST_EXPERT_TASKS, TASKS_PER_THREAD = 8, 4  # tasks of GEMM_ROWS that become one
_copies: dict[tuple[int, ...], tuple[list[int], QuantizedWeight]] = {}
DENSE_ROWS = 8  # up to here a matrix of floats is read by our own gemv; above, F.linear is faster


def quantized_matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the weight [N, K], plus bias [N]: [..., N] in x's dtype."""
    library = cpu_library()
    if x.shape[-1] != weight.columns:
        raise ValueError(f"x has {x.shape[-1]} features, the weight reads {weight.columns}: check which layer this is")
    if weight.stack:
        raise ValueError("a stack of experts needs expert_matmul with the rows of each expert")
    if library.path == "torch":
        return packed_matmul(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _multiply(library, rows, weight, bias)
    return y.view(*x.shape[:-1], weight.rows)


def expert_matmul(x: Tensor, weight: QuantizedWeight | Tensor, offsets: Tensor) -> Tensor:
    """x [R, K] sorted by expert; rows offsets[e] .. offsets[e + 1] - 1 times expert e of the stack [E, N, K]: [R,
    N]."""
    library = cpu_library()
    if isinstance(weight, Tensor):
        return _dense_experts(x, weight, offsets)
    if x.shape[-1] != weight.columns:
        raise ValueError(f"x has {x.shape[-1]} features, the experts read {weight.columns}: check which layer this is")
    if offsets.numel() != weight.stack[0] + 1:
        raise ValueError(f"{weight.stack[0]} experts need {weight.stack[0] + 1} offsets, not {offsets.numel()}")
    if library.path == "torch":
        return packed_expert_matmul(x, weight, offsets)
    return _multiply(library, x, weight, None, offsets.to(torch.int32).contiguous())


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times a matrix of floats [N, K]: [..., N] in x's dtype. Few rows are read at memory speed
    (csrc/dense.h)."""
    library = cpu_library()
    rows = x.reshape(-1, x.shape[-1])
    if library.path == "torch" or rows.shape[0] > DENSE_ROWS or x.dtype not in DTYPES or not weight.is_contiguous():
        return torch.nn.functional.linear(x, weight)
    floats = rows.float().contiguous()
    y = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype)
    program = Program(library)
    add_matmul(program, [dense_matrix(weight, y)], rows.shape[0], floats=rows_of(floats))
    program.run()
    return y.view(*x.shape[:-1], weight.shape[0])


def _dense_experts(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    bounds = offsets.tolist()
    for expert, (first, last) in enumerate(itertools.pairwise(bounds)):
        if last > first:
            y[first:last] = dense_linear(x[first:last], weight[expert])
    return y


def _multiply(
    library: CpuLibrary, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, offsets: Tensor | None = None
) -> Tensor:
    """x [R, K] by a matrix, or by a stack with offsets."""
    dtype = x.dtype
    if dtype == torch.float64:
        x = x.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape[0], weight.rows, dtype=x.dtype)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if x.shape[0] and weight.rows:
        program = Program(library)
        rounded, rounding = round_operation(program, x, weight)
        matrices = [quantized_matrix(weight, y, bias)]
        add_matmul(program, matrices, x.shape[0], rounded, offsets=offsets, rounding=rounding)
        program.run()
    return y if y.dtype == dtype else y.to(dtype)


def parts_of(weight: QuantizedWeight) -> int:
    """In how many parts of one scale each a block of 128 columns of this weight is cut: 1, 2 or 4. Groups of 96 or 192
    columns, which do not end where blocks do, need smaller parts than they are large."""
    return next(parts for parts in (1, 2, 4) if weight.group_size % (BLOCK // parts) == 0)


def zero_factor_of(weight: QuantizedWeight) -> int:
    """What the sums of activations are multiplied by beforehand: 8 around symmetric int4 codes, 1 for zero points."""
    return 8 if weight.bits == 4 and weight.zeros is None else 1


def planes_of(dtype: torch.dtype) -> int:
    """int16 planes that keep activations of this dtype exact enough: bfloat16 and float16 need one, float32 two."""
    return 1 if dtype in (torch.bfloat16, torch.float16) else 2


def round_operation(program: Program, x: Tensor, weight: QuantizedWeight, planes: int = 0) -> tuple[Rounded, Round]:
    """Rounded rows of x [R, K], for matmuls with `weight` (and others of its group size without an order), and the
    operation that makes them, not appended yet: for `add_matmul`. The program holds what both point to."""
    columns = x.shape[-1]
    rounded, held = rounded_rows(
        x.shape[0], columns, planes or planes_of(x.dtype), parts_of(weight), zero_factor_of(weight)
    )
    order = None if weight.order is None else weight.order.to(torch.int32).contiguous()
    rounding = operation(
        "ROUND",
        source=rows_of(x),
        order=pointer(order),
        rows=x.shape[0],
        columns=columns,
        out=ctypes.addressof(rounded),
    )
    program.held += [rounded, x, order, *held]
    return rounded, rounding


def in_tiles(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight as the C kernels read it. A model's weights were put in tiles when they were loaded
    (`Operations.arrange`); of another a copy in tiles is kept as long as its tensors live and are not written to
    (torch does not count what is written to tensors of its inference mode)."""
    if weight.tiled:
        return weight
    tensors = [tensor for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None]
    key = tuple(map(id, tensors))
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    known, copy = _copies.get(key, (None, None))
    if copy is None or known != versions:
        if copy is None:
            for tensor in tensors:
                weakref.finalize(tensor, _copies.pop, key, None)
        copy = tile(weight)
        _copies[key] = versions, copy
    return replace(weight, codes=copy.codes, scales=copy.scales, zeros=copy.zeros, tiled=True)


def quantized_matrix(weight: QuantizedWeight, y: Tensor, bias: Tensor | None = None) -> tuple[Matrix, list[Any]]:
    """A weight (or a stack) with the rows that it writes, and what must stay alive."""
    weight = in_tiles(weight)
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    matrix = Matrix(
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        zeros=pointer(zeros),
        bias=pointer(bias),
        bits=weight.bits,
        scale_dtype=DTYPES[scales.dtype],
        group_size=weight.group_size,
        rows=weight.rows,
        padded_rows=weight.padded_rows,
        columns=weight.padded_columns,
        expert_code_bytes=codes.stride(0) * codes.element_size() if weight.stack else 0,
        expert_scales=scales.stride(0) if weight.stack else 0,
        y=rows_of(y),
    )
    return matrix, [codes, scales, zeros, bias, y]


def dense_matrix(weight: Tensor, y: Tensor) -> tuple[Matrix, list[Any]]:
    """A matrix of floats [N, K], or a stack of them, with the rows that it writes."""
    *_, rows, columns = weight.shape
    stride = weight.stride(0) * weight.element_size() if weight.dim() == 3 else 0
    matrix = Matrix(
        codes=weight.data_ptr(),
        code_dtype=DTYPES[weight.dtype],
        group_size=1,
        rows=rows,
        padded_rows=rows,
        columns=columns,
        expert_code_bytes=stride,
        y=rows_of(y),
    )
    return matrix, [weight, y]


def add_matmul(
    program: Program,
    matrices: list[tuple[Matrix, list[Any]]],
    rows: int,
    x: Rounded | None = None,
    floats: Rows | None = None,
    offsets: Tensor | None = None,
    experts: Tensor | None = None,
    active: Tensor | None = None,
    rounding: Round | None = None,
) -> None:
    """Append one operation that multiplies all `matrices` by the same rows (fields: csrc/operations.h, Matmul).

    rounding: makes x. A single row every thread rounds for itself, so what it is made of must not be written by this
    matmul; of more rows it is an operation before this one.
    """
    is_own = rounding is not None and rounding.rows == 1 and offsets is None
    if rounding is not None and not is_own:
        program.add(rounding)
    array = (Matrix * len(matrices))(*(matrix for matrix, _ in matrices))
    product = operation(
        "MATMUL",
        matrices=ctypes.addressof(array),
        count=len(matrices),
        x=address(x),
        floats=floats or Rows(),
        rows=rows,
        offsets=pointer(offsets),
        experts=pointer(experts),
        active=pointer(active),
        slots=0 if offsets is None else offsets.numel() - 1,
        task_rows=_task_rows(matrices, rows, 0 if offsets is None else offsets.numel() - 1),
        rounding=address(rounding) if is_own else None,
    )
    program.add(product, array, [held for _, held in matrices], x, offsets, experts, active, rounding)


def _task_rows(matrices: list[tuple[Matrix, list[Any]]], rows: int, slots: int) -> int:
    """Rows of a matrix in a task. For few tokens one tile, for threads take many tasks of a matrix as one
    (csrc/progress.h); for many the two that csrc/gemm.h unpacks at once. Of a stack's experts a task is all that is
    taken: few begin seldom, and every thread wants some."""
    if not slots:
        return TILE_ROWS if rows <= GEMV_TOKENS else GEMM_ROWS
    tasks = sum(-(-matrix.rows // GEMM_ROWS) for matrix, _ in matrices) * max(1, min(slots, rows))
    return GEMM_ROWS * max(1, min(MOST_EXPERT_TASKS, tasks // (TASKS_PER_THREAD * torch.get_num_threads())))
