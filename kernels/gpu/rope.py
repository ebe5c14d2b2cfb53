"""Partial rotary embedding: the first R = 64 of D = 256 dimensions of every head rotated, the others copied.

    first half of R    y[i] = x[i] cos[i] - x[i + R/2] sin[i]            i < R/2 (pairs half a turn apart, "NeoX")
    second half        y[i + R/2] = x[i + R/2] cos[i] + x[i] sin[i]

A row is one head of one token, D elements. Grid: one program per ROWS rows, all heads of a token before the next token.
A program loads the two halves as tiles [ROWS, R/2], and the rest as a tile [ROWS, D] of which lanes below R are masked
off (D - R = 192 is no power of two; a masked lane costs an instruction slot, no traffic). Heads may be strided, so that
queries need no copy out of the projection that they share with gates, keys and values; the result is contiguous.
Traffic: 2 D elements of x and R float32 of the tables per row, the latter from L1 for all but the first head of a
token. Rotation in float32, rounded once. Nothing is reduced, so there is nothing to be deterministic about.

The tables are made by `reference_attention.rope_tables`: interleaved mRoPE, YaRN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .target import Target

ROWS = 16
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@triton.jit
def rope_kernel(
    x, cos, sin, out, rows, heads, token_stride, head_stride, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = (row < rows)[:, None]
    token = row // heads  # in 32 bits: a 64-bit division is a loop of its own on some devices
    head = (row - token * heads).to(tl.int64)
    token = token.to(tl.int64)
    source = x + (token * token_stride + head * head_stride)[:, None]
    target = out + row.to(tl.int64)[:, None] * D
    pair = tl.arange(0, HALF)[None, :]
    table = token[:, None] * HALF + pair
    first = tl.load(source + pair, mask=exists, other=0.0)
    second = tl.load(source + HALF + pair, mask=exists, other=0.0)
    c = tl.load(cos + table, mask=exists, other=0.0)
    s = tl.load(sin + table, mask=exists, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    tl.store(target + pair, (a * c - b * s).to(first.dtype), mask=exists)
    tl.store(target + HALF + pair, (b * c + a * s).to(first.dtype), mask=exists)
    if 2 * HALF < D:
        d = tl.arange(0, D)[None, :]
        rest = exists & (d >= 2 * HALF)
        tl.store(target + d, tl.load(source + d, mask=rest, other=0.0), mask=rest)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] bf16 | fp16 | fp32 -> contiguous [T, heads, D]; cos, sin float32 [T, R/2], R <= D.

    D is a power of two, R/2 too; the last dimension of x is contiguous, tokens and heads may be strided.
    ValueError where shapes, dtypes or devices do not fit.
    """
    _check(x, cos, sin)
    tokens, heads, size = x.shape
    out = torch.empty((tokens, heads, size), dtype=x.dtype, device=x.device)
    rows = tokens * heads
    if rows >= 1 << 31:
        raise ValueError(f"rope: {rows:,} heads at once, give fewer than 2^31")
    if rows:
        rope_kernel[(triton.cdiv(rows, ROWS),)](
            *(x, cos.contiguous(), sin.contiguous(), out, rows, heads, x.stride(0), x.stride(1)),
            D=size,
            HALF=cos.shape[1],
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 3 or x.dtype not in DTYPES:
        raise ValueError(f"rope takes x [T, heads, D] in bf16, fp16 or fp32, not {tuple(x.shape)} {x.dtype}")
    if x.stride(2) != 1 and x.shape[2] > 1:
        raise ValueError("rope wants the dimensions of a head side by side: make x contiguous in its last dimension")
    half = cos.shape[-1]
    if cos.shape != (x.shape[0], half) or sin.shape != cos.shape or 2 * half > x.shape[2]:
        raise ValueError(
            f"rope wants cos and sin [T, R / 2] with T = {x.shape[0]}, R <= {x.shape[2]}, not {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if half & (half - 1) or x.shape[2] & (x.shape[2] - 1):
        raise ValueError(f"rope is built for powers of two, not for R / 2 = {half} of D = {x.shape[2]}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.device != x.device:
            raise ValueError(f"rope wants {name} in float32 on {x.device}, not {table.dtype} on {table.device}")


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """Heads of 256 of which 64 are rotated, as all of the family have them."""
    signature = dict.fromkeys(("rows", "heads", "token_stride", "head_stride"), "i32")
    return tuple(
        CompileCase(
            name=f"rope/{kind[1:]}",
            kernel=rope_kernel,
            signature={"x": kind, "cos": "*fp32", "sin": "*fp32", "out": kind, **signature},
            constants={"D": 256, "HALF": 32, "ROWS": ROWS},
            aligned=("x", "cos", "sin", "out", "token_stride", "head_stride"),
            num_warps=4,
        )
        for kind in ("*bf16", "*fp16")
        if not (kind == "*bf16" and target.capability == 75)
    )
