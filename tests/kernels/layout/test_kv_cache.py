"""The cache's shapes and bytes: what the planner counts per token (`planner/engines/native.py`) is what is
allocated."""

import pytest
import torch

from qwenfit.kernels.layout.kv_cache import KVCache, allocate_kv_cache


@pytest.mark.parametrize(("dtype", "bytes_per_token"), [(torch.bfloat16, 2 * 2 * 512), (torch.int8, 2 * 2 * 260)])
def test_a_token_costs_what_the_planner_counts(dtype: torch.dtype, bytes_per_token: int) -> None:
    cache = allocate_kv_cache(sequences=3, key_heads=2, tokens=65, head_dim=256, dtype=dtype)
    assert cache.keys.shape == (3, 2, 128, 256)  # 65 tokens take two tiles of 64
    assert cache.bytes == 3 * 128 * bytes_per_token
    assert cache.is_int8 == (dtype == torch.int8)


def test_refuses_what_kernels_could_not_read() -> None:
    keys = torch.zeros(1, 1, 64, 16)
    codes = keys.to(torch.int8)
    scales = torch.zeros(1, 1, 64)
    with pytest.raises(ValueError, match="alike"):
        KVCache(keys, keys[..., :8])
    with pytest.raises(ValueError, match="multiple of 64"):
        KVCache(keys[:, :, :63].clone(), keys[:, :, :63].clone())
    with pytest.raises(ValueError, match="contiguous"):
        KVCache(keys.mT.contiguous().mT, keys)
    with pytest.raises(ValueError, match="int8 needs them"):
        KVCache(codes, codes)
    with pytest.raises(ValueError, match="int8 needs them"):
        KVCache(keys, keys, scales, scales)
    with pytest.raises(ValueError, match="float32"):
        KVCache(codes, codes, scales, scales.double())
    with pytest.raises(ValueError, match="1 or more"):
        allocate_kv_cache(0, 1, 1, 16, torch.float32)
