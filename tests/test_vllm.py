"""vLLM's plan: where it runs, how its budget is chosen and filled, what real servers had left for a cache, its line.

`test_vllm_pool.py` holds the exact part; here stand the rules around it and the estimates.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.engines import vllm, vllm_scratch
from qwenfit.planner.engines.engine import Allocation, Setup
from qwenfit.planner.engines.vllm_budget import VllmEstimate
from qwenfit.planner.engines.vllm_cpu import VllmCpuEstimate
from qwenfit.planner.request import Options
from qwenfit.planner.weights import weight_table
from qwenfit.profiles import BadInput, QwenfitError, Unsupported, device, devices, devices_of, model, weight_format

GIB = 1 << 30
LOGS = json.loads((Path(__file__).parent / "data" / "vllm_boot_logs.json").read_text(encoding="utf-8"))
RUNNABLE = [one for one in devices() if vllm.runs_on(one, "0.32.0") is None]
GPUS = [one for one in RUNNABLE if one.kind != "cpu"]


def setup(name: str = "qwen3.5-9b", weights: str = "int4", where: str = "rtx3090", **told: Any) -> Setup:
    box = devices_of(where)
    pp = told.pop("pp", 1)
    settings_ = {
        "version": "0.32.0",
        "kv_dtype": "bf16",
        "state_dtype": "float32",
        "tp": len(box) // pp,
        "pp": pp,
        "mtp": 0,
        "vision": False,
        "options": Options(),
    }
    return Setup(model(name), weight_format(weights), box, **{**settings_, **told})


def gpus(*names: str, **told: Any) -> VllmEstimate:
    estimate = vllm.estimate(setup(*names, **told))
    assert isinstance(estimate, VllmEstimate)
    return estimate


def words(line: str) -> list[str]:
    import shlex

    return shlex.split(line)


def flag(line: str, name: str) -> str:
    parts = words(line)
    return parts[parts.index(name) + 1]


# Where it runs, what it loads


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("rtx3060", True),
        ("t4", True),
        ("v100-32gb", False),
        ("gtx1080ti", False),
        ("mi300x", True),
        ("strix-halo-128gb", True),
        ("m1-16gb", False),
    ],
)
def test_runs_by_architecture(name: str, runs: bool) -> None:
    reason = vllm.runs_on(device(name), "0.32.0")
    assert (reason is None) is runs
    if reason:
        assert device(name).title in reason or "Metal" in reason


def test_loads_by_compute_capability_and_format() -> None:
    """get_min_capability of the loaders: Marlin kernels reach down to 7.5; embeddings get no quantization config."""
    nine, card = model("qwen3.5-9b"), device("rtx3060")
    for name in ("bf16", "int4", "int4-g32-head8", "int8", "fp8", "nvfp4"):
        assert vllm.loads(nine, weight_format(name), card, "0.32.0") is None
    assert "llama.cpp" in str(vllm.loads(nine, weight_format("q4_k_m"), card, "0.32.0"))
    assert "MLX" in str(vllm.loads(nine, weight_format("mlx-4bit"), card, "0.32.0"))
    assert "embeddings in 16 bit" in str(vllm.loads(nine, weight_format("int4-head8-embed8"), card, "0.32.0"))
    assert "lm_head" in str(vllm.loads(model("qwen3-next-80b"), weight_format("int4-head8"), card, "0.32.0"))
    assert "compute capability 10.0" in str(vllm.loads(nine, weight_format("nvfp4"), card, "0.22.1"))
    assert "NVIDIA only" in str(vllm.loads(nine, weight_format("nvfp4"), device("mi300x"), "0.32.0"))


def test_the_cpu_build_has_kernels_for_four_bits() -> None:
    """Run in vllm-cpu 0.32: a head of 8 bits in compressed-tensors or GPTQ is a ValueError while the model loads."""
    nine, host = model("qwen3.5-9b"), device("epyc-genoa-12ch-384gb")
    for name in ("int8", "int8-gptq", "int4-head8"):
        assert "weights of 4 bits" in str(vllm.loads(nine, weight_format(name), host, "0.32.0"))
    for name in ("int4", "int4-awq", "int4-head4", "int8-w8a8", "bf16"):
        assert vllm.loads(nine, weight_format(name), host, "0.32.0") is None


def test_experts_of_integers_need_amx_on_a_cpu() -> None:
    """Run in vllm-cpu 0.32 on Zen 4: "No WNA16 MoE backend supports the deployment configuration" (compressed-tensors,
    GPTQ and AWQ). CPUExpertsInt4 asks for AMX, CPUExpertsInt8 too, and has a twin for ARM."""
    moe = model("qwen3.5-35b-a3b")
    zen, xeon, arm = map(device, ("epyc-genoa-12ch-384gb", "xeon-sapphire-rapids-8ch-256gb", "graviton4-12ch-384gb"))
    for name in ("int4", "int4-awq", "gptq-int4-official"):
        found = [vllm.loads(moe, weight_format(name), host, "0.32.0") for host in (zen, xeon, arm)]
        assert found[1] is None and "AMX" in str(found[0]) and "AMX" in str(found[2])
    assert "AMX" in str(vllm.loads(moe, weight_format("int8-w8a8"), zen, "0.32.0"))
    assert vllm.loads(moe, weight_format("int8-w8a8"), arm, "0.32.0") is None
    assert vllm.loads(moe, weight_format("bf16"), zen, "0.32.0") is None


def test_formats_worth_trying_are_published_or_ours() -> None:
    assert vllm.weight_formats(model("qwen3.5-9b"), device("rtx3060")) == ("bf16", "int8", "int4")
    found = vllm.weight_formats(model("qwen3.5-122b-a10b"), device("h100-sxm"))
    assert found == ("bf16", "fp8", "int8", "int4", "gptq-int4-official", "nvfp4")


def test_cache_types_by_device() -> None:
    """FlashInfer from 8.0 on; per-token-head types in Triton anywhere."""
    assert vllm.kv_dtypes(device("rtx3060"), "0.32.0") == ("bf16", "fp8", "nvfp4", "int4_per_token_head")
    assert vllm.kv_dtypes(device("t4"), "0.32.0") == ("bf16", "int8_per_token_head", "int4_per_token_head")
    assert vllm.kv_dtypes(device("rtx3060"), "0.19.1") == ("bf16", "fp8")
    assert vllm.kv_dtype_obstacle("int8_per_token_head", device("rtx3060"), "0.32.0") is None
    for kv_dtype, name, says in (
        ("fp8", "t4", "8.0"),
        ("q8_0", "rtx3060", "no cache type"),
        ("fp8", "rx7900xtx", "fp8"),
    ):
        with pytest.raises(Unsupported, match=says):
            vllm.estimate(setup(where=name, kv_dtype=kv_dtype))


def test_flashinfer_takes_what_flashattention_does_not() -> None:
    for name, kv_dtype, expected in (
        ("rtx3090", "bf16", False),
        ("rtx3090", "fp8", True),
        ("h100-sxm", "fp8", False),
        ("b200", "bf16", True),
        ("rtx3090", "int8_per_token_head", False),
        ("mi300x", "fp8", False),
    ):
        assert vllm.uses_flashinfer(device(name), kv_dtype) is expected, (name, kv_dtype)


# The budget


@pytest.mark.parametrize("log", LOGS["budgets"], ids=lambda log: f"{log['model']}-{log['weights']}-{log['devices']}")
def test_cache_that_real_servers_were_left_with(log: dict[str, Any]) -> None:
    """ "Available KV cache memory" of four boots with vision and a batch of 8,192. Nothing was fitted to them but the
    constants' orders of magnitude; weights, activations and graphs together are within 6 %."""
    options = Options(gpu_memory_utilization=log["utilization"], max_num_batched_tokens=8192)
    estimate = gpus(
        log["model"],
        log["weights"],
        log["devices"],
        version=log["version"],
        kv_dtype=log["kv_dtype"],
        mtp=log["mtp"],
        vision=True,
        options=options,
    )
    memory = estimate.allocate(log["ctx_tokens"], log["seqs"]).devices[0].memory
    cache = memory.kv_cache.mid + memory.recurrent_state.mid
    assert cache / GIB == pytest.approx(log["available_gib"], rel=0.06)


def test_the_parts_fill_the_budget() -> None:
    """requested = ceil(total x utilization) holds weights, cache, activations and graphs; the driver, the FlashInfer
    workspace and what the profile run does not see lie outside."""
    estimate = gpus(where="rtx3090", kv_dtype="fp8")
    answer = estimate.allocate(65536, 2)
    memory, detail = answer.devices[0].memory, answer.detail
    station, active = estimate.stations[0], estimate.activations[0]
    assert answer.fits and detail["gpu_memory_utilization"] == 0.92
    outside = int(active.unprofiled[1]) + memory.runtime.mid
    assert memory.total.mid - outside == detail["requested_bytes"]
    assert detail["requested_bytes"] == -(-station.total_bytes * 920 // 1000)
    assert memory.runtime.mid > vllm_scratch.FLASHINFER_WORKSPACE_BYTES
    blocks = detail["num_blocks"]
    assert isinstance(blocks, int)
    assert memory.kv_cache.mid + memory.recurrent_state.mid == blocks * estimate.layout.bytes_per_block
    assert memory.recurrent_state.mid == 2 * estimate.layout.state_blocks * estimate.layout.bytes_per_block


def test_weights_are_those_that_are_loaded() -> None:
    table = weight_table(model("qwen3.5-9b"), weight_format("bf16"), 1)
    for told, extra in (({}, 0), ({"vision": True}, table.vision), ({"mtp": 1}, table.mtp)):
        memory = gpus("qwen3.5-9b", "bf16", "h100-sxm", **told).allocate(4096, 1).devices[0].memory
        assert memory.weights.mid == table.text + extra
        assert memory.weights.exact


def test_default_utilization_by_version() -> None:
    for version, expected in (("0.19.1", 0.9), ("0.20.2", 0.92), ("0.32.0", 0.92)):
        detail = gpus(where="h100-sxm", version=version).allocate(4096, 1).detail
        assert detail["gpu_memory_utilization"] == expected


def test_utilization_rises_only_where_the_request_needs_it() -> None:
    """On a 12 GB card the default would leave the driver too little at the upper end of its size: it starts lower, and
    climbs with the context until it does not fit."""
    estimate = gpus(where="rtx3060", kv_dtype="fp8")
    steps = []
    for ctx_tokens in range(4096, 262144, 4096):
        answer = estimate.allocate(ctx_tokens, 1)
        if not answer.fits:
            break
        steps.append(answer.detail["gpu_memory_utilization"])
    assert steps == sorted(steps) and steps[0] < steps[-1] - 0.05 < 0.9


def test_a_smaller_batch_makes_room_on_a_large_card() -> None:
    """The default of 8,192 tokens for 70 GiB and more gives way to 2,048 before a request is refused."""
    estimate = gpus("qwen3.5-27b", "bf16", "h100-sxm")
    easy, longest = estimate.allocate(4096, 1), 0
    for ctx_tokens in range(300_000, 600_000, 4096):
        if estimate.shortfall_bytes(ctx_tokens, 1) <= 0:
            longest = ctx_tokens
    hard = estimate.allocate(longest, 1)
    assert (easy.detail["max_num_batched_tokens"], hard.detail["max_num_batched_tokens"]) == (8192, 2048)
    assert estimate.allocate(longest + 4096, 1).reasons


def test_a_batch_holds_a_block_where_prefixes_are_cached() -> None:
    """States are cached at block ends: 122B with an fp8 cache has blocks of 4,176 tokens, and the default is 2,048."""
    estimate = gpus("qwen3.5-122b-a10b", "int4", "4xrtx3090", kv_dtype="fp8", tp=1, pp=4)
    assert estimate.layout.block_tokens == 4176
    assert estimate.batches == (6144,)
    without = gpus(
        "qwen3.5-122b-a10b", "int4", "4xrtx3090", kv_dtype="fp8", tp=1, pp=4, options=Options(prefix_caching=False)
    )
    assert without.batches == (2048,)


def test_prefill_scratch_outside_the_profile_is_charged() -> None:
    """club-3090 CLIFFS: the chunked kernels of 27B hold about 500 MiB at 4,128 tokens on one rank. Text only, what
    exceeds the profiled feed-forward peak comes on top of the budget."""
    dense = model("qwen3.5-27b")
    beside = 2 * 2 * dense.hidden_size + 2 * (10240 + 6144) + 2 * 6144  # residual, projections, core output
    alive = (vllm_scratch.delta_token_bytes(dense, 1) - beside) * 4128
    assert alive / (1 << 20) == pytest.approx(500, rel=0.1)
    text = vllm_scratch.activations(dense, 1, 8192, 0)
    image = vllm_scratch.activations(dense, 1, 8192, 16384)
    assert text.unprofiled[1] > 300 * (1 << 20)
    assert image.unprofiled[1] == 0  # the encoder's peak was profiled and is larger


def test_captured_graphs_are_counted_as_vllm_does() -> None:
    """Logged for a batch of 256: PIECEWISE=51, FULL=35."""
    assert vllm_scratch.captures(256, 0, 512) == 51 + 35
    assert vllm_scratch.captures(1, 0, 512) == 2 + 1
    estimate = gpus(options=Options(cuda_graphs=False))
    assert estimate.allocate(4096, 1).devices[0].memory.graph.mid == 0
    assert "--enforce-eager" in words(estimate.command(4096, 1))


def test_a_fixed_utilization_stands() -> None:
    answer = gpus(options=Options(gpu_memory_utilization=0.6)).allocate(4096, 1)
    assert answer.fits and answer.detail["gpu_memory_utilization"] == 0.6
    too_high = gpus(options=Options(gpu_memory_utilization=0.999))
    reason = too_high.allocate(4096, 1).reasons[0]
    assert "utilization of 0.999" in reason and too_high.shortfall_bytes(4096, 1) > 0
    for wrong in (0.0, -1.0, 1.2):
        with pytest.raises(BadInput):
            gpus(options=Options(gpu_memory_utilization=wrong))


def test_unified_memory_keeps_to_its_safe_fraction() -> None:
    """DGX Spark: 0.82 of the visible memory was validated, 0.88 and more swaps or freezes."""
    spark = device("dgx-spark")
    answer = gpus("qwen3.5-122b-a10b", "nvfp4", "dgx-spark", kv_dtype="fp8").allocate(262144, 1)
    assert spark.safe_fraction == 0.82
    assert answer.fits and answer.devices[0].memory.total.mid <= 0.82 * spark.usable_bytes


def test_unlike_devices_get_the_cache_of_the_smallest() -> None:
    estimate = gpus("qwen3.5-9b", "bf16", "rtx3090,rtx3060")
    answer = estimate.allocate(32768, 1)
    large, small = (share.memory for share in answer.devices)
    assert large.kv_cache.mid == small.kv_cache.mid
    assert any("unlike" in warning for warning in answer.warnings)
    assert answer.devices[0].free_bytes > 10 * GIB


def test_pipeline_stages_hold_their_own_layers() -> None:
    estimate = gpus("qwen3.5-9b", "bf16", "2xrtx3060", tp=1, pp=2)
    first, last = (share.memory.weights.mid for share in estimate.allocate(4096, 1).devices)
    table = weight_table(model("qwen3.5-9b"), weight_format("bf16"), 1)
    assert first == table.embedding + sum(table.layers[:16])
    assert last == table.lm_head + table.norm + sum(table.layers[16:])


def test_the_cpu_backend_names_its_space() -> None:
    estimate = vllm.estimate(setup("qwen3.5-9b", "bf16", next(one.name for one in RUNNABLE if one.kind == "cpu")))
    assert isinstance(estimate, VllmCpuEstimate)
    answer = estimate.allocate(32768, 4)
    assert answer.detail["block_tokens"] == 640 and answer.detail["cpu_kvcache_space_gib"] == 5
    assert estimate.command(32768, 4).startswith("VLLM_CPU_KVCACHE_SPACE=5 vllm serve Qwen/Qwen3.5-9B ")
    assert answer.fits is (estimate.shortfall_bytes(32768, 4) <= 0)


# The line


def test_the_line_says_all_that_was_assumed() -> None:
    line = gpus("qwen3.5-9b", "int4", "rtx3060", kv_dtype="fp8", state_dtype="bfloat16").command(65536, 3)
    assert words(line)[:3] == ["vllm", "serve", "./Qwen3.5-9B-int4"]
    for name, value in (
        ("--max-model-len", "65536"),
        ("--max-num-seqs", "3"),
        ("--kv-cache-dtype", "fp8"),
        ("--mamba-ssm-cache-dtype", "bfloat16"),
        ("--max-num-batched-tokens", "2048"),
    ):
        assert flag(line, name) == value
    assert {"--language-model-only", "--enable-prefix-caching"} <= set(words(line))
    assert 0.5 < float(flag(line, "--gpu-memory-utilization")) < 1


def test_the_line_of_everything_at_once() -> None:
    told: dict[str, Any] = {"mtp": 2, "vision": True, "options": Options(image_tokens=4096, prefix_caching=False)}
    line = gpus("qwen3.5-27b", "fp8", "2xh100-sxm", **told).command(1_010_000, 1)
    assert words(line)[:4] == ["VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", "vllm", "serve", "Qwen/Qwen3.5-27B-FP8"]
    rope = json.loads(flag(line, "--hf-overrides"))["text_config"]["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 262144)
    assert json.loads(flag(line, "--speculative-config")) == {"method": "mtp", "num_speculative_tokens": 2}
    assert json.loads(flag(line, "--mm-processor-kwargs"))["size"]["longest_edge"] == 4096 * 1024
    assert flag(line, "--tensor-parallel-size") == "2"
    assert "--no-enable-prefix-caching" in words(line) and "--language-model-only" not in words(line)


@pytest.mark.parametrize(
    ("name", "weights", "served"),
    [
        ("qwen3.5-9b", "bf16", ["Qwen/Qwen3.5-9B"]),
        ("qwen3.5-9b", "fp8", ["Qwen/Qwen3.5-9B", "--quantization", "fp8"]),  # not published: quantized while loading
        ("qwen3.5-27b", "fp8", ["Qwen/Qwen3.5-27B-FP8"]),
        ("qwen3.5-27b", "gptq-int4-official", ["Qwen/Qwen3.5-27B-GPTQ-Int4"]),
        ("qwen3.6-27b", "nvfp4", ["nvidia/Qwen3.6-27B-NVFP4"]),
        ("qwen3.5-9b", "int4-g32-head8", ["./Qwen3.5-9B-int4-g32-head8"]),
    ],
)
def test_the_line_names_the_checkpoint(name: str, weights: str, served: list[str]) -> None:
    line = gpus(name, weights, "4xh100-sxm").command(4096, 1)
    assert words(line)[2 : 2 + len(served)] == served


# What must hold for every request


def held(answer: Allocation) -> list[int]:
    return [share.memory.total.mid for share in answer.devices]


def check(estimate: Any, ctx_tokens: int, seqs: int) -> tuple[int, Allocation]:
    missing, answer = estimate.shortfall_bytes(ctx_tokens, seqs), estimate.allocate(ctx_tokens, seqs)
    assert answer.fits is (missing <= 0)
    over = max(share.memory.total.mid - share.usable_bytes for share in answer.devices)
    assert over == missing if missing > 0 else over <= 0
    for share in answer.devices:
        parts = share.memory.parts.values()
        assert sum(part.mid for part in parts) == share.memory.total.mid
        assert all(0 <= part.low <= part.mid <= part.high for part in parts)
    return missing, answer


@settings(max_examples=150, deadline=None)
@given(
    one=st.sampled_from(GPUS),
    name=st.sampled_from(["qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b"]),
    weights=st.sampled_from(["bf16", "int8", "int4", "fp8"]),
    kv_dtype=st.sampled_from(["bf16", "fp8", "int4_per_token_head"]),
    ranks=st.sampled_from([1, 1, 2, 4]),
    mtp=st.sampled_from([0, 0, 2]),
    vision=st.booleans(),
    options=st.sampled_from([Options(), Options(cuda_graphs=False), Options(gpu_memory_utilization=0.8)]),
    ctx_tokens=st.integers(1, 1_010_000),
    more_tokens=st.integers(0, 50_000),
    seqs=st.integers(1, 300),
    more_seqs=st.integers(0, 100),
)
def test_more_never_takes_less(
    one: Any,
    name: str,
    weights: str,
    kv_dtype: str,
    ranks: int,
    mtp: int,
    vision: bool,
    options: Options,
    ctx_tokens: int,
    more_tokens: int,
    seqs: int,
    more_seqs: int,
) -> None:
    base = replace(
        setup(name, weights, one.name),
        devices=(one,) * ranks,
        tp=ranks,
        kv_dtype=kv_dtype,
        mtp=mtp,
        vision=vision,
        options=options,
    )
    try:
        estimate = vllm.estimate(base)
    except QwenfitError:
        return
    missing, answer = check(estimate, ctx_tokens, seqs)
    for more in ((ctx_tokens + more_tokens, seqs), (ctx_tokens, seqs + more_seqs)):
        missing_then, answer_then = check(estimate, *more)
        assert missing <= missing_then
        assert all(map(int.__le__, held(answer), held(answer_then)))
    heavier = vllm.estimate(replace(base, weights=weight_format("bf16")))
    assert all(map(int.__le__, held(answer), held(heavier.allocate(ctx_tokens, seqs))))


@settings(max_examples=60, deadline=None)
@given(one=st.sampled_from(GPUS), ctx_tokens=st.integers(1, 600_000), seqs=st.integers(1, 64), extra=st.integers(0, 96))
def test_a_larger_device_never_stops_fitting(one: Any, ctx_tokens: int, seqs: int, extra: int) -> None:
    larger = replace(
        one,
        memory_bytes=one.memory_bytes + extra * GIB,
        usable_bytes=one.usable_bytes + extra * GIB,
        safe_fraction=None,
    )
    smaller = replace(one, safe_fraction=None)
    base = setup(where=one.name)
    before = vllm.estimate(replace(base, devices=(smaller,))).shortfall_bytes(ctx_tokens, seqs)
    after = vllm.estimate(replace(base, devices=(larger,))).shortfall_bytes(ctx_tokens, seqs)
    assert after <= before
