# pyright: reportCallIssue=false
# Arguments travel as lists here, whose lengths pyright does not know.
"""`attention_decode` and `attention_prefill` in Triton against float64, in the interpreter.

The bound is that of the issue: relative RMS error against float64 no more than 1.5 times that of torch's attention in
the same dtype over the same (dequantized) cache. Every cache is full of NaN where no key was stored.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu import attention_decode as decode  # noqa: E402
from qwenfit.kernels.gpu import attention_prefill as prefill  # noqa: E402
from qwenfit.kernels.gpu.target import TARGETS, target  # noqa: E402
from qwenfit.kernels.layout.kv_cache import KVCache, allocate_kv_cache  # noqa: E402
from qwenfit.kernels.reference import attention as reference_attention  # noqa: E402

HALVES = (torch.bfloat16, torch.float16)


def random_cache(
    lengths: dict[int, int], key_heads: int, size: int, dtype: torch.dtype, int8: bool, tokens: int = 192
) -> KVCache:
    """4 sequences; random keys and values up to a length, behind it NaN (int8: codes of -128, scales of NaN)."""
    cache = allocate_kv_cache(4, key_heads, tokens, size, torch.int8 if int8 else dtype)
    for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if tensor is not None:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -128)
    generator = torch.Generator().manual_seed(sum(lengths.values()) + size)
    for slot, length in lengths.items():
        rows = torch.randn(2, length, key_heads, size, generator=generator).to(dtype)
        slots = torch.full((length,), slot, dtype=torch.int32)
        reference_attention.store_kv(cache, rows[0], rows[1], slots, int32(range(length)))
    return cache


def int32(numbers: Any) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32)


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(cache: KVCache) -> KVCache:
    """The same values in float64: what the twin computes of them is the truth."""
    if cache.key_scales is None or cache.value_scales is None:
        return KVCache(cache.keys.double(), cache.values.double())
    keys = cache.keys.double() * cache.key_scales[..., None].double()
    return KVCache(keys, cache.values.double() * cache.value_scales[..., None].double())


def by_torch(q: Tensor, gate: Tensor, cache: KVCache, slot: int, start: int) -> Tensor:
    """torch's own attention in q's dtype: q, gate [S, H, D] -> [S, H D]."""
    stop = start + q.shape[0]
    keys, values = (stored[slot, :, :stop].to(q.dtype)[None] for stored in (exact(cache).keys, exact(cache).values))
    seen = torch.ones(q.shape[0], stop, dtype=torch.bool).tril(start)
    result = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, seen, enable_gqa=True)
    return (result[0].transpose(0, 1) * torch.sigmoid(gate)).flatten(-2)


def error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


def check_decode(
    dtype: torch.dtype, int8: bool, lengths: list[int], new_tokens: int, group: int, key_heads: int, size: int
) -> None:
    slots = [3, 0, 2, 1][: len(lengths)]
    cache = random_cache(
        {slot: length + new_tokens for slot, length in zip(slots, lengths, strict=True)}, key_heads, size, dtype, int8
    )
    heads = group * key_heads
    # Queries and gates lie side by side in a projection: strided by token and sequence.
    projected = randn(len(lengths), new_tokens, 2 * heads * size, dtype=dtype, seed=new_tokens)
    q, gate = (half.unflatten(-1, (heads, size)) for half in projected.chunk(2, dim=-1))
    result = decode.attention_decode(q, gate, cache, int32(slots), int32(lengths))
    truth = reference_attention.attention_decode(q.double(), gate.double(), exact(cache), int32(slots), int32(lengths))
    rivals = [by_torch(q[b], gate[b], cache, slot, lengths[b]) for b, slot in enumerate(slots)]
    assert result.dtype == dtype and result.shape == (len(lengths), new_tokens, heads * size)
    assert error(result, truth) <= 1.5 * error(torch.stack(rivals), truth)


def check_prefill(
    dtype: torch.dtype, int8: bool, starts: list[int], counts: list[int], group: int, key_heads: int, size: int
) -> None:
    slots = [1, 3, 0, 2][: len(counts)]
    cache = random_cache({slot: starts[b] + counts[b] for b, slot in enumerate(slots)}, key_heads, size, dtype, int8)
    heads, ends = group * key_heads, torch.tensor([0, *counts]).cumsum(0).tolist()
    projected = randn(ends[-1], 2 * heads * size, dtype=dtype, seed=ends[-1])
    q, gate = (half.unflatten(-1, (heads, size)) for half in projected.chunk(2, dim=-1))
    arguments = (int32(slots), int32(ends), int32(starts))
    result = prefill.attention_prefill(q, gate, cache, *arguments)
    truth = reference_attention.attention_prefill(q.double(), gate.double(), exact(cache), *arguments)
    rivals = [
        by_torch(q[begin:end], gate[begin:end], cache, slot, start)
        for slot, start, begin, end in zip(slots, starts, ends, ends[1:], strict=False)
    ]
    assert result.dtype == dtype and result.shape == (ends[-1], heads * size)
    assert error(result, truth) <= 1.5 * error(torch.cat(rivals), truth)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_decode_at_the_size_of_the_family(dtype: torch.dtype, int8: bool) -> None:
    """D = 256, a group of 8 (35B-A3B), contexts of one token (15 empty splits), inside a tile, and over several."""
    check_decode(dtype, int8, lengths=[0, 31, 150], new_tokens=1, group=8, key_heads=1, size=256)


@pytest.mark.parametrize(("new_tokens", "group"), [(3, 4), (8, 4), (5, 16)])
def test_decode_of_drafts_is_causal_among_them(new_tokens: int, group: int) -> None:
    """Tiles of 16 and 32 query rows, and more rows than a tile has."""
    check_decode(torch.bfloat16, False, lengths=[62], new_tokens=new_tokens, group=group, key_heads=1, size=64)


@pytest.mark.parametrize("int8", [False, True])
def test_decode_elementwise(int8: bool) -> None:
    """float32 models, and Turing: the kernel without `tl.dot`."""
    check_decode(torch.float32, int8, lengths=[17, 70], new_tokens=2, group=2, key_heads=1, size=64)


def test_decode_on_turing_takes_the_elementwise_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "target_of", lambda _: target("sm_75"))
    monkeypatch.setattr(decode, "attention_decode_kernel", None)
    check_decode(torch.float16, False, lengths=[40], new_tokens=1, group=2, key_heads=2, size=64)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_prefill_at_the_size_of_the_family(dtype: torch.dtype, int8: bool) -> None:
    """D = 256; chunks that start at 0, inside a tile of keys and on its edge; one of them empty. fp32: by matmul."""
    check_prefill(dtype, int8, starts=[0, 37, 5, 64], counts=[20, 70, 0, 1], group=2, key_heads=1, size=256)


def test_prefill_of_many_heads_and_short_chunks() -> None:
    check_prefill(torch.bfloat16, False, starts=[3, 0], counts=[2, 3], group=3, key_heads=2, size=128)


@pytest.mark.slow
@pytest.mark.parametrize("name", [where.name for where in TARGETS])
def test_every_configuration_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode, prefill):
        monkeypatch.setattr(module, "target_of", lambda _: target(name))
    for int8 in (False, True):
        check_decode(torch.float16, int8, lengths=[100, 3], new_tokens=2, group=4, key_heads=1, size=256)
        check_decode(torch.float16, int8, lengths=[40], new_tokens=8, group=4, key_heads=1, size=64)
        check_prefill(torch.float16, int8, starts=[0, 37], counts=[9, 140], group=2, key_heads=1, size=256)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(HALVES),
    int8=st.booleans(),
    lengths=st.lists(st.integers(0, 180), min_size=1, max_size=3),
    new_tokens=st.integers(1, 8),
    group=st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
    key_heads=st.integers(1, 2),
    size=st.sampled_from([64, 128, 256]),
)
def test_decode_for_any_shape(**shape: Any) -> None:
    check_decode(**shape)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(HALVES),
    int8=st.booleans(),
    chunks=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 90)), min_size=1, max_size=4),
    group=st.sampled_from([1, 3, 4]),
    key_heads=st.integers(1, 2),
    size=st.sampled_from([64, 128, 256]),
)
def test_prefill_for_any_shape(chunks: list[tuple[int, int]], **shape: Any) -> None:
    if sum(count for _, count in chunks):
        starts, counts = zip(*chunks, strict=True)
        check_prefill(starts=list(starts), counts=list(counts), **shape)


def test_an_int8_cache_is_read_exactly() -> None:
    """One token, so the weight is 1: what comes out is code times scale, to the rounding of the result."""
    cache = random_cache({0: 1}, 1, 64, torch.bfloat16, int8=True)
    q, gate = randn(1, 1, 2, 64, dtype=torch.bfloat16, seed=0), torch.full((1, 1, 2, 64), 100.0).bfloat16()
    expected = exact(cache).values[0, 0, 0].bfloat16().repeat(2)
    assert torch.equal(decode.attention_decode(q, gate, cache, int32([0]), int32([0]))[0, 0], expected)
    result = prefill.attention_prefill(q[0], gate[0], cache, int32([0]), int32([0, 1]), int32([0]))
    assert torch.equal(result[0], expected)


def test_values_near_nothing_survive_float16() -> None:
    """Values of 1e-4: a weight times their scale would be a subnormal float16, were it not taken times 127."""
    cache = random_cache({0: 64}, 1, 64, torch.float16, int8=True)
    assert cache.value_scales is not None
    cache = replace(cache, value_scales=cache.value_scales * 1e-4)
    q, gate = randn(1, 1, 2, 64, dtype=torch.float16, seed=0), randn(1, 1, 2, 64, dtype=torch.float16, seed=1)
    truth = reference_attention.attention_decode(q.double(), gate.double(), exact(cache), int32([0]), int32([63]))
    assert error(decode.attention_decode(q, gate, cache, int32([0]), int32([63])), truth) < 0.02


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every buffer that a host allocates lies between NaN, and is checked for it at the end."""
    empty, guarded = torch.empty, []

    def between_canaries(shape: Any, **options: Any) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = empty(count + 512, **options)
        buffer.view(torch.uint8).fill_(0xFF)
        guarded.append(buffer)
        return buffer[256:-256].view(shape)

    monkeypatch.setattr(torch, "empty", between_canaries)
    yield
    monkeypatch.undo()
    assert guarded
    for buffer in guarded:
        edges = torch.cat((buffer[:256], buffer[-256:])).view(torch.uint8)
        assert (edges == 0xFF).all()


def test_nothing_is_written_outside(canaries: None) -> None:
    """And the sums of empty splits, which nobody wrote, are not read: they are NaN here."""
    cache = random_cache({0: 40, 1: 7}, 1, 64, torch.bfloat16, int8=False)
    before = cache.keys.clone(), cache.values.clone()
    q, gate = (randn(2, 2, 3, 64, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    result = decode.attention_decode(q, gate, cache, int32([0, 1]), int32([38, 5]))
    assert result.isfinite().all()
    result = prefill.attention_prefill(
        q.flatten(0, 1), gate.flatten(0, 1), cache, int32([0, 1]), int32([0, 2, 4]), int32([38, 5])
    )
    assert result.isfinite().all()
    assert all(
        torch.equal(a.view(torch.int16), b.view(torch.int16))
        for a, b in zip(before, (cache.keys, cache.values), strict=True)
    )


def test_matmul_takes_rows_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time instead of all of them."""
    monkeypatch.setattr(prefill, "MATMUL_BYTES", 2 * 4 * 60 * 8)
    check_prefill(torch.float32, True, starts=[40], counts=[20], group=2, key_heads=2, size=64)


def test_refuses_what_does_not_fit() -> None:
    cache = random_cache({0: 8}, 2, 64, torch.bfloat16, int8=False)
    q = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)
    index = int32([0])
    for wrong, sentence in (
        ((q.float(), q), "alike, bf16, fp16"),
        ((q.expand(1, 9, 4, 64), q.expand(1, 9, 4, 64)), "use attention_prefill"),
        ((q[:, :, :3], q[:, :, :3]), "3 query heads of 64 on 2 key heads of 64"),
        ((q.half(), q.half()), "a cache of torch.bfloat16 for a model in torch.float16"),
    ):
        with pytest.raises(ValueError, match=sentence):
            decode.attention_decode(*wrong, cache, index, index)
        if "prefill" not in sentence:
            with pytest.raises(ValueError, match=sentence):
                prefill.attention_prefill(*(x[0] for x in wrong), cache, index, int32([0, 1]), index)
    with pytest.raises(ValueError, match="lengths int32"):
        decode.attention_decode(q, q, cache, index, index.long())
    with pytest.raises(ValueError, match="cu_seqlens int32"):
        prefill.attention_prefill(q[0], q[0], cache, index, index, index)
    empty = prefill.attention_prefill(q[0, :0], q[0, :0], cache, index, int32([0, 0]), index)
    assert empty.shape == (0, 256)
    assert decode.attention_decode(q[:0], q[:0], cache, index[:0], index[:0]).shape == (0, 1, 256)
