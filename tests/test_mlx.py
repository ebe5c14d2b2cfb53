"""MLX-LM: cache and state to the byte, the scores that grow with the context, and what Metal's working set allows."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.engines import mlx
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles.device import Device
from qwenfit.profiles.errors import Unsupported
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.model_catalog import model

GIB = 1 << 30
FIELD_ROWS = json.loads((Path(__file__).parent / "data" / "mlx_peak_memory.json").read_text())["rows"]


def made_mac(usable_bytes: int = 96 * GIB, **changes: Any) -> Device:
    facts: dict[str, Any] = {
        "name": "made-mac",
        "title": "A Mac",
        "vendor": "apple",
        "architecture": "m5",
        "kind": "unified",
        "memory_bytes": 128 * GIB,
        "usable_bytes": usable_bytes,
        "memory_bandwidth_bytes_per_s": 10**11,
        "flops_per_s": {"fp16": 10**13},
        "source": "invented",
        "checked": "2026-11-22",
    }
    return Device(**{**facts, **changes})


def estimate(name: str = "qwen3.5-9b", weights: str = "mlx-4bit", mac: Device | None = None, **told: Any):
    options = Options(**told.pop("options", {}))
    fields: dict[str, Any] = {"kv_dtype": "bf16", "state_dtype": "float32", "mtp": 0, "vision": False, **told}
    setup = Setup(
        model=model(name),
        weights=weight_format(weights),
        devices=(mac or made_mac(),),
        version="0.32.2",
        tp=1,
        pp=1,
        options=options,
        **fields,
    )
    return mlx.estimate(setup)


@pytest.mark.parametrize(("kv_dtype", "per_token"), [("bf16", 32768), ("8bit", 17408), ("4bit", 9216)])
def test_cache_of_9b(kv_dtype: str, per_token: int) -> None:
    """8 layers x 4 heads x 512 elements at 2, 1.0625 and 0.5625 bytes (mlx-lm `QuantizedKVCache`), in steps of 256."""
    allocation = estimate(kv_dtype=kv_dtype).allocate(1100, 1)
    assert allocation.detail["kv_bytes_per_token"] == per_token
    assert allocation.devices[0].memory.kv_cache.mid == 1280 * per_token


@pytest.mark.parametrize(
    ("name", "state_bytes"), [("qwen3.5-9b", 51_511_296), ("qwen3.5-27b", 153_944_064), ("qwen3.5-0.8b", 19_537_920)]
)
def test_state_is_float32_with_three_columns(name: str, state_bytes: int) -> None:
    """`ArraysCache`: 9B 24 x (3 x 8192 x 2 + 2,097,152) = 49.125 MiB a sequence, whatever the cache type."""
    assert estimate(name).allocate(4096, 3).devices[0].memory.recurrent_state.mid == 3 * state_bytes
    assert estimate(name, kv_dtype="4bit").allocate(4096, 1).devices[0].memory.recurrent_state.mid == state_bytes


def test_weights_are_the_text_alone() -> None:
    """8,953,803,264 parameters of the text in bf16, and 7,680 bytes more for A_log and the gated norm in F32."""
    assert estimate(weights="bf16").allocate(1, 1).devices[0].memory.weights.mid == 17_907_614_208


def test_peak_memory_of_the_field() -> None:
    """A median error of 5 % is allowed; `layers_in_flight_percent` was fitted on the first eight rows."""
    errors = []
    for row in FIELD_ROWS:
        total = estimate(row["model"], row["weights"]).allocate(row["ctx_tokens"], 1).devices[0].memory.total
        errors.append(total.mid / (row["peak_gb"] * 1e9) - 1)
        print(f"{row['model']:18} {row['ctx_tokens']:7,} {row['peak_gb']:6.2f} GB {errors[-1]:+.1%}")
        assert total.low <= row["peak_gb"] * 1e9 * 1.01 <= total.high * 1.01
    assert median(map(abs, errors)) <= 0.005
    assert max(map(abs, errors)) <= 0.01


def test_scores_grow_with_the_context_and_the_step() -> None:
    """35B-A3B: 16 heads x 2048 queries x 2 B and a mask of 2048 B per context token, beside 20,480 B of cache."""
    small, large = (estimate("qwen3.6-35b-a3b").allocate(ctx, 1).devices[0].memory.total.mid for ctx in (32000, 192000))
    assert (large - small) / 160_000 == pytest.approx(20_480 + 16 * 2048 * 2 + 2048, rel=1e-3)
    narrow = estimate("qwen3.6-35b-a3b", options={"max_num_batched_tokens": 512})
    wide = estimate("qwen3.6-35b-a3b")
    assert narrow.allocate(131072, 1).detail["score_bytes"] == 512 * 131072 * 33
    assert wide.allocate(131072, 1).detail["score_bytes"] == 2048 * 131072 * 33


def test_a_kept_conversation_is_the_upper_end() -> None:
    kept = estimate().allocate(32768, 1).devices[0].memory
    forgotten = estimate(options={"prefix_caching": False}).allocate(32768, 1).devices[0].memory
    assert kept.kv_cache.high - kept.kv_cache.mid == 32768 * 32768
    assert not kept.kv_cache.exact
    assert forgotten.kv_cache.exact and forgotten.kv_cache.high == forgotten.kv_cache.low


def test_a_quantized_cache_serves_one_sequence() -> None:
    quantized = estimate(kv_dtype="8bit")
    assert quantized.shortfall_bytes(4096, 1) < 0 < quantized.shortfall_bytes(4096, 2)
    assert quantized.allocate(4096, 2).reasons == (
        "mlx_lm.server runs one sequence at a time with --kv-bits: ask for 1, or a bf16 cache",
    )
    assert estimate().allocate(4096, 2).fits


def test_words_at_the_limit() -> None:
    needed = estimate().allocate(32768, 1).devices[0].memory.total.mid
    tight = estimate(mac=made_mac(needed + GIB // 4)).allocate(32768, 1)
    assert tight.fits
    assert any("of Metal's working set" in warning for warning in tight.warnings)
    assert any("--prompt-cache-size 0" in warning for warning in tight.warnings)
    short = estimate(mac=made_mac(needed - 1)).allocate(32768, 1)
    assert len(short.reasons) == 1 and "Metal's working set is" in short.reasons[0]
    assert not any("Metal" in warning for warning in estimate().allocate(32768, 1).warnings)


@pytest.mark.parametrize(
    ("told", "word"),
    [
        ({"vision": True}, "--vision"),
        ({"mtp": 2}, "--mtp"),
        ({"state_dtype": "bfloat16"}, "--state-dtype"),
        ({"kv_dtype": "fp8"}, "bf16, 8bit, 4bit"),
        ({"options": {"offload_experts": True}}, "offload"),
    ],
)
def test_what_mlx_lm_does_not_have(told: dict[str, Any], word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        estimate(**told)


def test_where_and_what_it_loads() -> None:
    mac, nine = made_mac(), model("qwen3.5-9b")
    assert mlx.runs_on(mac, "0.32.2") is None
    assert "Apple" in (mlx.runs_on(made_mac(vendor="nvidia"), "0.32.2") or "")
    for name in mlx.weight_formats(nine, mac):
        assert mlx.loads(nine, weight_format(name), mac, "0.32.2") is None
    for name in ("int4", "q4_k_m", "fp8", "nvfp4"):
        assert "mlx-4bit" in (mlx.loads(nine, weight_format(name), mac, "0.32.2") or "")


def test_launch_lines() -> None:
    assert estimate().command(32768, 4) == (
        "mlx_lm.server --model mlx-community/Qwen3.5-9B-4bit --prefill-step-size 2048 --prompt-concurrency 1 "
        "--decode-concurrency 4 --prompt-cache-size 1"
    )
    line = estimate(weights="bf16", kv_dtype="8bit", options={"prefix_caching": False}).command(32768, 1)
    assert "--model Qwen/Qwen3.5-9B " in line
    assert line.endswith("--prompt-cache-size 0 --kv-bits 8 --kv-group-size 64 --quantized-kv-start 0")


@given(
    ctx=st.integers(1, 1_010_000),
    more_ctx=st.integers(0, 300_000),
    seqs=st.integers(1, 64),
    more_seqs=st.integers(0, 64),
    kv_dtype=st.sampled_from(["bf16", "8bit", "4bit"]),
    usable=st.integers(GIB, 512 * GIB),
)
@settings(max_examples=60, deadline=None)
def test_more_never_takes_less(ctx: int, more_ctx: int, seqs: int, more_seqs: int, kv_dtype: str, usable: int) -> None:
    made = estimate("qwen3.5-2b", kv_dtype=kv_dtype, mac=made_mac(usable))
    less, more = made.allocate(ctx, seqs), made.allocate(ctx + more_ctx, seqs + more_seqs)
    memory, larger = less.devices[0].memory, more.devices[0].memory
    assert memory.total.mid == sum(amount.mid for amount in memory.parts.values())
    assert all(amount.low <= amount.mid <= amount.high for amount in memory.parts.values())
    assert memory.total.mid <= larger.total.mid and memory.total.high <= larger.total.high
    assert made.shortfall_bytes(ctx, seqs) <= made.shortfall_bytes(ctx + more_ctx, seqs + more_seqs)
    assert less.fits == (made.shortfall_bytes(ctx, seqs) <= 0)
    if kv_dtype == "bf16" or seqs == 1:
        assert made.shortfall_bytes(ctx, seqs) == memory.total.mid - usable
