"""Transformers: an exact cache, prompts in one piece, weights that unpack, layers over several devices."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.engines import transformers
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles.device import Device
from qwenfit.profiles.errors import Unsupported
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.model_catalog import model

GIB = 1 << 30
TEXT_9B_BYTES = 17_907_614_208  # 8,953,803,264 bf16 parameters, and A_log and the gated norm in F32
VISION_9B_BYTES = 912_020_960  # 456,010,480 bf16 parameters


def made_gpu(usable_bytes: int = 24 * GIB, **changes: Any) -> Device:
    facts: dict[str, Any] = {
        "name": "made-gpu",
        "title": "A GPU",
        "vendor": "nvidia",
        "architecture": "ada",
        "kind": "discrete",
        "memory_bytes": usable_bytes,
        "usable_bytes": usable_bytes,
        "memory_bandwidth_bytes_per_s": 10**12,
        "flops_per_s": {"bf16": 10**14},
        "source": "invented",
        "checked": "2026-11-22",
        "compute_capability": "8.9",
    }
    return Device(**{**facts, **changes})


def estimate(name: str = "qwen3.5-9b", weights: str = "bf16", devices: tuple[Device, ...] = (), **told: Any):
    options, devices = Options(**told.pop("options", {})), devices or (made_gpu(),)
    fields: dict[str, Any] = {"kv_dtype": "bf16", "state_dtype": "float32", "mtp": 0, "vision": False, **told}
    setup = Setup(
        model=model(name),
        weights=weight_format(weights),
        devices=devices,
        version="5.23.0",
        tp=1,
        pp=len(devices),
        options=options,
        **fields,
    )
    return transformers.estimate(setup)


@pytest.mark.parametrize(("name", "state_bytes"), [("qwen3.5-9b", 51_904_512), ("qwen3.5-27b", 154_927_104)])
def test_state_keeps_four_columns(name: str, state_bytes: int) -> None:
    """9B: 24 x (4 x 8192 x 2 + 2,097,152) = 49.5 MiB per sequence (transformers 5.23 `LinearAttentionLayer`)."""
    assert estimate(name).allocate(100, 3).devices[0].memory.recurrent_state.mid == 3 * state_bytes


def test_cache_has_exactly_the_tokens_seen() -> None:
    """`DynamicLayer` joins by torch.cat: no pages, no steps."""
    memory = estimate().allocate(1001, 2).devices[0].memory
    assert memory.kv_cache.exact and memory.kv_cache.mid == 2 * 1001 * 32768


def test_weights_leave_out_multi_token_prediction() -> None:
    """Published total 19,306,216,416 B less 243,290,624 bf16 parameters of the prediction layer."""
    assert estimate().allocate(1, 1).devices[0].memory.weights.mid == 19_306_216_416 - 2 * 243_290_624
    assert TEXT_9B_BYTES + VISION_9B_BYTES == 19_306_216_416 - 2 * 243_290_624


@pytest.mark.parametrize("weights", ["int4", "int8", "int4-head8-embed8"])
def test_compressed_tensors_unpack(weights: str) -> None:
    allocation = estimate(weights=weights).allocate(1, 1)
    assert allocation.devices[0].memory.weights.mid == TEXT_9B_BYTES + VISION_9B_BYTES
    assert allocation.detail["weights_in_memory"] == "bf16"
    assert any("unpacks these weights" in warning for warning in allocation.warnings)


def test_gptq_stays_packed() -> None:
    allocation = estimate(weights="int4-gptq").allocate(1, 1)
    assert allocation.detail["weights_in_memory"] == "int4-gptq"
    assert allocation.devices[0].memory.weights.mid < 9e9


def test_a_gguf_is_text_and_unpacks() -> None:
    allocation = estimate(weights="q4_k_m").allocate(1, 1)
    assert allocation.devices[0].memory.weights.mid == TEXT_9B_BYTES
    with pytest.raises(Unsupported, match="no vision tower"):
        estimate(weights="q4_k_m", vision=True)


def test_fp8_stays_where_there_are_kernels() -> None:
    """`quantizer_finegrained_fp8.py`: compute capability 8.9."""
    ada, ampere = made_gpu(), made_gpu(compute_capability="8.6")
    assert transformers.weight_formats(model("qwen3.5-27b"), ada)[1] == "fp8"
    assert "fp8" not in transformers.weight_formats(model("qwen3.5-27b"), ampere)
    packed, unpacked = (estimate("qwen3.5-27b", "fp8", (gpu,)).allocate(1, 1) for gpu in (ada, ampere))
    assert packed.devices[0].memory.weights.mid < 0.6 * unpacked.devices[0].memory.weights.mid
    assert any("8.9" in warning for warning in unpacked.warnings)


def test_the_prompt_goes_through_in_one_piece() -> None:
    """9B, torch's delta rule: 4 x 4096 + 2 x 8192 + 6166 x 32 B per token, traced through transformers' own modules."""
    made = estimate()
    assert made.prefill_bytes_per_token[1] == 4 * 4096 + 2 * 8192 + 6166 * 32 == 230_080
    grown = made.allocate(20_000, 1).devices[0].memory.activation
    small = made.allocate(10_000, 1).devices[0].memory.activation
    assert grown.mid - small.mid == 10_000 * 230_080
    assert grown.low < grown.mid < grown.high
    assert "whole prompt in one pass" in made.allocate(100_000, 1).reasons[0]


@pytest.mark.parametrize("changes", [{"compute_capability": "7.5"}, {"vendor": "apple", "compute_capability": None}])
def test_scores_are_written_out_where_attention_is_not_fused(changes: dict[str, Any]) -> None:
    """16 heads, scores and softmax in 2 bytes: quadratic in the prompt."""
    fused, unfused = estimate(), estimate(devices=(made_gpu(**changes),))
    for ctx_tokens in (1000, 4000):
        more = unfused.allocate(ctx_tokens, 1).devices[0].memory.activation.mid
        assert more - fused.allocate(ctx_tokens, 1).devices[0].memory.activation.mid == 64 * ctx_tokens**2


def test_chunks_need_a_file_and_less_memory() -> None:
    whole, cut = estimate(), estimate(options={"max_num_batched_tokens": 2048})
    assert cut.shortfall_bytes(32768, 1) < whole.shortfall_bytes(32768, 1)
    assert any("generation_config.json" in warning for warning in cut.allocate(32768, 1).warnings)
    assert cut.allocate(32768, 1).detail["prefill_tokens_at_once"] == 2048


def test_an_image_needs_scratch_and_the_prompt_may_need_more() -> None:
    text, image = estimate(), estimate(vision=True)
    assert (
        image.allocate(64, 1).devices[0].memory.activation.mid
        > 2e9
        > text.allocate(64, 1).devices[0].memory.activation.mid
    )
    small = estimate(vision=True, options={"image_tokens": 1024})
    assert small.allocate(64, 1).devices[0].memory.activation.mid < 0.3e9
    assert (
        image.allocate(32768, 1).devices[0].memory.activation.mid
        == text.allocate(32768, 1).devices[0].memory.activation.mid
    )


def test_layers_are_cut_in_order() -> None:
    gpus = (made_gpu(name="a"), made_gpu(name="b"), made_gpu(8 * GIB, name="c"))
    split = estimate("qwen3.5-27b", "fp8", gpus).allocate(4096, 1)
    alone = estimate("qwen3.5-27b", "fp8", (made_gpu(80 * GIB),)).allocate(4096, 1)
    assert sum(split.detail["layers_per_device"]) == 64  # type: ignore[call-overload]
    for part in ("weights", "kv_cache", "recurrent_state"):
        total = sum(share.memory.parts[part].mid for share in split.devices)
        assert total == alone.devices[0].memory.parts[part].mid
    assert max(share.memory.weights.mid for share in split.devices) < 0.4 * alone.devices[0].memory.weights.mid
    assert not split.devices[0].memory.weights.exact and alone.devices[0].memory.weights.exact
    assert [reason.split()[0] for reason in split.reasons] == ["c"]
    tiny_first = estimate("qwen3.5-27b", "fp8", (gpus[2], gpus[0], gpus[1])).allocate(4096, 1)
    assert tiny_first.detail["layers_per_device"][0] < split.detail["layers_per_device"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("told", "word"),
    [
        ({"kv_dtype": "int8"}, "QuantizedCache refuses"),
        ({"state_dtype": "bfloat16"}, "--state-dtype"),
        ({"mtp": 1}, "--mtp"),
        ({"options": {"offload_experts": True}}, "offload"),
    ],
)
def test_what_transformers_does_not_have(told: dict[str, Any], word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        estimate(**told)


@pytest.mark.parametrize(
    ("weights", "word"), [("nvfp4", "NVFP4"), ("gptq-int4-official", "dynamic"), ("mlx-4bit", "MLX")]
)
def test_what_it_does_not_load(weights: str, word: str) -> None:
    reason = transformers.loads(model("qwen3.5-27b"), weight_format(weights), made_gpu(), "5.23.0")
    assert word in (reason or "")


def test_launch_lines() -> None:
    assert estimate().command(8192, 1) == "transformers serve Qwen/Qwen3.5-9B --device cuda --dtype bfloat16"
    assert "--device auto " in estimate(devices=(made_gpu(), made_gpu())).command(8192, 1)
    turing = estimate(devices=(made_gpu(compute_capability="7.5"),))
    assert turing.command(8192, 1).endswith("--dtype float16")
    gguf = estimate(weights="q4_k_m").command(8192, 1)
    assert "unsloth/Qwen3.5-9B-GGUF:Qwen3.5-9B-Q4_K_M.gguf" in gguf


def test_words_about_the_server() -> None:
    warnings = " ".join(estimate().allocate(300_000, 2).warnings)
    for word in ("no context limit", "one request at a time", "vision tower", "config.json"):
        assert word in warnings


@given(
    ctx=st.integers(1, 1_010_000),
    more_ctx=st.integers(0, 300_000),
    seqs=st.integers(1, 64),
    more_seqs=st.integers(0, 64),
    chunk=st.sampled_from([None, 512, 8192]),
    devices=st.lists(st.integers(GIB, 200 * GIB), min_size=1, max_size=3),
    vision=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_more_never_takes_less(
    ctx: int, more_ctx: int, seqs: int, more_seqs: int, chunk: int | None, devices: list[int], vision: bool
) -> None:
    gpus = tuple(made_gpu(usable) for usable in devices)
    made = estimate("qwen3.5-2b", devices=gpus, vision=vision, options={"max_num_batched_tokens": chunk})
    less, more = made.allocate(ctx, seqs), made.allocate(ctx + more_ctx, seqs + more_seqs)
    for share, larger in zip(less.devices, more.devices, strict=True):
        memory = share.memory
        assert memory.total.mid == sum(amount.mid for amount in memory.parts.values())
        assert all(amount.low <= amount.mid <= amount.high for amount in memory.parts.values())
        assert memory.total.mid <= larger.memory.total.mid and memory.total.high <= larger.memory.total.high
    short = made.shortfall_bytes(ctx, seqs)
    assert short == max(-share.free_bytes for share in less.devices)
    assert short <= made.shortfall_bytes(ctx + more_ctx, seqs + more_seqs)
    assert less.fits == (short <= 0)
