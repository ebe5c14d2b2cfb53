"""The keys and values of one attention layer, for all sequences of a run: allocated once, padded to 64 tokens.

    keys, values        [seqs, KV, ctx', D]    the model's dtype, or int8
    their scales        [seqs, KV, ctx']       float32, int8 only: x = code * scale, scale = max|x| / 127 by token, head

ctx' is the context rounded up to 64 tokens, so that a tile of 64 keys never leaves a head. The tokens of a head are
neighbours: a program that walks through the context of one head reads one stream, 512 bytes a token in bf16 (D = 256),
256 and 4 in int8. Positions past a sequence's length hold whatever was there; readers mask them by length.

Who writes: `kv_store.store_kv`. Who reads: `attention_decode`, `attention_prefill`. This file needs no Triton.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PAD_TOKENS = 64


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """keys, values [seqs, KV, ctx', D]; key_scales, value_scales float32 [seqs, KV, ctx'], None unless int8."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        if keys.dim() != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
            raise ValueError(
                f"a cache holds keys and values [seqs, KV, ctx, D] alike, not {tuple(keys.shape)} {keys.dtype} and "
                f"{tuple(values.shape)} {values.dtype}"
            )
        if keys.shape[2] % PAD_TOKENS:
            raise ValueError(f"a cache of {keys.shape[2]} tokens: pad it to a multiple of {PAD_TOKENS}")
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise ValueError("keys and values of a cache are contiguous: the kernels walk through them by address")
        for scales in (self.key_scales, self.value_scales):
            if (scales is None) == (keys.dtype == torch.int8):
                raise ValueError(
                    f"a cache of {keys.dtype} has {'no ' if scales is None else ''}scales: int8 needs them"
                )
            if scales is not None and (scales.dtype != torch.float32 or scales.shape != keys.shape[:3]):
                raise ValueError(f"scales of a cache are float32 {tuple(keys.shape[:3])}, not {scales.dtype}")

    @property
    def is_int8(self) -> bool:
        return self.key_scales is not None

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def allocate_kv_cache(
    sequences: int, key_heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> KVCache:
    """A cache of zeros for `tokens` per sequence, rounded up to 64; dtype int8 gets scales. ValueError below 1."""
    if min(sequences, key_heads, tokens, head_dim) < 1:
        raise ValueError(f"a cache of {sequences} x {key_heads} x {tokens} x {head_dim}: give 1 or more of each")
    rows = (sequences, key_heads, -(-tokens // PAD_TOKENS) * PAD_TOKENS)
    keys, values = (torch.zeros((*rows, head_dim), dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return KVCache(keys, values)
    key_scales, value_scales = (torch.zeros(rows, dtype=torch.float32, device=device) for _ in range(2))
    return KVCache(keys, values, key_scales, value_scales)
