"""Decode attention: S = 1 ... 8 new tokens per sequence against the cache, the context split over 16 programs.

Letters: B sequences, H query heads on KV key heads (G = H / KV share one), D head size, ctx' padded context.

Three kernels. Scores stay on chip; between the first two and the last go partial sums in float32:

    attention_decode_kernel        16-bit models where `tl.dot` has a matrix unit. Grid: (row blocks, 16, B KV). The
                                   S G query rows that share a key head are one tile (row = s G + g, padded to 16 or 32,
                                   further ones in a further block), so keys and values are read once for all of them. A
                                   program walks through its split TOKENS keys at a time: scores by dot, running maximum
                                   and sum (online softmax, base 2), weights rounded to the model's dtype, values by dot
                                   into float32.
    attention_decode_rows_kernel   Turing (no matrix unit in Triton), float32 models: one query row a program, products
                                   and sums elementwise in float32. Grid: (S G, 16, B KV): the programs of a row block
                                   are neighbours, so all but the first find the keys in L2.
    attention_decode_reduce_kernel Grid: (B S H). Weighs the 16 partial sums of a row by their maxima, divides,
                                   multiplies by sigmoid(gate), rounds once. Sums in the order of the splits: the result
                                   does not depend on which program came first. No atomics.

A split is a whole number of tiles, ceil(tiles / 16) of them, from the length on the device (a CUDA graph may be
replayed with other lengths); the last splits of a short context are empty and say so by a maximum of -inf, and their
sums are not read. Tiles start at multiples of TOKENS and ctx' is a multiple of 64, so a tile never leaves its head.
What lies past the length may be anything, NaN too: scores there become -inf, values are masked at the load (0 x NaN is
NaN).

int8: codes are exact in bf16 and fp16. A key's scale multiplies its score; a value's multiplies its weight before that
is rounded, times 127 (the weight is then in units of max|v|, as if the values had been stored in 16 bits, and does not
sink into fp16's subnormals), which the last division takes back.

Traffic: the cache of the context once, 2 D elements a token and key head (+ 8 bytes of scales); B S H 16 (D + 2)
float32 written and read again. At short contexts the launch is what costs. Parallelism: 16 B KV programs.
"""

from dataclasses import dataclass, field
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout.kv_cache import KVCache
from .compile_case import CompileCase
from .target import Target, target_of

SPLITS = 16
MOST_TOKENS = 8
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@triton.jit
def attention_decode_kernel(
    q,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slots,
    lengths,
    sums,
    statistics,
    new_tokens,
    key_heads,
    context,
    score_scale,
    q_sequence_stride,
    q_token_stride,
    q_head_stride,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    INT8: tl.constexpr,
):
    sequence, key_head, length, base = _locate_cache(slots, lengths, key_heads, context)
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < new_tokens * GROUP
    token = row // GROUP
    head = key_head * GROUP + row % GROUP
    begin, end = _split_bounds(length + new_tokens, split, TOKENS, SPLITS)
    d = tl.arange(0, D)
    dtype: tl.constexpr = q.dtype.element_ty
    q_rows = q + sequence.to(tl.int64) * q_sequence_stride + token * q_token_stride + head * q_head_stride
    queries = tl.load(q_rows[:, None] + d[None, :], mask=exists[:, None], other=0.0)
    key_base, value_base = key_cache + base * D, value_cache + base * D
    last = length + token
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_ = tl.zeros([ROWS, D], tl.float32)
    for first in range(begin, end, TOKENS):
        n = first + tl.arange(0, TOKENS)
        at = n[:, None] * D + d[None, :]
        keys = load_codes(key_base, n, 0, D, D, dtype) if INT8 else tl.load(key_base + at)
        scores = tl.dot(queries, tl.trans(keys)) * score_scale
        if INT8:
            scores *= tl.load(key_scales + base + n)[None, :]
        scores = tl.where(n[None, :] <= last[:, None], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp2(maximum - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * decay + tl.sum(weights, 1)
        if INT8:
            weights *= (tl.load(value_scales + base + n, mask=n < end, other=0.0) * 127.0)[None, :]
            values = load_codes(value_base, n, 0, D, D, dtype)
        else:
            values = tl.load(value_base + at, mask=(n < end)[:, None], other=0.0)
        sum_ = tl.dot(weights.to(dtype), values, sum_ * decay[:, None])
        maximum = higher
    out_row = (sequence.to(tl.int64) * new_tokens + token) * (key_heads * GROUP) + head
    at_split = out_row * SPLITS + split
    tl.store(statistics + at_split * 2, maximum, mask=exists)
    tl.store(statistics + at_split * 2 + 1, total, mask=exists)
    if begin < end:
        tl.store(sums + at_split[:, None] * D + d[None, :], sum_, mask=exists[:, None])


@triton.jit
def attention_decode_rows_kernel(
    q,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slots,
    lengths,
    sums,
    statistics,
    new_tokens,
    key_heads,
    context,
    score_scale,
    q_sequence_stride,
    q_token_stride,
    q_head_stride,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    INT8: tl.constexpr,
):
    sequence, key_head, length, base = _locate_cache(slots, lengths, key_heads, context)
    split = tl.program_id(1)
    token = tl.program_id(0) // GROUP
    head = key_head * GROUP + tl.program_id(0) % GROUP
    begin, end = _split_bounds(length + new_tokens, split, TOKENS, SPLITS)
    end = tl.minimum(end, length + token + 1)
    d = tl.arange(0, D)
    q_row = q + sequence.to(tl.int64) * q_sequence_stride + token * q_token_stride + head * q_head_stride
    query = tl.load(q_row + d).to(tl.float32) * score_scale
    key_base, value_base = key_cache + base * D, value_cache + base * D
    maximum = float("-inf")
    total = 0.0
    sum_ = tl.zeros([TOKENS, D], tl.float32)
    for first in range(begin, end, TOKENS):
        n = first + tl.arange(0, TOKENS)
        at = n[:, None] * D + d[None, :]
        seen = n < end
        scores = tl.sum(tl.load(key_base + at).to(tl.float32) * query[None, :], 1)
        if INT8:
            scores *= tl.load(key_scales + base + n)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 0))
        decay = tl.exp2(maximum - higher)
        weights = tl.exp2(scores - higher)
        total = total * decay + tl.sum(weights, 0)
        if INT8:
            weights *= tl.load(value_scales + base + n, mask=seen, other=0.0) * 127.0
        values = tl.load(value_base + at, mask=seen[:, None], other=0.0).to(tl.float32)
        sum_ = sum_ * decay + weights[:, None] * values
        maximum = higher
    out_row = (sequence.to(tl.int64) * new_tokens + token) * (key_heads * GROUP) + head
    at_split = out_row * SPLITS + split
    tl.store(statistics + at_split * 2, maximum)
    tl.store(statistics + at_split * 2 + 1, total)
    if begin < end:
        tl.store(sums + at_split * D + d, tl.sum(sum_, 0))


@triton.jit
def load_codes(first, n, begin: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, dtype: tl.constexpr):
    """Rows n of int8 codes [.., D] at `first`, their columns begin ... begin + COUNT - 1, as `dtype` [n, COUNT].

    Read as words of four codes. Bytes would be asked for eight at a time at most: Triton moves the layout of the dot
    through everything elementwise to the load, and takes the width of the bfloat16 operand there; then it reads shared
    memory (on ROCm global memory) byte by byte. Past `interleave` no layout moves.
    """
    words = first.to(tl.pointer_type(tl.int32), bitcast=True) + begin // 4 + n[:, None] * (D // 4)
    words = tl.load(words + tl.arange(0, COUNT // 4)[None, :])
    even = tl.interleave(widen(words.to(tl.int8), dtype), widen((words >> 16).to(tl.int8), dtype))
    odd = tl.interleave(widen((words >> 8).to(tl.int8), dtype), widen((words >> 24).to(tl.int8), dtype))
    return tl.interleave(even, odd)


@triton.jit
def widen(codes, dtype: tl.constexpr):
    """int8 codes as `dtype`, exactly, and without the rounding that a cast to bfloat16 costs where no instruction has
    it.
    """
    if dtype == tl.bfloat16:
        bits = codes.to(tl.float32).to(tl.int32, bitcast=True) >> 16  # 8 significant bits: nothing is cut off
        wide = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        wide = (codes.to(tl.int16) + 0x6480).to(tl.float16, bitcast=True) - 1152.0  # 0x6400 + m is 1024 + m in float16
    return wide


@triton.jit
def _locate_cache(slots, lengths, key_heads, context):
    """(sequence, key head, tokens in its cache before the new ones, number of its first row in the cache)."""
    sequence = tl.program_id(2) // key_heads
    key_head = tl.program_id(2) % key_heads
    base = (tl.load(slots + sequence).to(tl.int64) * key_heads + key_head) * context
    return sequence, key_head, tl.load(lengths + sequence), base


@triton.jit
def _split_bounds(tokens, split, TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """The positions of a split: a whole number of tiles, all splits but the last ones alike."""
    size = tl.cdiv(tl.cdiv(tokens, TOKENS), SPLITS) * TOKENS
    begin = split * size
    return begin, tl.minimum(begin + size, tokens)


@triton.jit
def attention_decode_reduce_kernel(
    sums,
    statistics,
    gate,
    out,
    new_tokens,
    heads,
    gate_sequence_stride,
    gate_token_stride,
    gate_head_stride,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    INT8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    sequence = place // new_tokens
    token = place % new_tokens
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    maxima = tl.load(statistics + (row * SPLITS + split) * 2)
    totals = tl.load(statistics + (row * SPLITS + split) * 2 + 1)
    weights = tl.exp2(maxima - tl.max(maxima, 0))
    filled = (maxima > float("-inf"))[:, None]
    parts = tl.load(sums + (row * SPLITS + split)[:, None] * D + d[None, :], mask=filled, other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(totals * weights, 0)
    if INT8:
        result *= 1.0 / 127.0
    at = sequence.to(tl.int64) * gate_sequence_stride + token * gate_token_stride + head * gate_head_stride
    result *= tl.sigmoid(tl.load(gate + at + d).to(tl.float32))
    tl.store(out + row * D + d, result.to(out.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class Configuration:
    """How the partial sums are launched. rows: of a tile of queries; 0 for the elementwise kernel."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    options: dict[str, Any] = field(default_factory=dict)


def configuration(target: Target, query_rows: int, dtype: torch.dtype) -> Configuration:
    """For `query_rows` = S G rows on a key head of 256. Chosen by what compiles without spills, not by timing.

    CUDA: 32 keys and values of 256 in 16 bits are 32 KiB, held twice (three stages: one pair computed, one pair under
    way) that fits the 99 KiB of gaming cards. Without `maxnreg` ptxas spills a few registers to fit one more program.
    CDNA: LDS holds one pair, the next one waits in registers. RDNA 3 (gfx1100): a fragment of 16 query rows takes 128
    of its 256 registers, because each half of a wave holds its own copy; so 16 rows, 16 tokens, and nothing ahead.
    """
    if target.matrix_instruction is None or dtype == torch.float32:
        return Configuration(0, 16, 4, 2, {"maxnreg": 255} if target.backend == "cuda" else {})
    if target.name.startswith("gfx11"):
        return Configuration(16, 16, 8, 1)
    rows = 16 if query_rows <= 16 else 32
    if target.name.startswith("gfx12"):
        return Configuration(rows, 16, 8, 2)
    if target.backend == "hip":
        return Configuration(rows, 32, 4, 2)
    return Configuration(rows, 32, 4, 3, {"maxnreg": 255})


def attention_decode(q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, lengths: Tensor) -> Tensor:
    """q, gate [B, S, H, D] in the model's dtype, S = 1 ... 8 -> [B, S, H D] in that dtype, times sigmoid(gate).

    slots int32 [B]: sequences of the cache; lengths int32 [B]: tokens in the cache before these S, whose keys are
    stored behind them already (inside the cache: not checked, that would wait for the device). Token s sees positions
    0 ... lengths[b] + s. q and gate may be strided, but for their last dimension. The cache is in q's dtype or int8.
    Scratch: B S H 16 (D + 2) float32. ValueError where shapes, dtypes or devices do not fit.
    """
    _check(q, gate, cache, slots, lengths)
    sequences, new_tokens, heads, size = q.shape
    key_heads, context = cache.keys.shape[1:3]
    group = heads // key_heads
    out = torch.empty((sequences, new_tokens, heads * size), dtype=q.dtype, device=q.device)
    if not sequences:
        return out
    chosen = configuration(target_of(q.device), new_tokens * group, q.dtype)
    rows = sequences * new_tokens * heads
    sums = torch.empty((rows, SPLITS, size), dtype=torch.float32, device=q.device)
    statistics = torch.empty((rows, SPLITS, 2), dtype=torch.float32, device=q.device)
    arguments = (
        *(q, cache.keys, cache.values, cache.key_scales, cache.value_scales, slots, lengths, sums, statistics),
        *(new_tokens, key_heads, context, log2(e) * size**-0.5, q.stride(0), q.stride(1), q.stride(2)),
    )
    shape = {"D": size, "GROUP": group, "TOKENS": chosen.tokens, "SPLITS": SPLITS, "INT8": cache.is_int8}
    launch = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": True}
    if chosen.rows:
        grid = (triton.cdiv(new_tokens * group, chosen.rows), SPLITS, sequences * key_heads)
        attention_decode_kernel[grid](*arguments, **shape, ROWS=chosen.rows, **launch, **chosen.options)
    else:
        grid = (new_tokens * group, SPLITS, sequences * key_heads)
        attention_decode_rows_kernel[grid](*arguments, **shape, **launch, **chosen.options)
    attention_decode_reduce_kernel[(rows,)](
        *(sums, statistics, gate, out, new_tokens, heads, gate.stride(0), gate.stride(1), gate.stride(2)),
        D=size,
        SPLITS=SPLITS,
        INT8=cache.is_int8,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _check(q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, lengths: Tensor) -> None:
    if q.dim() != 4 or q.shape != gate.shape or q.dtype not in DTYPES or gate.dtype != q.dtype:
        raise ValueError(
            f"attention_decode takes q and gate [B, S, H, D] alike, bf16, fp16 or fp32, not {list(q.shape)} {q.dtype} "
            f"and {tuple(gate.shape)} {gate.dtype}"
        )
    sequences, new_tokens, _heads, _size = q.shape
    if not 1 <= new_tokens <= MOST_TOKENS:
        raise ValueError(
            f"attention_decode takes 1 to {MOST_TOKENS} new tokens, not {new_tokens}: use attention_prefill"
        )
    check_cache("attention_decode", q, cache)
    if q.stride(3) != 1 or gate.stride(3) != 1:
        raise ValueError(
            "attention_decode wants the dimensions of a head side by side: make q and gate contiguous there"
        )
    for name, index in (("slots", slots), ("lengths", lengths)):
        if index.dtype != torch.int32 or index.shape != (sequences,) or not index.is_contiguous():
            raise ValueError(
                f"attention_decode wants {name} int32 [{sequences}], not {index.dtype} {tuple(index.shape)}"
            )
    if len({tensor.device for tensor in (q, gate, cache.keys, slots, lengths)}) > 1:
        raise ValueError("attention_decode: q, gate, cache, slots and lengths lie on different devices")


def check_cache(operation: str, q: Tensor, cache: KVCache) -> None:
    """ValueError where queries [..., H, D] cannot read this cache."""
    heads, size = q.shape[-2:]
    key_heads, _, key_size = cache.keys.shape[1:]
    if size != key_size or heads % key_heads or size & (size - 1) or size < 16:
        raise ValueError(
            f"{operation}: {heads} query heads of {size} on {key_heads} key heads of {key_size}: sizes are the same "
            f"power of two from 16 on, and the first number a multiple of the second"
        )
    if cache.keys.dtype not in (q.dtype, torch.int8):
        raise ValueError(f"{operation}: a cache of {cache.keys.dtype} for a model in {q.dtype}: that, or int8")


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """Heads of 256: tiles of 16 and 32 query rows in 16 bits over either cache; rows elementwise; the reduction.

    16 rows are the family's groups of 4 to 16 with one token, 32 are groups of 4 to 8 with drafts.
    """
    model = "*fp16" if target.capability == 75 else "*bf16"
    numbers = ("new_tokens", "key_heads", "context")
    strides = ("q_sequence_stride", "q_token_stride", "q_head_stride")
    cases = []

    def add(name: str, kernel: Any, kind: str, int8: bool, group: int, chosen: Configuration) -> None:
        scales = ("key_scales", "value_scales")
        # RDNA 3 lays 8 of a tile's 16 scales into every thread, one load each and twice, beside two loads of codes, 128
        # bits wide; half as many warps would load twice the codes a thread, and spill.
        few_codes = int8 and chosen.rows > 0 and target.name.startswith("gfx11")
        cases.append(
            CompileCase(
                name=name,
                kernel=kernel,
                signature={
                    "q": kind,
                    "key_cache": "*i8" if int8 else kind,
                    "value_cache": "*i8" if int8 else kind,
                    **(dict.fromkeys(scales, "*fp32") if int8 else {}),
                    "slots": "*i32",
                    "lengths": "*i32",
                    "sums": "*fp32",
                    "statistics": "*fp32",
                    **dict.fromkeys(numbers, "i32"),
                    "score_scale": "fp32",
                    **dict.fromkeys(strides, "i32"),
                },
                constants={
                    **({} if int8 else dict.fromkeys(scales)),
                    "D": 256,
                    "GROUP": group,
                    "TOKENS": chosen.tokens,
                    "SPLITS": SPLITS,
                    "INT8": int8,
                    **({"ROWS": chosen.rows} if chosen.rows else {}),
                },
                aligned=(
                    *("q", "key_cache", "value_cache", "slots", "lengths", "sums", "statistics", "context", *strides),
                    *(scales if int8 else ()),
                ),
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                matrix=chosen.rows > 0,
                least_wide_share=0.33 if few_codes else 0.5,
                options=chosen.options,
                large=("key_cache", "value_cache"),
            )
        )

    for int8 in (False, True):
        cache = "int8" if int8 else "16bit"
        tiles = {
            chosen.rows: chosen for rows in (16, 32) if (chosen := configuration(target, rows, torch.bfloat16)).rows
        }
        for rows, chosen in tiles.items():
            add(f"attention_decode/{rows}_rows_{cache}", attention_decode_kernel, model, int8, 4, chosen)
        kind = "*fp32" if target.matrix_instruction else model
        chosen = configuration(target, 4, torch.float32)
        add(f"attention_decode_rows/{kind[1:]}_{cache}", attention_decode_rows_kernel, kind, int8, 4, chosen)
    gate_strides = ("gate_sequence_stride", "gate_token_stride", "gate_head_stride")
    cases.append(
        CompileCase(
            name="attention_decode_reduce",
            kernel=attention_decode_reduce_kernel,
            signature={
                "sums": "*fp32",
                "statistics": "*fp32",
                "gate": model,
                "out": model,
                **dict.fromkeys(("new_tokens", "heads", *gate_strides), "i32"),
            },
            constants={"D": 256, "SPLITS": SPLITS, "INT8": False},
            aligned=("sums", "statistics", "gate", "out", *gate_strides),
        )
    )
    return tuple(cases)
