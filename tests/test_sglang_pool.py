"""SGLang's two pools: every row that its own functions gave, its limits, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenfit.planner.engines.sglang_pool import Cells, cells, pool, stage_layers
from qwenfit.profiles.errors import BadInput, UnknownName, Unsupported
from qwenfit.profiles.model_catalog import model

GIB = 1 << 30
TRUTH = json.loads((Path(__file__).parent / "data" / "sglang_pools.json").read_text(encoding="utf-8"))


def test_every_row_of_the_ground_truth() -> None:
    """sglang 0.5.23's own slot, budget and request functions on 768 settings; exact."""
    assert len(TRUTH["rows"]) == 768
    for name, tp, kv_dtype, state_dtype, strategy, mtp, pool_gib, *expected in TRUTH["rows"]:
        sizes = cells(model(name), tp, 1, kv_dtype, state_dtype, True, strategy, mtp)
        found = pool(sizes, pool_gib * GIB, 262144)
        assert [
            found.state_slots,
            found.state_slots_per_request,
            found.kv_cache_tokens,
            found.max_running_requests,
            found.cell_bytes,
            found.state_bytes_per_request,
        ] == expected, (name, tp, kv_dtype, state_dtype, strategy, mtp, pool_gib)


def test_the_slot_of_9b_is_the_one_that_a_server_printed() -> None:
    """kvcached pull request 459 on an RTX Pro 6000: 2,146,304 bytes per layer, 24 layers."""
    assert cells(model("qwen3.5-9b")).state_bytes == 24 * 2_146_304


def test_fixed_slots_leave_the_rest_to_attention() -> None:
    """--max-mamba-cache-size K: K slots and one of padding; with drafts as many again per position of a request."""
    sizes = cells(model("qwen3.5-9b"))
    found = pool(sizes, 16 * GIB, 262144, max_mamba_cache_size=20, max_running_requests=4)
    assert (found.state_slots, found.max_running_requests) == (20, 4)
    assert found.kv_cache_tokens == (16 * GIB - 21 * sizes.state_bytes) // sizes.cell_bytes
    assert sizes.state_pool_bytes(20, 4) == 21 * sizes.state_bytes
    drafting = cells(model("qwen3.5-9b"), mtp=3)
    found = pool(drafting, 16 * GIB, 262144, max_mamba_cache_size=20, max_running_requests=4)
    assert found.kv_cache_tokens == (16 * GIB - drafting.state_pool_bytes(20, 4)) // drafting.cell_bytes
    assert drafting.state_pool_bytes(20, 4) == (21 + 5 * 4) * drafting.state_bytes
    assert drafting.cell_bytes == sizes.cell_bytes * 9 // 8


def test_without_radix_cache_a_request_takes_one_slot() -> None:
    sizes = cells(model("qwen3.5-9b"), radix=False)
    assert sizes.slots_per_request == 1
    assert pool(sizes, 16 * GIB, 262144, False, max_running_requests=7).state_slots == 7


def test_tokens_come_in_whole_pages() -> None:
    found = pool(cells(model("qwen3.5-9b")), 16 * GIB, 262144, page_tokens=64)
    assert found.kv_cache_tokens % 64 == 0


def test_pipeline_stages_are_charged_for_the_fullest() -> None:
    whole, thirds = cells(model("qwen3.5-9b")), cells(model("qwen3.5-9b"), pp=3)
    # 32 layers are 10, 11 and 11 (sglang 0.5.23 `distributed/utils.py`, `get_pp_indices`: the last get one more); vLLM
    # makes 11, 11 and 10 of them
    assert [len(stage) for stage in stage_layers(32, 3)] == [10, 11, 11]
    assert thirds.state_bytes == whole.state_bytes * 8 // 24
    assert thirds.cell_bytes == whole.cell_bytes * 3 // 8


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"kv_dtype": "q8_0"}, UnknownName),
        ({"state_dtype": "int8"}, UnknownName),
        ({"strategy": "buffer"}, UnknownName),
        ({"tp": 3}, Unsupported),
        ({"pp": 0}, Unsupported),
        ({"mtp": -1}, Unsupported),
    ],
)
def test_settings_that_sglang_has_not(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        cells(model("qwen3.5-9b"), **settings)


@pytest.mark.parametrize("pool_bytes", [0, -5, 50 << 20, 120 << 20, 300 << 20])
def test_too_small_a_pool_is_a_sentence(pool_bytes: int) -> None:
    with pytest.raises(ValueError, match="SGLang"):
        pool(cells(model("qwen3.5-9b")), pool_bytes, 262144)


def test_a_context_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput):
        pool(Cells(1, 1, 1, 0), GIB, 0)
