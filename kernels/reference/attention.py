"""Rope, the KV cache and attention with an output gate in plain torch: twins of the attention kernels.

Letters: T tokens laid end to end, B sequences, S new tokens of each, H query heads, KV key heads (query head h reads
key head h // (H // KV)), D the size of a head, R of its dimensions rotated; others as in `dense.py`.
"""

from collections.abc import Mapping
from math import ceil, floor, log, pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dense import accumulation_dtype, spans

if TYPE_CHECKING:
    from ..layout.kv_cache import KVCache


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] with its first R dimensions rotated in pairs i, i + R/2 -> [T, heads, D]; cos, sin [T, R/2]."""
    wide, half = accumulation_dtype(x), cos.shape[-1]
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * half :]), dim=-1)


def rope_tables(positions: Tensor, parameters: Mapping[str, Any], head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, R/2], of positions int [T] (text) or [3, T] (time, height, width).

    parameters: `rope_parameters` of config.json: rope_theta, partial_rotary_factor (R = head_dim times it),
    mrope_section, and with rope_type yarn also factor and original_max_position_embeddings. ValueError for another
    rope_type. Interleaved mRoPE: frequency i belongs to height where i % 3 == 1, to width where i % 3 == 2, as far as
    3 times their section, else to time. Angles are float32 products, as the engines have them: at a position of a
    million that is up to 0.03 rad from the true angle. (transformers 5.23 `Qwen3_5TextRotaryEmbedding`.)
    """
    frequencies, scale = rope_frequencies(parameters, head_dim)
    frequencies = frequencies.to(positions.device)
    positions = positions.expand(3, -1) if positions.dim() == 1 else positions
    _, height, width = parameters.get("mrope_section", (11, 11, 10))
    axis = torch.zeros(frequencies.shape[0], dtype=torch.long, device=positions.device)
    axis[1 : 3 * height : 3] = 1
    axis[2 : 3 * width : 3] = 2
    angles = positions.float()[axis].T * frequencies
    return angles.cos() * scale, angles.sin() * scale


def rope_frequencies(parameters: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Radians per position, float32 [R/2], and what cos and sin are multiplied by.

    YaRN (Peng et al., arXiv 2309.00071, section 3): frequencies that turn more than beta_fast (32) times within the
    original context stay, those that turn less than beta_slow (1) times are divided by the factor, with a ramp between.
    """
    theta, size = parameters["rope_theta"], int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float) / size)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return frequencies, 1.0
    if kind != "yarn":
        raise ValueError(f"rope_type {kind!r} is not supported: Qwen3.5 has default, and yarn for long contexts")
    factor, original = float(parameters["factor"]), parameters["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return size * log(original / (turns * 2 * pi)) / (2 * log(theta))

    low = max(floor(dimension(parameters.get("beta_fast", 32))), 0)
    high = min(ceil(dimension(parameters.get("beta_slow", 1))), size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float) - low) / max(high - low, 0.001)).clamp(0, 1)
    scale = parameters.get("attention_factor") or 0.1 * log(max(factor, 1.0)) + 1.0
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(scale)


def store_kv(cache: "KVCache", keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Keys and values [T, KV, D] into the cache: token t goes to position positions[t] of sequence slots[t].

    int8: per token and head, scale = max|x| / 127 in float32 and codes round(x / scale), ties to even; a head of zeros
    has scale 0 and codes 0.
    """
    where = (slots.long(), slice(None), positions.long())
    for rows, stored, scales in ((keys, cache.keys, cache.key_scales), (values, cache.values, cache.value_scales)):
        if scales is None:
            stored[where] = rows.to(stored.dtype)
            continue
        scale = rows.float().abs().amax(-1) / 127
        codes = rows.float() / torch.where(scale > 0, scale, 1)[..., None]
        stored[where], scales[where] = codes.round().clamp(-127, 127).to(stored.dtype), scale


def attention_prefill(
    q: Tensor, gate: Tensor, cache: "KVCache", slots: Tensor, cu_seqlens: Tensor, starts: Tensor
) -> Tensor:
    """Causal attention of chunks of several sequences, times sigmoid(gate): q, gate [T, H, D] -> [T, H D].

    Token t of sequence b sees positions 0 ... starts[b] + t of cache sequence slots[b], its own key among them: the
    keys of the chunk are already stored. Scores are scaled by D^-0.5.
    """
    result = torch.empty(q.shape, dtype=accumulation_dtype(q), device=q.device)
    for slot, start, (begin, end) in zip(slots.tolist(), starts.tolist(), spans(cu_seqlens), strict=True):
        result[begin:end] = _attend(q[begin:end], cache, slot, start)
    return (result * torch.sigmoid(gate.to(result.dtype))).to(q.dtype).flatten(-2)


def attention_decode(q: Tensor, gate: Tensor, cache: "KVCache", slots: Tensor, lengths: Tensor) -> Tensor:
    """The same for S new tokens of each of B sequences: q, gate [B, S, H, D] -> [B, S, H D].

    lengths int32 [B]: tokens in the cache before these S, whose keys are already stored behind them.
    """
    result = torch.empty(q.shape, dtype=accumulation_dtype(q), device=q.device)
    for b, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        result[b] = _attend(q[b], cache, slot, length)
    return (result * torch.sigmoid(gate.to(result.dtype))).to(q.dtype).flatten(-2)


def _attend(q: Tensor, cache: "KVCache", slot: int, start: int) -> Tensor:
    """q [T, H, D] at positions start ... start + T - 1 -> [T, H, D] in q's accumulation dtype."""
    wide, (tokens, heads, size) = accumulation_dtype(q), q.shape
    keys = _cached(cache.keys, cache.key_scales, slot, start + tokens, wide)
    values = _cached(cache.values, cache.value_scales, slot, start + tokens, wide)
    shared = heads // keys.shape[0]
    keys, values = (x.repeat_interleave(shared, dim=0) for x in (keys, values))
    scores = q.to(wide).transpose(0, 1) @ keys.mT * size**-0.5  # [H, T, context]
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(start + 1)
    weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1)


def _cached(stored: Tensor, scales: Tensor | None, slot: int, tokens: int, dtype: torch.dtype) -> Tensor:
    rows = stored[slot, :, :tokens].to(dtype)
    return rows if scales is None else rows * scales[slot, :, :tokens, None].to(dtype)
