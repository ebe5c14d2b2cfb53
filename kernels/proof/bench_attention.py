"""Rope, the writing of keys and values, and both attentions in the GPU bench."""

import torch
from torch import Tensor

from ..gpu.attention_decode import attention_decode
from ..gpu.attention_prefill import attention_prefill
from ..gpu.kv_store import store_kv
from ..gpu.rope import rope
from ..layout.kv_cache import KVCache, allocate_kv_cache
from ..reference import attention as reference_attention
from .bench_rivals import decode_rivals, prefill_rivals
from .bench_work import Setting, Work

ROPE = {"rope_theta": 1e7, "partial_rotary_factor": 0.25}


def rope_work(setting: Setting, models: tuple[str, ...], tokens: int, heads: int, size: int) -> Work:
    """The queries of a layer; its keys cost a part of that."""
    copies = setting.copies_for(2 * 2 * tokens * heads * size)
    rows = [setting.random(tokens, heads, size) for _ in range(copies)]
    positions = torch.arange(tokens, device=setting.device)
    cos, sin = (table.contiguous() for table in reference_attention.rope_tables(positions, ROPE, size))
    return Work(
        operation="rope",
        shape=f"{heads} heads of {size}",
        models=models,
        tokens=tokens,
        bytes=2 * rows[0].element_size() * rows[0].numel() + 8 * cos.numel(),
        flops=6 * tokens * heads * cos.shape[1],
        copies=copies,
        run=lambda i: rope(rows[i], cos, sin),
        twin=lambda dtype: reference_attention.rope(rows[0].to(dtype), cos, sin),
    )


def store_work(setting: Setting, models: tuple[str, ...], tokens: int, key_heads: int, size: int, int8: bool) -> Work:
    """New keys and values into a cache; what is compared is what the cache then holds, with the twin's own."""
    sequences = setting.sequences(tokens)
    dtype = torch.int8 if int8 else setting.dtype
    own, theirs = (
        allocate_kv_cache(sequences, key_heads, tokens // sequences, size, dtype, setting.device) for _ in range(2)
    )
    keys, values = (setting.random(tokens, key_heads, size) for _ in range(2))
    slots = setting.int32(token % sequences for token in range(tokens))
    positions = setting.int32(token // sequences for token in range(tokens))

    def twin(_: torch.dtype) -> Tensor:
        reference_attention.store_kv(theirs, keys, values, slots, positions)
        return _values_of(theirs)

    element = keys.element_size() + own.keys.element_size()
    return Work(
        operation="store_kv",
        shape=f"{key_heads} heads of {size} {'int8' if int8 else '16 bit'}",
        models=models,
        tokens=tokens,
        bytes=2 * tokens * key_heads * (size * element + (4 if int8 else 0)),
        flops=0,
        copies=1,
        run=lambda i: store_kv(own, keys, values, slots, positions),
        twin=twin,
        result=lambda _: _values_of(own),
    )


def _values_of(cache: KVCache) -> Tensor:
    """Keys and values that a cache stands for, float64."""
    keys, values = cache.keys.double(), cache.values.double()
    if cache.key_scales is not None and cache.value_scales is not None:
        keys, values = keys * cache.key_scales[..., None], values * cache.value_scales[..., None]
    return torch.stack((keys, values))


def attention_work(
    setting: Setting,
    models: tuple[str, ...],
    tokens: int,
    heads: int,
    key_heads: int,
    size: int,
    depth: int,
    int8: bool,
) -> Work:
    """Attention behind `depth` tokens of every sequence: a step of as many sequences, or one prompt."""
    sequences = setting.sequences(tokens)
    new_tokens = tokens // sequences
    context = depth + new_tokens
    dtype = torch.int8 if int8 else setting.dtype
    caches = [_random_cache(setting, sequences, key_heads, context, size, dtype)]
    seen_bytes = caches[0].bytes * context // caches[0].keys.shape[2]
    copies = setting.copies_for(seen_bytes)
    caches += [_random_cache(setting, sequences, key_heads, context, size, dtype) for _ in range(copies - 1)]
    q, gate = (setting.random(sequences, new_tokens, heads, size) for _ in range(2))
    slots, depths = setting.int32(range(sequences)), setting.int32([depth] * sequences)
    if tokens == sequences:
        own, twin = attention_decode, reference_attention.attention_decode
        rest, rivals = (slots, depths), decode_rivals(q, gate, caches, context)
    else:
        own, twin = attention_prefill, reference_attention.attention_prefill
        q, gate, rest = q[0], gate[0], (slots, setting.int32((0, tokens)), depths)
        rivals = prefill_rivals(q, gate, caches, context)
    positions = new_tokens * depth + new_tokens * (new_tokens + 1) // 2
    return Work(
        operation=own.__name__,
        shape=f"{heads}/{key_heads} heads of {size}, {depth} before, {'int8' if int8 else '16 bit'}",
        models=models,
        tokens=tokens,
        bytes=seen_bytes + 3 * q.element_size() * q.numel(),
        flops=4 * sequences * heads * size * positions,
        copies=copies,
        run=lambda i: own(q, gate, caches[i], *rest),
        twin=lambda kind: twin(q.to(kind), gate.to(kind), _widened(caches[0], kind), *rest),
        rivals=rivals,
    )


def _random_cache(
    setting: Setting, sequences: int, key_heads: int, tokens: int, size: int, dtype: torch.dtype
) -> KVCache:
    cache = allocate_kv_cache(sequences, key_heads, tokens, size, dtype, setting.device)
    for stored in (cache.keys, cache.values):
        stored.random_(-127, 128) if dtype == torch.int8 else stored.normal_()
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales.uniform_(0.005, 0.02)
    return cache


def _widened(cache: KVCache, dtype: torch.dtype) -> KVCache:
    """For a twin in float64; an int8 cache is one for every dtype."""
    if cache.is_int8 or cache.keys.dtype == dtype:
        return cache
    return KVCache(cache.keys.to(dtype), cache.values.to(dtype))
