"""`kv_pool`: the names and defaults that CONTRACT promises, engine by engine."""

from typing import Any

import pytest

from qwenfit.planner import kv_pool
from qwenfit.profiles import UnknownName, model

GIB = 1 << 30


def test_the_example_of_the_contract() -> None:
    """vLLM 0.32's own figures for 9B in 16 GiB at 262,144 tokens (row of the ground truth)."""
    answer = kv_pool(
        model="qwen3.5-9b",
        engine="vllm",
        version="0.32",
        tp=1,
        kv_dtype="bf16",
        state_dtype="float32",
        prefix_caching=True,
        mtp=0,
        pool_bytes=17179869184,
        ctx_tokens=262144,
    )
    assert (answer.block_tokens, answer.bytes_per_block, answer.blocks_per_request) == (528, 17301504, 503)
    assert (answer.num_blocks, answer.kv_cache_tokens) == (992, 516991)
    assert answer.max_concurrency == pytest.approx(1.9722, abs=5e-5)
    assert (answer.bytes_needed, answer.min_pool_bytes) == (8702656512, 8719958016)


def test_defaults_are_those_of_the_engine() -> None:
    assert kv_pool(pool_bytes=16 * GIB) == kv_pool(
        "qwen3.5-9b", "vllm", "0.32", 1, "bf16", "float32", True, 0, 16 * GIB
    )
    old = kv_pool(version="0.24.0", pool_bytes=16 * GIB)
    assert old == kv_pool(version="0.24.0", prefix_caching=False, pool_bytes=16 * GIB)
    assert old.blocks_per_request == 500
    assert kv_pool(model("qwen3.5-9b"), pool_bytes=16 * GIB) == kv_pool("9b", pool_bytes=16 * GIB)


def test_sglang_by_the_names_of_the_contract() -> None:
    """First row of the ground truth: 0.8B in 4 GiB."""
    answer = kv_pool("qwen3.5-0.8b", "sglang", radix=True, strategy="extra_buffer", pool_bytes=4 * GIB)
    assert (answer.state_slots, answer.state_slots_per_request, answer.kv_cache_tokens) == (103, 5, 184165)
    assert (answer.max_running_requests, answer.cell_bytes, answer.state_bytes_per_request) == (20, 12288, 19537920)
    without = kv_pool("qwen3.5-0.8b", "sglang", prefix_caching=False, pool_bytes=4 * GIB)
    assert without == kv_pool("qwen3.5-0.8b", "sglang", radix=False, pool_bytes=4 * GIB)
    assert without.state_slots_per_request == 1


def test_llama_cpp_by_the_names_of_the_contract() -> None:
    """9B, 4,096 tokens, f16: 8 layers x 4 heads x 512 x 2 bytes per token; 24 float32 states of 2,195,456 bytes."""
    answer = kv_pool("qwen3.5-9b", "llama.cpp", kv_dtype="f16", ctx_tokens=4096, seqs=1, ubatch=512, flash_attn=True)
    assert answer.kv_cache_bytes == 4096 * 32768
    assert answer.recurrent_state_bytes == 24 * 4 * (3 * 8192 + 32 * 128 * 128)
    assert answer.compute_buffer_bytes > 0 and answer.output_buffer_bytes > 0


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"engine": "vlm", "pool_bytes": GIB}, UnknownName, "give one of vllm, sglang, llama.cpp"),
        ({"model": "qwen9.5-9b", "pool_bytes": GIB}, UnknownName, "qwen9.5-9b"),
        ({}, ValueError, "pool_bytes is missing"),
        ({"pool_bytes": 8 * GIB}, ValueError, "8,719,958,016 bytes .* the longest that fits is 258,192 tokens"),
        ({"pool_bytes": -1}, ValueError, "and has 0; the longest that fits is 0 tokens"),
        ({"pool_bytes": GIB, "ctx_tokens": 0}, ValueError, "give 1 or more"),
        ({"engine": "sglang", "pool_bytes": 1 << 20}, ValueError, "a state slot takes"),
    ],
)
def test_mistakes_are_sentences(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        kv_pool(**settings)
