"""Attention on the CPU: the cache is written and read in C (csrc/attention.h); a prompt's chunk attends by matmuls.

Signatures and meaning are those of `reference/attention.py`. Decoding never goes through scaled_dot_product_attention,
which takes nine times as long as two matmuls for one query (torch 2.13, bfloat16, 32,768 tokens); in C the keys and
values are read once for all query heads that share them, which is what memory allows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout.kv_cache import KVCache
from ..reference import attention as reference_attention
from .norm import c_library
from .operations import DTYPES, Program, Rows, operation, pointer, rows_of

SPLITS = 16
QUERY_ROWS, KEY_TOKENS = 64, 2048  # queries that attend to keys together: scores of [H, 64, 2048] in float32 at a time


def store_kv(cache: KVCache, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Keys and values [T, KV, D] into the cache at positions[t] of sequence slots[t]; int8: codes, a scale per head."""
    library = c_library(keys, values)
    tokens, kv_heads, size = keys.shape
    if library is None or size % 16 or size > 512:
        reference_attention.store_kv(cache, keys, values, slots, positions)
        return
    keys, values = (_heads_together(x) for x in (keys, values))
    slots, positions = (index.to(torch.int32).contiguous() for index in (slots, positions))
    store = operation(
        "ROPE_STORE",
        k=_token_rows(keys),
        v=_token_rows(values),
        slots=pointer(slots),
        positions=pointer(positions),
        tokens=tokens,
        kv_heads=kv_heads,
        head_dim=size,
        **cache_fields(cache),
    )
    program = Program(library)
    program.add(store, keys, values, slots, positions, cache)
    program.run()


def attention_decode(q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, lengths: Tensor) -> Tensor:
    """S new tokens of each of B sequences: q, gate [B, S, H, D] -> [B, S, H D]; lengths [B]: tokens before these S."""
    library = c_library(q, gate)
    batch, steps, heads, size = q.shape
    if library is None or size % 16 or size > 512 or cache.keys.dtype not in DTYPES:
        return reference_attention.attention_decode(q, gate, cache, slots, lengths)
    q, gate = (x.reshape(batch * steps, heads * size) for x in (q, gate))
    y = torch.empty(batch * steps, heads * size, dtype=q.dtype)
    slots, lengths = (index.to(torch.int32).contiguous() for index in (slots, lengths))
    partial = torch.empty(batch * steps * heads * SPLITS * (size + 2), dtype=torch.float32)
    program = Program(library)
    for kind in ("ATTENTION", "ATTENTION_JOIN"):
        attention = operation(
            kind,
            q=rows_of(q),
            gate=rows_of(gate),
            y=rows_of(y),
            gate_head_stride=size,
            slots=pointer(slots),
            lengths=pointer(lengths),
            sequences=batch,
            steps=steps,
            heads=heads,
            kv_heads=cache.keys.shape[1],
            head_dim=size,
            splits=SPLITS,
            partial=pointer(partial),
            **cache_fields(cache),
        )
        program.add(attention, q, gate, y, slots, lengths, cache, partial)
    program.run()
    return y.view(batch, steps, heads * size)


def attention_prefill(
    q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, cu_seqlens: Tensor, starts: Tensor
) -> Tensor:
    """Chunks of several sequences, keys stored already: q, gate [T, H, D] -> [T, H D]; float32 (or float64)
    throughout."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    result = torch.empty(q.shape, dtype=q.dtype)
    bounds = cu_seqlens.tolist()
    for slot, start, first, last in zip(slots.tolist(), starts.tolist(), bounds, bounds[1:], strict=False):
        if last > first:
            for begin, part in _attend(q[first:last], cache, slot, start, wide):
                rows = slice(first + begin, first + begin + part.shape[0])
                result[rows] = part.mul_(gate[rows].to(wide).sigmoid()).to(q.dtype)
    return result.flatten(-2)


def _attend(q: Tensor, cache: KVCache, slot: int, start: int, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """q [n, H, D] at positions start .. start + n - 1 over the keys of all positions up to their own: pairs of a first
    row and what its block became, [up to 64, H, D] in `wide`.

    Tile after tile of keys, with the running maximum and sum of Milakov and Gimelshein (2018): what it takes besides
    q and its result does not grow with the context.
    """
    tokens, heads, size = q.shape
    kv_heads = cache.keys.shape[1]
    # Query heads that share a key head become rows of one matmul: blocks of [KV, H / KV * n, D].
    blocks = [
        (part.to(wide) * size**-0.5)
        .view(-1, kv_heads, heads // kv_heads, size)
        .permute(1, 2, 0, 3)
        .reshape(kv_heads, -1, size)
        for part in q.split(QUERY_ROWS)
    ]
    mixed = [torch.zeros_like(block) for block in blocks]
    top = [torch.full_like(block[..., :1], float("-inf")) for block in blocks]
    total = [torch.zeros_like(block[..., :1]) for block in blocks]
    # Of one size in every call: what is taken and freed in many sizes leaves a heap with holes (runtime/heap.py).
    tiles = [torch.empty(kv_heads, KEY_TOKENS, size, dtype=wide) for _ in range(2)]
    products = torch.empty(QUERY_ROWS * heads * KEY_TOKENS, dtype=wide)
    for begin in range(0, start + tokens, KEY_TOKENS):
        seen = slice(begin, min(begin + KEY_TOKENS, start + tokens))
        pairs = zip(_cache_pairs(cache), tiles, strict=True)
        keys, values = (_cached(x, scales, slot, seen, tile) for (x, scales), tile in pairs)
        for number in range(max(0, begin - start) // QUERY_ROWS, len(blocks)):
            first = start + number * QUERY_ROWS
            last = min(first + QUERY_ROWS, start + tokens)
            reach = slice(0, min(seen.stop, last) - begin)  # no query of the block sees further
            shape = (*blocks[number].shape[:2], reach.stop)
            scores = products[: shape[0] * shape[1] * shape[2]].view(shape)
            torch.bmm(blocks[number], keys[:, reach].mT, out=scores)
            if begin + reach.stop > first + 1:
                unseen = torch.arange(begin, begin + reach.stop) > torch.arange(first, last)[:, None]
                scores.view(kv_heads, -1, *unseen.shape).masked_fill_(unseen, float("-inf"))
            highest = torch.maximum(top[number], scores.amax(-1, keepdim=True))
            weights = scores.sub_(highest).exp_()
            fade = top[number].sub_(highest).exp_()
            total[number].mul_(fade).add_(weights.sum(-1, keepdim=True))
            mixed[number].mul_(fade).baddbmm_(weights, values[:, reach])
            top[number] = highest
    for number, (part, sums) in enumerate(zip(mixed, total, strict=True)):
        ready = part.div_(sums).view(kv_heads, heads // kv_heads, -1, size).permute(2, 0, 1, 3)
        yield number * QUERY_ROWS, ready.reshape(-1, heads, size)


def _cache_pairs(cache: KVCache) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    return (cache.keys, cache.key_scales), (cache.values, cache.value_scales)


def _cached(stored: Tensor, scales: Tensor | None, slot: int, seen: slice, tile: Tensor) -> Tensor:
    """Keys or values of the tokens `seen`, [KV, tokens, D], as numbers: the beginning of `tile`."""
    rows = tile[:, : seen.stop - seen.start].copy_(stored[slot, :, seen])
    return rows if scales is None else rows.mul_(scales[slot, :, seen, None])


def cache_fields(cache: KVCache) -> dict[str, int | None]:
    """The cache as the structures name it."""
    return {
        "keys": pointer(cache.keys),
        "values": pointer(cache.values),
        "key_scales": pointer(cache.key_scales),
        "value_scales": pointer(cache.value_scales),
        "cache_dtype": DTYPES[cache.keys.dtype],
        "cache_tokens": cache.keys.shape[2],
    }


def _heads_together(x: Tensor) -> Tensor:
    """[T, heads, D] whose heads follow each other within a token."""
    together = x.stride(-1) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if together else x.contiguous()


def _token_rows(x: Tensor) -> Rows:
    return Rows(x.data_ptr(), DTYPES[x.dtype], x.stride(0))
