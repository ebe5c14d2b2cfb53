"""The plain rope, cache and attention against transformers' own functions, and against what must hold for any input."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.kernels.reference.attention import (
    attention_decode,
    attention_prefill,
    rope,
    rope_frequencies,
    rope_tables,
    store_kv,
)

QUICK = settings(max_examples=25, deadline=None)
HEADS, KEY_HEADS, SIZE = 4, 2, 32
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}


@pytest.fixture(scope="module")
def modeling():
    module = "transformers.models.qwen3_5.modeling_qwen3_5"
    return pytest.importorskip(module, reason="pip install 'transformers>=5.23' to compare with its Qwen3.5")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cache_of(sequences: int, tokens: int, dtype: torch.dtype = torch.float64) -> Any:
    """A cache full of NaN (int8: of -128), so that whatever is read too far shows."""
    shape = (sequences, KEY_HEADS, tokens, SIZE)
    if dtype != torch.int8:
        keys, values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        return SimpleNamespace(keys=keys, values=values, key_scales=None, value_scales=None)
    keys, values = (torch.full(shape, -128, dtype=dtype) for _ in range(2))
    key_scales, value_scales = (torch.full(shape[:3], torch.nan) for _ in range(2))
    return SimpleNamespace(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales)


@pytest.mark.parametrize("parameters", [ROPE, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("axes", [1, 3])
def test_rope_is_that_of_transformers(modeling, parameters: dict[str, Any], axes: int) -> None:
    from transformers import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(head_dim=256, rope_parameters=dict(parameters), max_position_embeddings=262144)
    positions = torch.randint(0, 1_000_000, (axes, 50), generator=torch.Generator().manual_seed(0))
    x = randn(50, 3, 256, dtype=torch.float32)
    their_cos, their_sin = modeling.Qwen3_5TextRotaryEmbedding(config)(x, positions[:, None])
    cos, sin = rope_tables(positions[0] if axes == 1 else positions, parameters, 256)
    assert torch.equal(torch.cat((cos, cos), -1), their_cos[0])
    assert torch.equal(torch.cat((sin, sin), -1), their_sin[0])
    expected, _ = modeling.apply_rotary_pos_emb(x[None], x[None], their_cos, their_sin, unsqueeze_dim=2)
    torch.testing.assert_close(rope(x, cos, sin), expected[0], rtol=1e-6, atol=1e-6)


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones() -> None:
    """As transformers 5.23 has it: 32 frequencies, the first 15 as they were, the last 10 at a quarter."""
    plain, one = rope_frequencies(ROPE, 256)
    stretched, scale = rope_frequencies(YARN, 256)
    ratio = stretched / plain
    assert one == 1.0 and scale == pytest.approx(1.1386, abs=1e-4)
    assert torch.equal(ratio[:15], torch.ones(15)) and ratio[15] < 1
    torch.testing.assert_close(ratio[22:], torch.full((10,), 0.25))
    with pytest.raises(ValueError, match="rope_type 'longrope'"):
        rope_frequencies({**ROPE, "rope_type": "longrope"}, 256)


def test_rope_turns_pairs_by_their_angle_and_leaves_the_rest() -> None:
    x, positions = randn(9, 2, 256), torch.arange(9)
    cos, sin = rope_tables(positions, ROPE, 256)
    result = rope(x, cos, sin)
    assert torch.equal(result[..., 64:], x[..., 64:])
    assert torch.equal(result[0], x[0])
    pair = torch.complex(x[:, :, 5], x[:, :, 37]) * torch.polar(torch.ones(9), positions * 1e7 ** (-10 / 64))[:, None]
    torch.testing.assert_close(
        torch.stack((result[:, :, 5], result[:, :, 37])), torch.view_as_real(pair).movedim(-1, 0)
    )


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=3),
    st.integers(0, 99),
    st.sampled_from([torch.float64, torch.int8]),
)
def test_prefill_and_decode_are_softmax_over_what_came_before(
    shapes: list[tuple[int, int]], seed: int, dtype: torch.dtype
) -> None:
    """Each of the sequences has some tokens in the cache and gets some more, in one prefill or as a decode step."""
    cache, slots = cache_of(5, 16, dtype), torch.tensor([3, 0, 4][: len(shapes)])
    history, new = [start for start, _ in shapes], [count for _, count in shapes]
    stored = [randn(start + count, 2, KEY_HEADS, SIZE, seed=seed + i) for i, (start, count) in enumerate(shapes)]
    for slot, rows in zip(slots, stored, strict=True):
        place = torch.arange(len(rows))
        store_kv(cache, rows[:, 0], rows[:, 1], slot.expand(len(rows)), place)
    q, gate = (randn(sum(new), HEADS, SIZE, seed=seed + 10 + i) for i in range(2))
    bounds = torch.tensor([0, *new]).cumsum(0).int()
    result = attention_prefill(q, gate, cache, slots, bounds, torch.tensor(history))
    for i, part in enumerate(result.split(new)):
        queries, gates = q.split(new)[i], gate.split(new)[i]
        slot = slots[i : i + 1]
        if dtype == torch.float64:
            rows = stored[i].repeat_interleave(HEADS // KEY_HEADS, dim=2)
            for t in range(new[i]):
                seen = rows[: history[i] + t + 1]
                weights = (torch.einsum("hd,thd->ht", queries[t], seen[:, 0]) / SIZE**0.5).softmax(-1)
                expected = torch.einsum("ht,thd->hd", weights, seen[:, 1]) * gates[t].sigmoid()
                torch.testing.assert_close(part[t], expected.flatten(), rtol=1e-11, atol=1e-12)
        decoded = attention_decode(queries[None], gates[None], cache, slot, torch.tensor(history[i : i + 1]))
        torch.testing.assert_close(decoded[0], part, rtol=1e-11, atol=1e-12)


def test_int8_is_within_half_a_step_and_keeps_zeros() -> None:
    cache, rows = cache_of(1, 4, torch.int8), randn(3, 2, KEY_HEADS, SIZE)
    rows[1, 0] = 0
    store_kv(cache, rows[:, 0], rows[:, 1], torch.zeros(3), torch.tensor([0, 1, 3]))
    for codes, scales, expected in (
        (cache.keys, cache.key_scales, rows[:, 0]),
        (cache.values, cache.value_scales, rows[:, 1]),
    ):
        codes, scales = codes[0, :, [0, 1, 3]].transpose(0, 1), scales[0, :, [0, 1, 3]].T
        torch.testing.assert_close(scales, expected.abs().amax(-1).float() / 127)
        assert ((codes * scales[..., None] - expected).abs() <= scales[..., None] * 0.5001).all()
        assert codes.abs().amax() == 127
    assert (cache.keys[0, :, 1] == 0).all() and (cache.key_scales[0, :, 1] == 0).all()
    assert (cache.keys[0, :, 2] == -128).all() and cache.key_scales[0, :, 2].isnan().all()


def test_attention_is_the_layer_of_transformers(modeling) -> None:
    """A whole attention layer, its matmuls and norms by transformers: 20 tokens at once, then two more."""
    from transformers import DynamicCache, Qwen3_5TextConfig

    parameters = {**ROPE, "mrope_section": [2, 1, 1]}
    config = Qwen3_5TextConfig(
        hidden_size=48,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=SIZE,
        rope_parameters=dict(parameters),
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = modeling.Qwen3_5Attention(config, 0).eval()
    x, cache, positions = torch.randn(1, 22, 48), DynamicCache(config=config), torch.arange(22)
    rotary = modeling.Qwen3_5TextRotaryEmbedding(config)
    cos, sin = rope_tables(positions, parameters, SIZE)
    with torch.no_grad():
        expected = []
        for begin, end in ((0, 20), (20, 22)):
            embedding = rotary(x, positions[None, begin:end])
            mask = torch.full((end - begin, end), float("-inf")).triu(begin + 1)[None, None]
            expected.append(layer(x[:, begin:end], embedding, mask, past_key_values=cache)[0])
        q, gate = layer.q_proj(x[0]).unflatten(-1, (HEADS, 2 * SIZE)).chunk(2, dim=-1)
        keys = layer.k_norm(layer.k_proj(x[0]).unflatten(-1, (KEY_HEADS, SIZE)))
        q, keys = rope(layer.q_norm(q), cos, sin), rope(keys, cos, sin)
        values = layer.v_proj(x[0]).unflatten(-1, (KEY_HEADS, SIZE))
        ours, slot = cache_of(1, 64, torch.float32), torch.tensor([0])
        store_kv(ours, keys, values, slot.expand(22), positions)
        first = attention_prefill(q[:20], gate[:20], ours, slot, torch.tensor([0, 20]), slot)
        second = attention_decode(q[None, 20:], gate[None, 20:], ours, slot, torch.tensor([20]))
        result = layer.o_proj(torch.cat((first, second[0])))
    torch.testing.assert_close(result, torch.cat(expected, dim=1)[0], rtol=1e-5, atol=1e-6)


def test_the_gate_is_applied_before_the_result_is_rounded() -> None:
    cache, place = cache_of(1, 64, torch.bfloat16), torch.arange(30)
    rows = randn(30, 2, KEY_HEADS, SIZE, dtype=torch.bfloat16)
    store_kv(cache, rows[:, 0], rows[:, 1], torch.zeros(30), place)
    q, gate = (randn(1, 1, HEADS, SIZE, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    wide = attention_decode(q.double(), gate.double(), cache, torch.tensor([0]), torch.tensor([29]))
    narrow = attention_decode(q, gate, cache, torch.tensor([0]), torch.tensor([29]))
    assert torch.equal(narrow, wide.bfloat16())
