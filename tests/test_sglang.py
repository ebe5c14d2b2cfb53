"""SGLang's plan: where it runs, its own defaults, how the static fraction is chosen and filled, and its line."""

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.engines import sglang
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.engines.sglang_budget import SglangEstimate
from qwenfit.planner.request import Options
from qwenfit.planner.weights import weight_table
from qwenfit.profiles import BadInput, QwenfitError, Unsupported, device, devices, devices_of, model, weight_format

GIB = 1 << 30
RUNNABLE = [one for one in devices() if sglang.runs_on(one, "0.5.23") is None]


def setup(name: str = "qwen3.5-9b", weights: str = "int4", where: str = "rtx3090", **told: Any) -> Setup:
    box = devices_of(where)
    pp = told.pop("pp", 1)
    settings_ = {
        "version": "0.5.23",
        "kv_dtype": "bf16",
        "state_dtype": "float32",
        "tp": len(box) // pp,
        "pp": pp,
        "mtp": 0,
        "vision": False,
        "options": Options(),
    }
    return Setup(model(name), weight_format(weights), box, **{**settings_, **told})


def gpus(*names: str, **told: Any) -> SglangEstimate:
    estimate = sglang.estimate(setup(*names, **told))
    assert isinstance(estimate, SglangEstimate)
    return estimate


def flag(line: str, name: str) -> str:
    parts = shlex.split(line)
    return parts[parts.index(name) + 1]


def test_runs_and_loads_by_compute_capability() -> None:
    """sm75 and above; quantized loaders from 8.0 on (get_min_capability); embeddings get no quantization config."""
    nine = model("qwen3.5-9b")
    for name, runs in (("rtx3060", True), ("t4", True), ("v100-32gb", False), ("mi300x", True), ("rx7900xtx", False)):
        assert (sglang.runs_on(device(name), "0.5.23") is None) is runs, name
    assert sglang.runs_on(device("m1-16gb"), "0.5.23")
    assert sglang.loads(nine, weight_format("int4"), device("rtx3060"), "0.5.23") is None
    assert "8.0" in str(sglang.loads(nine, weight_format("int4"), device("t4"), "0.5.23"))
    for name, says in (("q4_k_m", "llama.cpp"), ("mlx-4bit", "MLX"), ("int4-head8-embed8", "embeddings in 16 bit")):
        assert says in str(sglang.loads(nine, weight_format(name), device("rtx3060"), "0.5.23"))
    assert "NVIDIA only" in str(sglang.loads(nine, weight_format("nvfp4"), device("mi300x"), "0.5.23"))


@pytest.mark.parametrize(
    ("name", "weights", "where", "says"),
    [
        *(("qwen3.5-27b", weights, "mi300x", "CUDA only") for weights in ("int4", "int8", "int4-gptq", "int8-w8a8")),
        ("qwen3.5-35b-a3b", "gptq-int4-official", "mi355x", "CUDA only"),
        ("qwen3.5-27b", "int4-g256", "h100-sxm", "groups of 256"),
        ("qwen3.5-35b-a3b", "int8-w8a8", "h100-sxm", "on NPUs only"),
        ("qwen3.5-27b", "fp8", "mi300x", None),
        ("qwen3.5-27b", "int4-awq", "mi300x", None),
        ("qwen3.5-27b", "int8-w8a8", "h100-sxm", None),
        ("qwen3.5-27b", "int4-channel", "h100-sxm", None),
        ("qwen3.5-35b-a3b", "int8", "h100-sxm", None),
    ],
)
def test_integers_need_a_kernel(name: str, weights: str, where: str, says: str | None) -> None:
    """Read in 0.5.23: Marlin and int8_scaled_mm are imported on CUDA alone; get_moe_scheme raises for W8A8."""
    found = sglang.loads(model(name), weight_format(weights), device(where), "0.5.23")
    assert (found is None) if says is None else (says in str(found))


def test_a_packed_head_cannot_be_shared_with_the_draft() -> None:
    """`get_embed_and_head` of its models/qwen3_5.py reads lm_head.weight; a packed head has weight_packed."""
    with pytest.raises(Unsupported, match="int4-head8 packs"):
        sglang.estimate(setup(weights="int4-head8", mtp=1))
    assert gpus(weights="int4-head8") and gpus(weights="int4", mtp=1)


def test_gptq_experts_of_a_draft_are_quantized_or_missing() -> None:
    """Run in 0.5.23 (tests/quant/test_sglang_loading.py): experts of the draft stay unfilled where GPTQ files keep
    them, as Qwen's own do."""
    told = {"weights": "gptq-int4-official", "where": "h100-sxm"}
    with pytest.raises(Unsupported, match="draft's experts"):
        sglang.estimate(setup("qwen3.5-35b-a3b", mtp=1, **told))
    assert sglang.estimate(setup("qwen3.5-35b-a3b", **told))
    assert sglang.estimate(setup("qwen3.5-27b", mtp=1, **told))


def test_cache_types_by_device() -> None:
    assert sglang.kv_dtypes(device("rtx3060"), "0.5.23") == ("bf16", "fp8_e4m3", "fp8_e5m2")
    assert sglang.kv_dtypes(device("t4"), "0.5.23") == ("bf16",)
    for kv_dtype, name in (("fp8_e4m3", "t4"), ("q8_0", "rtx3060")):
        with pytest.raises(Unsupported):
            sglang.estimate(setup(where=name, kv_dtype=kv_dtype))


@pytest.mark.parametrize(
    ("name", "text", "image"), [("rtx3090", 0.704, 0.6511), ("rtx5090", 0.779, 0.7204), ("h100-sxm", 0.83, 0.7676)]
)
def test_own_fraction(name: str, text: float, image: float) -> None:
    """`handle_gpu_memory_settings` of 0.5.23 by hand. 24 GB: 24576 less 512 + 1.5 x 4096 + 128 + 2 x 48 + 8 x 50, which
    is 0.704 of it; a vision tower 1,152 wide times 0.95 x (1 - 0.1 x 0.265625). 80 GB keeps back 13,904 MiB."""
    nine, one = model("qwen3.5-9b"), device(name)
    assert sglang.own_fraction(one, nine, 1, 1, True) == pytest.approx(
        sglang.own_fraction(one, nine, 1, 1, False) * 0.95 * (1 - 0.1 * 0.265625)
    )
    assert sglang.own_fraction(one, nine, 1, 1, False) == pytest.approx(text, abs=0.002)
    assert sglang.own_fraction(one, nine, 1, 1, True) == pytest.approx(image, abs=0.002)


def test_the_parts_fill_the_static_fraction() -> None:
    estimate = gpus(where="rtx3090")
    answer = estimate.allocate(65536, 2)
    memory, detail, station = answer.devices[0].memory, answer.detail, estimate.stations[0]
    assert answer.fits
    fraction = detail["mem_fraction_static"]
    assert isinstance(fraction, float)
    static = station.free_bytes * round(fraction * 1000) // 1000
    assert memory.weights.mid + memory.kv_cache.mid + memory.recurrent_state.mid == static
    assert memory.weights.mid == weight_table(model("qwen3.5-9b"), weight_format("int4"), 1).text
    assert detail["max_mamba_cache_size"] == 2 * 5
    assert memory.recurrent_state.mid == (2 * 5 + 1) * 24 * 2_146_304
    assert detail["max_total_num_tokens"] == memory.kv_cache.mid // 32768


def test_own_fraction_comes_first_and_rises_where_needed() -> None:
    estimate = gpus(where="rtx3090")
    own = int(sglang.own_fraction(device("rtx3090"), model("qwen3.5-9b"), 1, 1, False) * 1000) / 1000
    fractions = []
    for ctx_tokens in range(4096, 600_000, 8192):
        answer = estimate.allocate(ctx_tokens, 1)
        if not answer.fits:
            break
        fractions.append(answer.detail["mem_fraction_static"])
    assert fractions == sorted(fractions) and fractions[0] == own and fractions[-1] > own + 0.1


def test_a_fixed_fraction_stands() -> None:
    assert gpus(options=Options(gpu_memory_utilization=0.6)).allocate(4096, 1).detail["mem_fraction_static"] == 0.6
    too_high = gpus(options=Options(gpu_memory_utilization=0.99))
    assert "static fraction of 0.99" in too_high.allocate(4096, 1).reasons[0]
    with pytest.raises(BadInput):
        gpus(options=Options(gpu_memory_utilization=1.0))


def test_drafts_take_state_and_a_layer_of_cache() -> None:
    plain, drafting = gpus(), gpus(mtp=3)
    assert drafting.sizes.cell_bytes == plain.sizes.cell_bytes * 9 // 8
    state = drafting.allocate(65536, 1).devices[0].memory.recurrent_state.mid
    assert state == (6 + 2 * 4) * plain.sizes.state_bytes


def test_the_line_says_all_that_was_assumed() -> None:
    line = gpus("qwen3.5-9b", "int4", "rtx3060", kv_dtype="fp8_e4m3", state_dtype="bfloat16").command(32768, 3)
    assert line.startswith("python -m sglang.launch_server --model-path ./Qwen3.5-9B-int4 ")
    for name, value in (
        ("--context-length", "32768"),
        ("--max-running-requests", "3"),
        ("--max-mamba-cache-size", "15"),
        ("--mamba-ssm-dtype", "bfloat16"),
        ("--kv-cache-dtype", "fp8_e4m3"),
        ("--mamba-radix-cache-strategy", "extra_buffer"),
        ("--chunked-prefill-size", "2048"),
    ):
        assert flag(line, name) == value
    assert 0.3 < float(flag(line, "--mem-fraction-static")) < 1
    assert "--language-model-only" in line


def test_the_line_of_everything_at_once() -> None:
    options = Options(prefix_caching=False, cuda_graphs=False)
    line = gpus("qwen3.5-27b", "fp8", "2xh100-sxm", mtp=2, vision=True, options=options).command(1_010_000, 1)
    assert line.startswith("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 python -m sglang.launch_server")
    assert flag(line, "--model-path") == "Qwen/Qwen3.5-27B-FP8" and flag(line, "--tp-size") == "2"
    assert (flag(line, "--speculative-num-steps"), flag(line, "--speculative-num-draft-tokens")) == ("2", "3")
    rope = json.loads(flag(line, "--json-model-override-args"))["text_config"]["rope_parameters"]
    assert rope["rope_type"] == "yarn"
    assert "--disable-radix-cache" in line and "--disable-decode-cuda-graph" in line
    assert "--language-model-only" not in line


@settings(max_examples=120, deadline=None)
@given(
    one=st.sampled_from(RUNNABLE),
    name=st.sampled_from(["qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b"]),
    weights=st.sampled_from(["bf16", "int8", "int4"]),
    ranks=st.sampled_from([1, 1, 2, 4]),
    mtp=st.sampled_from([0, 0, 2]),
    vision=st.booleans(),
    options=st.sampled_from([Options(), Options(cuda_graphs=False), Options(gpu_memory_utilization=0.7)]),
    ctx_tokens=st.integers(1, 1_010_000),
    more_tokens=st.integers(0, 50_000),
    seqs=st.integers(1, 300),
    more_seqs=st.integers(0, 100),
)
def test_more_never_takes_less(
    one: Any,
    name: str,
    weights: str,
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
        setup(name, weights, one.name), devices=(one,) * ranks, tp=ranks, mtp=mtp, vision=vision, options=options
    )
    try:
        estimate = sglang.estimate(base)
    except QwenfitError:
        return
    missing, answer = estimate.shortfall_bytes(ctx_tokens, seqs), estimate.allocate(ctx_tokens, seqs)
    held = [share.memory.total.mid for share in answer.devices]
    assert answer.fits is (missing <= 0)
    over = max(total - share.usable_bytes for total, share in zip(held, answer.devices, strict=True))
    assert over == missing if missing > 0 else over <= 0
    for share in answer.devices:
        assert all(0 <= part.low <= part.mid <= part.high for part in share.memory.parts.values())
    for more in ((ctx_tokens + more_tokens, seqs), (ctx_tokens, seqs + more_seqs)):
        assert missing <= estimate.shortfall_bytes(*more)
        then = [share.memory.total.mid for share in estimate.allocate(*more).devices]
        assert all(map(int.__le__, held, then))
    heavier = sglang.estimate(replace(base, weights=weight_format("bf16"))).allocate(ctx_tokens, seqs)
    assert all(map(int.__le__, held, [share.memory.total.mid for share in heavier.devices]))
