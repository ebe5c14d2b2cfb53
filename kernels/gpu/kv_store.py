"""Writes new keys and values into a cache, in the model's dtype or as int8 with a scale per token and head.

A row is one key head of one token, D elements. Grid: (rows / ROWS, 2), the second index being keys or values, so that
one launch does both. A program loads ROWS rows as a tile [ROWS, D], for int8 reduces |x| along a row (inside a warp),
and writes to position positions[t] of sequence slots[t]. Keys come out of rope, values out of the middle of a
projection: both may be strided by token and head. Traffic: D elements in, D elements (int8: D + 4 bytes) out per row.

int8: scale = max|x| / 127 in float32, code = x / scale rounded to nearest, ties to even; both divisions are IEEE's
(`div_rn`), so codes and scales are those of the twin to the bit. Rounding is done by adding 1.5 * 2^23, where float32
has no places left behind the point; codes are at most 127 in size by construction. A row of zeros has scale 0, codes 0.
Token and position pick the place alone: two rows for one place race, and the caller must not ask for that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout.kv_cache import KVCache
from .compile_case import CompileCase
from .target import Target

ROWS = 16
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@triton.jit
def kv_store_kernel(
    keys,
    values,
    slots,
    positions,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    rows,
    heads,
    context,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    D: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    token = row // heads  # in 32 bits: a 64-bit division is a loop of its own on some devices
    head = (row - token * heads).to(tl.int64)
    token = token.to(tl.int64)
    slot = tl.load(slots + token, mask=exists, other=0).to(tl.int64)
    place = (slot * heads + head) * context + tl.load(positions + token, mask=exists, other=0)
    if tl.program_id(1) == 0:
        source = keys + token * key_token_stride + head * key_head_stride
        _store_rows(source, key_cache, key_scales, place, exists, D, INT8)
    else:
        source = values + token * value_token_stride + head * value_head_stride
        _store_rows(source, value_cache, value_scales, place, exists, D, INT8)


@triton.jit
def _store_rows(source, cache, scales, place, exists, D: tl.constexpr, INT8: tl.constexpr):
    d = tl.arange(0, D)[None, :]
    x = tl.load(source[:, None] + d, mask=exists[:, None], other=0.0)
    target = cache + place[:, None] * D + d
    if INT8:
        x = x.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
        codes = tl.div_rn(x, tl.where(scale > 0, scale, 1.0)[:, None])
        to_integer = 12582912.0  # 1.5 * 2^23
        codes = (codes + to_integer) - to_integer
        tl.store(target, codes.to(tl.int8), mask=exists[:, None])
        tl.store(scales + place, scale, mask=exists)
    else:
        tl.store(target, x.to(cache.dtype.element_ty), mask=exists[:, None])


def store_kv(cache: KVCache, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
    """keys, values [T, KV, D] into the cache: token t to position positions[t] of sequence slots[t].

    slots, positions int32 [T], inside the cache (not checked: that would wait for the device). keys and values in bf16,
    fp16 or fp32, contiguous in their last dimension. ValueError where shapes, dtypes or devices do not fit.
    """
    _check(cache, keys, values, slots, positions)
    tokens, heads, size = keys.shape
    rows = tokens * heads
    if rows >= 1 << 31:
        raise ValueError(f"store_kv: {rows:,} heads at once, give fewer than 2^31")
    if rows:
        kv_store_kernel[(triton.cdiv(rows, ROWS), 2)](
            *(keys, values, slots, positions, cache.keys, cache.values, cache.key_scales, cache.value_scales),
            *(rows, heads, cache.keys.shape[2]),
            *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
            D=size,
            INT8=cache.is_int8,
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _check(cache: KVCache, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
    if keys.dim() != 3 or keys.shape != values.shape or keys.dtype != values.dtype or keys.dtype not in DTYPES:
        raise ValueError(
            f"store_kv takes keys and values [T, KV, D] alike, bf16, fp16 or fp32, not {list(keys.shape)} {keys.dtype} "
            f"and {tuple(values.shape)} {values.dtype}"
        )
    tokens, heads, size = keys.shape
    if (heads, size) != (cache.keys.shape[1], cache.keys.shape[3]) or size & (size - 1):
        raise ValueError(f"store_kv: heads {heads} x {size} do not fit a cache of {tuple(cache.keys.shape)}")
    if keys.stride(2) != 1 or values.stride(2) != 1:
        raise ValueError("store_kv wants the dimensions of a head side by side: make keys and values contiguous there")
    for name, index in (("slots", slots), ("positions", positions)):
        if index.dtype != torch.int32 or index.shape != (tokens,) or not index.is_contiguous():
            raise ValueError(f"store_kv wants {name} int32 [{tokens}], not {index.dtype} {tuple(index.shape)}")
    if len({tensor.device for tensor in (cache.keys, keys, values, slots, positions)}) > 1:
        raise ValueError("store_kv: cache, keys, values, slots and positions lie on different devices")


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """Key heads of 256, from bf16 (Turing: fp16) into a cache of the same, and into int8."""
    kind = "*fp16" if target.capability == 75 else "*bf16"
    numbers = (
        "rows",
        "heads",
        "context",
        "key_token_stride",
        "key_head_stride",
        "value_token_stride",
        "value_head_stride",
    )
    return tuple(
        CompileCase(
            name=f"kv_store/{'int8' if int8 else '16bit'}",
            kernel=kv_store_kernel,
            signature={
                "keys": kind,
                "values": kind,
                "slots": "*i32",
                "positions": "*i32",
                **dict.fromkeys(("key_cache", "value_cache"), "*i8" if int8 else kind),
                **(dict.fromkeys(("key_scales", "value_scales"), "*fp32") if int8 else {}),
                **dict.fromkeys(numbers, "i32"),
            },
            constants={
                **({} if int8 else {"key_scales": None, "value_scales": None}),
                "D": 256,
                "INT8": int8,
                "ROWS": ROWS,
            },
            aligned=(
                *("keys", "values", "slots", "positions", "key_cache", "value_cache"),
                *(("key_scales", "value_scales") if int8 else ()),
                *("context", "key_token_stride", "key_head_stride", "value_token_stride", "value_head_stride"),
            ),
            large=("key_cache", "value_cache"),
        )
        for int8 in (False, True)
    )
