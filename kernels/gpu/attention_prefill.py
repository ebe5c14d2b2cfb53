"""Prefill attention: chunks of several sequences against the cache, causal, scores never in memory.

Letters: T new tokens of B sequences laid end to end, H query heads on KV key heads (G = H / KV share one), D head size.

One program takes ROWS neighbouring tokens of one sequence and one query head; it walks through the cache from position
0 to its own last token, TOKENS keys at a time: scores by dot, running maximum and sum per row (online softmax, base 2),
weights rounded to the model's dtype, values by dot into a float32 tile [ROWS, D] in registers; at the end it divides,
multiplies by sigmoid(gate), rounds once. Every row is one program's: nothing is added across programs.

Grid: (tiles, H, SPLIT). How many tiles a sequence has is known on the device only, so the host launches an upper bound,
T / ROWS + B, and every program finds its own: it loads all lengths (B of them, padded to a power of two), counts tiles
per sequence and sums them up; those beyond the last one leave. The count runs backwards: the last tiles of a long chunk
see the most keys and should not start last. Heads that share keys are neighbours in the second index, so a key that one
of them brought is in L2 for the others. SPLIT: 1; on RDNA 2 programs have a half of the values' columns each.

The chunk's own keys are in the cache already. Positions past a tile's last token are masked: scores become -inf, values
are masked at the load, because what lies there may be NaN and 0 x NaN is NaN. Tiles of keys start at multiples of
TOKENS and the padded context is a multiple of 64, so a tile never leaves its head. int8 as in `attention_decode.py`.

Why these tiles: with D = 256 the sum alone is ROWS x 256 float32, 128 registers of every thread for 64 rows in 4 warps
or 128 rows in 8. Per key and program 4 D ROWS flops stand against 4 D bytes from L2, so ROWS flops per byte: the fast
devices need 128. `configuration` has what compiles without spills in the shared memory that there is.

Turing and float32 models have no matrix unit in Triton, RDNA 3 no registers for int8: `attend_by_matmul` is torch's
matmul, sequence by sequence, at most 64 MiB of scores at a time. It waits for the lengths; the kernels do not.
"""

from dataclasses import dataclass, field
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout.kv_cache import KVCache
from .attention_decode import DTYPES, check_cache, load_codes
from .compile_case import CompileCase
from .target import Target, target_of

MATMUL_BYTES = 64 << 20


@triton.jit
def attention_prefill_kernel(
    q,
    gate,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slots,
    cu_seqlens,
    starts,
    out,
    sequences,
    heads,
    context,
    score_scale,
    q_token_stride,
    q_head_stride,
    gate_token_stride,
    gate_head_stride,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    INT8: tl.constexpr,
    SPLIT: tl.constexpr,
    RELOAD: tl.constexpr,
):
    PART: tl.constexpr = D // PARTS
    each = tl.arange(0, SEQUENCES)
    listed = each < sequences
    firsts = tl.load(cu_seqlens + each, mask=listed, other=0)
    lengths = tl.load(cu_seqlens + each + 1, mask=listed, other=0) - firsts
    tiles = tl.cdiv(lengths, ROWS)
    ends = tl.cumsum(tiles, 0)
    at = tl.sum(tiles, 0) - 1 - tl.program_id(0)
    if at >= 0:
        sequence = tl.sum((ends <= at).to(tl.int32), 0)
        mine = each == sequence
        first = (at - tl.sum(tl.where(mine, ends - tiles, 0), 0)) * ROWS
        length = tl.sum(tl.where(mine, lengths, 0), 0)
        token = tl.sum(tl.where(mine, firsts, 0), 0) + first
        row = tl.arange(0, ROWS)
        exists = first + row < length
        position_first = tl.load(starts + sequence) + first
        position = position_first + row
        end = position_first + tl.minimum(ROWS, length - first)
        head = tl.program_id(1)
        p = tl.arange(0, PART)
        dtype: tl.constexpr = q.dtype.element_ty
        q_first = q + token.to(tl.int64) * q_token_stride + head * q_head_stride
        q_first = q_first + (row * q_token_stride)[:, None] + p[None, :]
        queries = ()
        for part in tl.static_range(PARTS):
            here = q_first + part * PART
            queries = queries + (here if RELOAD else tl.load(here, mask=exists[:, None], other=0.0),)
        base = tl.load(slots + sequence).to(tl.int64) * (heads // GROUP) + head // GROUP
        base = base * context
        column = tl.program_id(2) * (D // SPLIT) if SPLIT > 1 else 0
        key_base, value_base = key_cache + base * D, value_cache + base * D + column
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = ()
        for _ in tl.static_range(PARTS // SPLIT):
            sums = sums + (tl.zeros([ROWS, PART], tl.float32),)
        rows = (queries, exists, position)
        cache = (key_base, value_base, key_scales, value_scales, base)
        running = (maximum, total, sums)
        seen_by_all = (position_first + 1) // TOKENS * TOKENS
        # Keys that every row sees need no mask; those around the tile's own tokens do.
        running = _attend(
            rows, cache, running, 0, seen_by_all, end, score_scale, D, TOKENS, PARTS, INT8, SPLIT, RELOAD, False
        )
        running = _attend(
            rows, cache, running, seen_by_all, end, end, score_scale, D, TOKENS, PARTS, INT8, SPLIT, RELOAD, True
        )
        maximum, total, sums = running
        scale = 1.0 / (total * 127.0 if INT8 else total)
        gate_first = gate + token.to(tl.int64) * gate_token_stride + head * gate_head_stride + column
        gate_first = gate_first + (row * gate_token_stride)[:, None] + p[None, :]
        out_first = out + (token.to(tl.int64) * heads + head) * D + column + (row * heads * D)[:, None] + p[None, :]
        for part in tl.static_range(PARTS // SPLIT):
            gates = tl.load(gate_first + part * PART, mask=exists[:, None], other=0.0).to(tl.float32)
            result = sums[part] * scale[:, None] * tl.sigmoid(gates)
            tl.store(out_first + part * PART, result.to(dtype), mask=exists[:, None])


@triton.jit
def _attend(
    rows,
    cache,
    running,
    begin,
    stop,
    end,
    score_scale,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    INT8: tl.constexpr,
    SPLIT: tl.constexpr,
    RELOAD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys begin ... stop - 1 added to `running`: maximum and total [ROWS], and sums, PARTS / SPLIT tiles of
    [ROWS, D / PARTS].

    RELOAD: `queries` are where to read them from, every time. Not MASKED: every row sees every one of these keys. What
    lies at `end` and behind it is no key.
    """
    queries, exists, position = rows
    key_base, value_base, key_scales, value_scales, base = cache
    maximum, total, sums = running
    PART: tl.constexpr = D // PARTS
    dtype: tl.constexpr = queries[0].dtype.element_ty if RELOAD else queries[0].dtype
    p = tl.arange(0, PART)
    for first in tl.range(begin, stop, TOKENS, disable_licm=RELOAD):
        n = first + tl.arange(0, TOKENS)
        at = n[:, None] * D + p[None, :]
        scores = tl.zeros([maximum.shape[0], TOKENS], tl.float32)
        for part in tl.static_range(PARTS):
            if INT8:
                keys = load_codes(key_base, n, part * PART, PART, D, dtype)
            else:
                keys = tl.load(key_base + part * PART + at)
            query = tl.load(queries[part], mask=exists[:, None], other=0.0) if RELOAD else queries[part]
            scores = tl.dot(query, tl.trans(keys), scores)
        scores *= score_scale
        if INT8:
            scores *= tl.load(key_scales + base + n)[None, :]
        if MASKED:
            scores = tl.where(n[None, :] <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        decay = tl.exp2(maximum - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * decay + tl.sum(weights, 1)
        maximum = higher
        if INT8:
            if MASKED:
                weights *= (tl.load(value_scales + base + n, mask=n < end, other=0.0) * 127.0)[None, :]
            else:
                weights *= (tl.load(value_scales + base + n) * 127.0)[None, :]
        updated = ()
        for part in tl.static_range(PARTS // SPLIT):
            if INT8:
                values = load_codes(value_base, n, part * PART, PART, D, dtype)
            elif MASKED:
                values = tl.load(value_base + part * PART + at, mask=(n < end)[:, None], other=0.0)
            else:
                values = tl.load(value_base + part * PART + at)
            updated = updated + (tl.dot(weights.to(dtype), values, sums[part] * decay[:, None]),)
        sums = updated
    return maximum, total, sums


@dataclass(frozen=True, slots=True)
class Configuration:
    """How prefill attention is launched.

    rows: of a tile of queries; 0: by torch's matmul. parts: tiles that the head is cut into. split: programs that the
    columns of the values are dealt to; each computes all scores. reload: queries are read anew for every tile of keys.
    """

    rows: int
    tokens: int
    parts: int
    num_warps: int
    num_stages: int
    options: dict[str, Any] = field(default_factory=dict)
    split: int = 1
    reload: bool = False


BY_MATMUL = Configuration(0, 0, 0, 0, 0)


def configuration(target: Target, dtype: torch.dtype, int8: bool) -> Configuration:
    """For heads of 256. Chosen by what compiles without spills and reads 16 bytes a thread, not by timing.

    A part of a tile of int8 has half the bytes: so two parts on CDNA, and 32 tokens on gaming cards, which leaves room
    for one program of a multiprocessor instead of two. 255 registers are no less parallel than 208 or 224: 8 warps with
    either fill it.

    RDNA: the sums of 16 rows alone are 128 of a wave's 256 registers, their queries 64, on RDNA 3 (gfx11) 128, because
    each half of a wave holds its own copy. So two programs share the columns of the values and both compute the scores
    (half again as many flops), nothing is read ahead, and RDNA 3 reads its queries from the cache again. There, over an
    int8 cache, all tiles spilled (44 bytes and more; the columns dealt to 2 and 4 programs, 16 and 32 tokens, 2 and 4
    warps): torch's matmul, which reads the codes as 16-bit numbers.
    """
    if target.matrix_instruction is None or dtype == torch.float32:
        return BY_MATMUL
    if target.name == "sm_80":
        return Configuration(64, 32, 4, 4, 2, {"maxnreg": 208})
    if target.name in ("sm_86", "sm_89", "sm_120"):
        if int8:
            return Configuration(64, 32, 4, 4, 2, {"maxnreg": 255})
        return Configuration(64, 16, 4, 4, 2, {"maxnreg": 208})
    if target.backend == "cuda":
        return Configuration(128, 64, 4, 8, 2, {"maxnreg": 255 if int8 else 224})
    if target.name.startswith("gfx11"):
        return BY_MATMUL if int8 else Configuration(64, 32, 4, 4, 1, split=2, reload=True)
    if target.name.startswith("gfx12"):
        return Configuration(64, 16, 2 if int8 else 4, 4, 1, split=2)
    return Configuration(64, 32, 2 if int8 else 4, 4, 2)


def attention_prefill(
    q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, cu_seqlens: Tensor, starts: Tensor
) -> Tensor:
    """q, gate [T, H, D] in the model's dtype -> [T, H D] in that dtype: causal attention, times sigmoid(gate).

    Token t of sequence b (tokens cu_seqlens[b] ... cu_seqlens[b + 1] - 1) sees positions 0 ... starts[b] + t of
    sequence slots[b] of the cache, which holds the chunk's own keys already. slots, starts int32 [B], cu_seqlens int32
    [B + 1], increasing from 0 to T (not checked: that would wait for the device). q and gate may be strided, but for
    their last dimension. The cache is in q's dtype or int8. ValueError where shapes, dtypes or devices do not fit.
    """
    _check(q, gate, cache, slots, cu_seqlens, starts)
    tokens, heads, size = q.shape
    sequences = slots.shape[0]
    if not tokens or not sequences:
        return q.new_zeros((tokens, heads * size))
    chosen = configuration(target_of(q.device), q.dtype, cache.is_int8)
    if not chosen.rows:
        return attend_by_matmul(q, gate, cache, slots, cu_seqlens, starts)
    out = torch.empty((tokens, heads * size), dtype=q.dtype, device=q.device)
    key_heads, context = cache.keys.shape[1:3]
    tiles = min(triton.cdiv(tokens, chosen.rows) + sequences - 1, tokens)
    parts = parts_of(size, chosen)
    attention_prefill_kernel[(tiles, heads, min(chosen.split, parts))](
        *(q, gate, cache.keys, cache.values, cache.key_scales, cache.value_scales, slots, cu_seqlens, starts, out),
        *(sequences, heads, context, log2(e) * size**-0.5),
        *(q.stride(0), q.stride(1), gate.stride(0), gate.stride(1)),
        D=size,
        GROUP=heads // key_heads,
        ROWS=chosen.rows,
        TOKENS=chosen.tokens,
        PARTS=parts,
        SEQUENCES=triton.next_power_of_2(sequences),
        INT8=cache.is_int8,
        SPLIT=min(chosen.split, parts),
        RELOAD=chosen.reload,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=True,
        **chosen.options,
    )
    return out


def parts_of(head_dim: int, chosen: Configuration) -> int:
    """As many parts as keep a part as wide as it is with a head of 256."""
    return max(1, head_dim * chosen.parts // 256)


def attend_by_matmul(
    q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, cu_seqlens: Tensor, starts: Tensor
) -> Tensor:
    """The same through torch's matmul, sequence by sequence: where `configuration` has no tile.

    Reads the lengths back from the device. Scores are in q's dtype, the softmax in float32; rows are taken as many at a
    time as keep both within 64 MiB.
    """
    tokens, heads, size = q.shape
    key_heads = cache.keys.shape[1]
    group = heads // key_heads
    out = torch.empty((tokens, heads * size), dtype=q.dtype, device=q.device)
    bounds = cu_seqlens.tolist()
    for slot, start, begin, end in zip(slots.tolist(), starts.tolist(), bounds, bounds[1:], strict=False):
        if begin == end:
            continue
        context = start + end - begin
        keys = _rows_of(cache.keys, cache.key_scales, slot, context, q.dtype).mT
        values = _rows_of(cache.values, cache.value_scales, slot, context, q.dtype)
        step = max(1, MATMUL_BYTES // (heads * context * (q.element_size() + 4)))
        for first in range(begin, end, step):
            last = min(first + step, end)
            rows = (q[first:last] * size**-0.5).view(-1, key_heads, group, size).permute(1, 2, 0, 3)
            scores = rows.reshape(key_heads, -1, size) @ keys  # [KV, G rows, context]
            position = torch.arange(start + first - begin, start + last - begin, device=q.device)
            unseen = torch.arange(context, device=q.device) > position[:, None]
            scores = scores.view(key_heads, group, -1, context).masked_fill_(unseen, float("-inf"))
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype).view(key_heads, -1, context)
            result = (weights @ values).view(heads, -1, size).transpose(0, 1)
            gated = result.float() * torch.sigmoid(gate[first:last].float())
            out[first:last] = gated.to(q.dtype).reshape(last - first, -1)
    return out


def _rows_of(stored: Tensor, scales: Tensor | None, slot: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """Keys or values of a sequence, [KV, tokens, D]."""
    rows = stored[slot, :, :tokens]
    return rows if scales is None else (rows * scales[slot, :, :tokens, None]).to(dtype)


def _check(q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, cu_seqlens: Tensor, starts: Tensor) -> None:
    if q.dim() != 3 or q.shape != gate.shape or q.dtype not in DTYPES or gate.dtype != q.dtype:
        raise ValueError(
            f"attention_prefill takes q and gate [T, H, D] alike, bf16, fp16, fp32, not {list(q.shape)} {q.dtype} and "
            f"{tuple(gate.shape)} {gate.dtype}"
        )
    check_cache("attention_prefill", q, cache)
    if q.stride(2) != 1 or gate.stride(2) != 1:
        raise ValueError(
            "attention_prefill wants the dimensions of a head side by side: make q and gate contiguous there"
        )
    sequences = slots.shape[0]
    for name, index, size in (("slots", slots, 0), ("starts", starts, 0), ("cu_seqlens", cu_seqlens, 1)):
        if index.dtype != torch.int32 or index.shape != (sequences + size,) or not index.is_contiguous():
            raise ValueError(
                f"attention_prefill wants {name} int32 [{sequences + size}], not {index.dtype} {tuple(index.shape)}"
            )
    if len({tensor.device for tensor in (q, gate, cache.keys, slots, cu_seqlens, starts)}) > 1:
        raise ValueError("attention_prefill: q, gate, cache and the lengths lie on different devices")


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """Heads of 256 in 16 bits over either cache, up to 8 sequences."""
    scales = ("key_scales", "value_scales")
    strides = ("q_token_stride", "q_head_stride", "gate_token_stride", "gate_head_stride")
    cases = []
    for int8 in (False, True):
        chosen = configuration(target, torch.bfloat16, int8)
        if not chosen.rows:
            continue
        cases.append(
            CompileCase(
                name=f"attention_prefill/{'int8' if int8 else '16bit'}",
                kernel=attention_prefill_kernel,
                signature={
                    "q": "*bf16",
                    "gate": "*bf16",
                    **dict.fromkeys(("key_cache", "value_cache"), "*i8" if int8 else "*bf16"),
                    **(dict.fromkeys(scales, "*fp32") if int8 else {}),
                    **dict.fromkeys(("slots", "cu_seqlens", "starts"), "*i32"),
                    "out": "*bf16",
                    "sequences": "i32",
                    "heads": "i32",
                    "context": "i32",
                    "score_scale": "fp32",
                    **dict.fromkeys(strides, "i32"),
                },
                constants={
                    **({} if int8 else dict.fromkeys(scales)),
                    "D": 256,
                    "GROUP": 4,
                    "ROWS": chosen.rows,
                    "TOKENS": chosen.tokens,
                    "PARTS": parts_of(256, chosen),
                    "SEQUENCES": 8,
                    "INT8": int8,
                    "SPLIT": chosen.split,
                    "RELOAD": chosen.reload,
                },
                aligned=(
                    *("q", "gate", "key_cache", "value_cache", "slots", "cu_seqlens", "starts", "out", "context"),
                    *(scales if int8 else ()),
                    *strides,
                ),
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                matrix=True,
                options=chosen.options,
                large=("key_cache", "value_cache"),
            )
        )
    return tuple(cases)
