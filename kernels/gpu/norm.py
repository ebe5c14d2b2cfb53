"""The three norms of Qwen3.5 in Triton: rms_norm (1 + weight), add_rms_norm, and gated_rms_norm of the delta rule.

Grid: one program per ROWS rows. Tile: [ROWS, COLUMNS], COLUMNS the row rounded up to a power of two, 4,096 elements at
most unless a single row is longer; it is read once, kept in registers, reduced along the row and written once. So the
traffic is what it must be: x in, the result out (add_rms_norm: two in, two out; gated: two in, one out), plus the
weight, which stays in L2. Arithmetic is float32; the result is rounded once, to x's dtype.

Why a row is never split: the longest (8,192) is 32 elements per thread at 8 warps, and decode has few rows, where the
latency of a second pass would cost more than the idle processors.

add_rms_norm norms the sum as it is stored, rounded to x's dtype, so that it equals an addition followed by rms_norm
(transformers 5.23 `modeling_qwen3_5.py`, Qwen3_5RMSNorm and Qwen3_5RMSNormGated; the twins are in
`reference/dense.py`).

Rows may lie apart (a stride per row), elements of a row may not. Loads are 128 bits wide where rows start at multiples
of 16 bytes, which is for Triton to see from the strides at launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .sequences import power_of_two, token_stride
from .target import Target

TILE_ELEMENTS = 4096
MOST_COLUMNS = 65536
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    rows,
    columns,
    x_stride,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = (1 + weight) * x / rms(x); with ADD x is first replaced by residual + x, which goes to total."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        before = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * columns + column, values, mask=inside)
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / columns + eps)
    factor = 1.0 + tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    normed = values * scale[:, None] * factor
    tl.store(out + row * columns + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_rms_norm_kernel(
    x, gate, weight, out, rows, columns, x_stride, gate_stride, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out = weight * x / rms(x) * silu(gate)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / columns + eps)
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    gated = values * scale[:, None] * factor * (gates * tl.sigmoid(gates))
    tl.store(out + row * columns + column, gated.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class NormConfiguration:
    """rows x columns: the tile of a program."""

    rows: int
    columns: int
    num_warps: int


def norm_configuration(columns: int) -> NormConfiguration:
    """The same for every target: nothing here but one pass over memory. 16 to 32 elements per thread."""
    padded = power_of_two(columns)
    rows = max(1, min(16, TILE_ELEMENTS // 2 // padded))
    return NormConfiguration(rows, padded, max(1, min(16, rows * padded // 512)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(1 + weight [H]) * x / rms(x) for x [..., H] bf16 | fp16 | fp32 -> the same shape and dtype, contiguous."""
    _check(x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm of residual + x, residual + x), both in x's dtype; x and residual [..., H] of one shape and dtype."""
    _check(x, weight)
    _check_like(residual, x, "residual")
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_rms_norm(x, residual, weight, out, total, eps, add=True)
    return out, total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight [D] * x / rms(x) * silu(gate) for x and gate [..., D] of one shape and dtype -> the same, contiguous."""
    _check(x, weight)
    _check_like(gate, x, "gate")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    columns = x.shape[-1]
    rows, use = x.numel() // columns, norm_configuration(columns)
    gated_rms_norm_kernel[(triton.cdiv(rows, use.rows),)](
        x,
        gate,
        weight,
        out,
        rows,
        columns,
        token_stride("x", x),
        token_stride("gate", gate),
        eps,
        ROWS=use.rows,
        COLUMNS=use.columns,
        num_warps=use.num_warps,
    )
    return out


def _launch_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, add: bool
) -> None:
    if not x.numel():
        return
    columns = x.shape[-1]
    rows, use = x.numel() // columns, norm_configuration(columns)
    rms_norm_kernel[(triton.cdiv(rows, use.rows),)](
        x,
        residual,
        weight,
        out,
        total,
        rows,
        columns,
        token_stride("x", x),
        token_stride("residual", residual),
        eps,
        ADD=add,
        ROWS=use.rows,
        COLUMNS=use.columns,
        num_warps=use.num_warps,
    )


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: the norms take bfloat16, float16 and float32")
    if x.dim() < 1 or not 0 < x.shape[-1] <= MOST_COLUMNS:
        raise ValueError(f"x is {list(x.shape)}: the norms take rows of 1 to {MOST_COLUMNS} elements")
    if weight.shape != x.shape[-1:] or not weight.is_contiguous() or weight.dtype not in DTYPES:
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}: give contiguous [{x.shape[-1]}] floats")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device} and x on {x.device}: move one to the other")


def _check_like(other: Tensor, x: Tensor, name: str) -> None:
    if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
        found, wanted = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (other, x))
        raise ValueError(f"{name} is {found} and x {wanted}: give them alike")


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """The hidden norm at 4,096, the head norm at 256 and the gated norm at 128 columns, bf16 (fp16 on Turing)."""
    kind = "*fp16" if target.capability == 75 else "*bf16"
    numbers = {"rows": "i32", "columns": "i32", "x_stride": "i32", "eps": "fp32"}
    aligned = ("x", "weight", "out", "columns", "x_stride")
    cases = []
    for name, columns, add in (("rms_norm", 4096, False), ("add_rms_norm", 4096, True), ("rms_norm/head", 256, False)):
        use = norm_configuration(columns)
        cases.append(
            CompileCase(
                name=name,
                kernel=rms_norm_kernel,
                signature={"x": kind, "residual": kind, "weight": kind, "out": kind, "total": kind}
                | numbers
                | {"residual_stride": "i32"},
                constants={"ADD": add, "ROWS": use.rows, "COLUMNS": use.columns},
                aligned=(*aligned, "residual", "total", "residual_stride"),
                num_warps=use.num_warps,
            )
        )
    use = norm_configuration(128)
    cases.append(
        CompileCase(
            name="gated_rms_norm",
            kernel=gated_rms_norm_kernel,
            signature={"x": kind, "gate": kind, "weight": "*fp32", "out": kind} | numbers | {"gate_stride": "i32"},
            constants={"ROWS": use.rows, "COLUMNS": use.columns},
            aligned=(*aligned, "gate", "gate_stride"),
            num_warps=use.num_warps,
        )
    )
    return tuple(cases)
