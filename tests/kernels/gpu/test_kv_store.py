"""`store_kv` in Triton: the same bytes as the twin, at the given places and nowhere else."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu import kv_store  # noqa: E402
from qwenfit.kernels.layout.kv_cache import KVCache, allocate_kv_cache  # noqa: E402
from qwenfit.kernels.reference import attention as reference_attention  # noqa: E402

SEQUENCES, HEADS, TOKENS = 3, 2, 128


def filled_cache(dtype: torch.dtype, size: int) -> KVCache:
    """Full of a byte that no test stores, so that a stray write shows."""
    cache = allocate_kv_cache(SEQUENCES, HEADS, TOKENS, size, dtype)
    for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0xA5)
    return cache


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stores_what_the_twin_stores_and_nothing_else(dtype: torch.dtype, int8: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    # 11 tokens of 2 heads are 22 rows: more than one program, the second one not full.
    projected = torch.randn(11, 3 * HEADS * size, generator=generator).to(dtype)
    keys = projected[:, HEADS * size : 2 * HEADS * size].unflatten(-1, (HEADS, size))  # strided, as out of a projection
    values = projected[:, 2 * HEADS * size :].unflatten(-1, (HEADS, size))
    keys[3] = 0  # a head of zeros has no scale
    values[5, 1, 0] = 1e4  # and an outlier takes the others to zero
    places = torch.randperm(SEQUENCES * TOKENS, generator=generator)[:11].int()
    slots, positions = places // TOKENS, places % TOKENS
    expected, cache = (filled_cache(torch.int8 if int8 else dtype, size) for _ in range(2))
    reference_attention.store_kv(expected, keys, values, slots, positions)
    kv_store.store_kv(cache, keys, values, slots, positions)
    assert same_bytes(cache.keys, expected.keys)
    assert same_bytes(cache.values, expected.values)
    if cache.key_scales is not None and cache.value_scales is not None:
        assert expected.key_scales is not None and expected.value_scales is not None
        assert same_bytes(cache.key_scales, expected.key_scales)
        assert same_bytes(cache.value_scales, expected.value_scales)
        # Half a step of max|x| / 127 is all that a code may be off.
        stored = cache.keys[slots.long(), :, positions.long()].float()
        scales = cache.key_scales[slots.long(), :, positions.long()]
        off = (stored * scales[..., None] - keys.float()).abs()
        assert (off <= scales[..., None] * 0.5001).all()


def test_half_codes_round_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] + [0.0] * 8)[None, None]
    cache = allocate_kv_cache(1, 1, 1, 16, torch.int8)
    index = torch.zeros(1, dtype=torch.int32)
    kv_store.store_kv(cache, x, -x, index, index)
    assert cache.keys[0, 0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert cache.values[0, 0, 0, :8].tolist() == [-127, 0, -2, -2, 0, 2, 2, -126]


def test_refuses_what_does_not_fit() -> None:
    cache = allocate_kv_cache(1, 2, 64, 16, torch.float32)
    rows, index = torch.zeros(3, 2, 16), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="alike"):
        kv_store.store_kv(cache, rows, rows[:2], index, index)
    with pytest.raises(ValueError, match="do not fit a cache"):
        kv_store.store_kv(cache, rows[:, :1], rows[:, :1], index, index)
    with pytest.raises(ValueError, match="side by side"):
        kv_store.store_kv(cache, rows.mT.contiguous().mT, rows, index, index)
    with pytest.raises(ValueError, match="positions int32"):
        kv_store.store_kv(cache, rows, rows, index, index.long())
    kv_store.store_kv(cache, rows[:0], rows[:0], index[:0], index[:0])
