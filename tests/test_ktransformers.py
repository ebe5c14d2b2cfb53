"""KTransformers: experts in host memory to the byte, pools of the asked size, and the engine's own sizing of them."""

import shlex
from bisect import bisect_right
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.engines import ktransformers
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles.device import Device
from qwenfit.profiles.errors import Unsupported
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.model_catalog import model

GIB = 1 << 30
EXPERTS_35B = 40 * 256  # layers x experts, each with two matrices [512, 2048] and one [2048, 512]


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


def estimate(name: str = "qwen3.5-35b-a3b", weights: str = "bf16", gpu: Device | None = None, **told: Any):
    options, tp = Options(**told.pop("options", {})), told.pop("tp", 1)
    fields: dict[str, Any] = {"kv_dtype": "bf16", "state_dtype": "float32", "mtp": 0, "vision": False, "pp": 1, **told}
    setup = Setup(
        model=model(name),
        weights=weight_format(weights),
        devices=(gpu or made_gpu(),) * tp,
        version="0.7.2",
        tp=tp,
        options=options,
        **fields,
    )
    return ktransformers.estimate(setup)


@pytest.mark.parametrize(
    ("weights", "per_expert"),
    [
        ("bf16", 3 * 2 * 512 * 2048),
        ("fp8", 3 * (512 * 2048 + 4 * 4 * 16)),  # one float32 scale per 128 x 128
        ("int8", 3 * 512 * 2048 + 4 * (512 + 512 + 2048)),  # one float32 scale per row
        ("int4", 3 * 512 * 2048 // 2 + 4 * (512 + 512 + 2048)),
    ],
)
def test_host_memory_of_the_experts(weights: str, per_expert: int) -> None:
    """kt-kernel 0.7.2 `BufferB::required_size`, for all experts, also with some on the GPU."""
    host = estimate(weights=weights).allocate(4096, 1).host
    assert host.weights.exact and host.weights.mid == EXPERTS_35B * per_expert


def test_gptq_experts_may_be_unpacked() -> None:
    """AVX2 keeps int4 with float32 scales, AVX-VNNI unpacks to bytes with int16 sums beside the scales."""
    weights = estimate(weights="gptq-int4-official").allocate(4096, 1).host.weights
    groups = 2 * 512 * 16 + 2048 * 4
    assert weights.low == EXPERTS_35B * (3 * 512 * 2048 // 2 + 4 * groups)
    assert weights.high == EXPERTS_35B * (3 * 512 * 2048 + 6 * groups)


def test_gguf_experts_are_the_files() -> None:
    assert estimate(weights="q8_0").allocate(4096, 1).host.weights.mid == EXPERTS_35B * 3 * 512 * 2048 * 34 // 32


def test_the_tutorial_of_397b() -> None:
    """doc/en/Qwen3.5.md: 397B in bf16 with 32,000 tokens on four RTX 4090, 800 GB of host memory."""
    allocation = estimate("qwen3.5-397b-a17b", tp=4).allocate(32000, 1)
    assert allocation.fits
    assert allocation.host.weights.mid == 773_094_113_280
    assert 773e9 < allocation.host.total.mid < 800e9


def test_what_the_gpu_keeps() -> None:
    """35B-A3B less 32,212,254,720 expert parameters and the prediction layer, vision tower included."""
    text, experts, vision = 34_660_610_688, 32_212_254_720, 446_571_248
    float32_more = 2 * 30 * (32 + 128)  # A_log and the gated norm
    assert estimate().allocate(4096, 1).devices[0].memory.weights.mid == 2 * (text - experts + vision) + float32_more


@pytest.mark.parametrize(("prefix_caching", "slots"), [(True, 3), (False, 1)])
def test_pools_are_what_was_asked(prefix_caching: bool, slots: int) -> None:
    """Cell 10 layers x 2 heads x 512 x 2 B; state 64,389,120 B a slot; one token and one slot more than asked."""
    allocation = estimate(options={"prefix_caching": prefix_caching}).allocate(32768, 2)
    memory = allocation.devices[0].memory
    assert memory.kv_cache.mid == (2 * 32768 + 1) * 20480 + 2 * (32768 + 4) * 4
    assert memory.recurrent_state.mid == (2 * slots + 1) * 64_389_120
    assert allocation.detail["max_mamba_cache_size"] == 2 * slots


def test_smaller_cache_and_state() -> None:
    small = estimate(kv_dtype="fp8_e4m3", state_dtype="bfloat16")
    assert small.cell_bytes == 10240
    assert small.slot_bytes == 30 * (2 * 3 * 8192 + 2 * 524_288)
    halved = estimate(tp=2)
    assert halved.slot_bytes == 64_389_120 // 2 and halved.cell_bytes == 10240


@given(usable=st.integers(9 * GIB, 80 * GIB), seqs=st.integers(1, 16), prefix_caching=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_engine_agrees_with_its_flags(usable: int, seqs: int, prefix_caching: bool) -> None:
    """sglang-kt `profile_max_num_token` with the fraction of the launch line, at the largest context that fits: never
    fewer tokens than were asked for."""
    made = estimate(gpu=made_gpu(usable), options={"prefix_caching": prefix_caching})
    ctx = bisect_right(range(1, 4_000_000), 0, key=lambda tokens: made.shortfall_bytes(tokens, seqs))
    if not ctx:
        return
    words = shlex.split(made.command(ctx, seqs))
    flags = dict(pairwise(words))
    fraction, slots = float(flags["--mem-fraction-static"]), int(flags["--max-mamba-cache-size"])
    free_before_load = usable - made.runtime.mid
    assert free_before_load * (1 - fraction) <= made.activation.mid + made.graph.mid + 1  # of float rounding
    rest = free_before_load - made.weights_bytes - free_before_load * (1 - fraction)
    tokens = (rest - slots * made.slot_bytes) // made.cell_bytes
    assert tokens >= int(flags["--max-total-tokens"]) == ctx * seqs


def test_host_memory_is_judged_where_it_is_known() -> None:
    needed = estimate().host.total.mid
    enough, short = (estimate(options={"host_memory_bytes": needed + more}) for more in (1, -1))
    unknown = estimate()
    assert enough.allocate(4096, 1).fits and enough.shortfall_bytes(4096, 1) <= 0
    assert short.shortfall_bytes(4096, 1) == 1 and "the host needs" in short.allocate(4096, 1).reasons[0]
    assert any("not known" in warning for warning in unknown.allocate(4096, 1).warnings)
    assert not any("not known" in warning for warning in enough.allocate(4096, 1).warnings)


def test_spare_experts_are_offered() -> None:
    spare = estimate().allocate(4096, 1).detail["gpu_experts_that_would_fit"]
    assert isinstance(spare, int) and 0 < spare < 256
    assert estimate(gpu=made_gpu(200 * GIB)).allocate(4096, 1).detail["gpu_experts_that_would_fit"] == 256
    full = estimate(gpu=made_gpu(8 * GIB)).allocate(4096, 1)
    assert full.detail["gpu_experts_that_would_fit"] == 0
    assert not any("--kt-num-gpu-experts" in warning for warning in full.warnings)


def test_where_it_runs() -> None:
    assert ktransformers.runs_on(made_gpu(), "0.7.2") is None
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"vendor": "amd", "compute_capability": "gfx1100"}, "NVIDIA"),
        ({"kind": "unified"}, "one memory"),
        ({"compute_capability": "7.5"}, "8.0"),
    )
    for changes, word in refused:
        assert word in (ktransformers.runs_on(made_gpu(**changes), "0.7.2") or "")


def test_what_it_loads() -> None:
    gpu, moe = made_gpu(), model("qwen3.5-35b-a3b")
    for name in (*ktransformers.weight_formats(moe, gpu), "q4_k_m"):
        assert ktransformers.loads(moe, weight_format(name), gpu, "0.7.2") is None
    assert "no routed experts" in (ktransformers.loads(model("qwen3.5-9b"), weight_format("bf16"), gpu, "0.7.2") or "")
    assert "nvfp4" in (ktransformers.loads(moe, weight_format("nvfp4"), gpu, "0.7.2") or "")
    ampere = made_gpu(compute_capability="8.6")
    assert "FP8" in (ktransformers.loads(moe, weight_format("fp8"), ampere, "0.7.2") or "")
    assert ktransformers.kv_dtypes(gpu, "0.7.2") == ("bf16", "fp8_e4m3")
    assert ktransformers.kv_dtypes(ampere, "0.7.2") == ("bf16", "fp8_e5m2")


@pytest.mark.parametrize(
    ("told", "word"),
    [
        ({"kv_dtype": "int8"}, "fp8_e4m3"),
        ({"mtp": 1}, "--mtp"),
        ({"pp": 2}, "--pp"),
        ({"tp": 3}, "3 parts"),
        ({"options": {"offload_experts": False}}, "host memory"),
    ],
)
def test_what_it_does_not_have(told: dict[str, Any], word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        estimate(**told)


def test_launch_lines() -> None:
    words = shlex.split(estimate(weights="int8").command(32768, 2))
    flags = dict(pairwise(words))
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    assert flags["--kt-method"] == "AMXINT8"
    assert flags["--model-path"] == "./Qwen3.5-35B-A3B"
    assert flags["--kt-weight-path"] == "./Qwen3.5-35B-A3B-AMXINT8"
    assert (flags["--context-length"], flags["--max-total-tokens"]) == ("32768", "65536")
    assert flags["--cuda-graph-max-bs"] == "2"
    fp8 = shlex.split(estimate(weights="fp8", options={"cuda_graphs": False, "prefix_caching": False}).command(4096, 1))
    assert "--disable-cuda-graph" in fp8 and "--disable-radix-cache" in fp8
    assert fp8[fp8.index("--kt-weight-path") + 1] == fp8[fp8.index("--model-path") + 1] == "./Qwen3.5-35B-A3B-FP8"


def test_long_contexts_bring_their_rope_scaling() -> None:
    line = estimate().command(1_010_000, 1)
    assert line.startswith("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 python -m sglang.launch_server ")
    assert '"factor":4.0' in line and '"text_config"' in line
    assert "SGLANG_ALLOW" not in estimate().command(262_144, 1)


@given(
    ctx=st.integers(1, 1_010_000),
    more_ctx=st.integers(0, 300_000),
    seqs=st.integers(1, 64),
    more_seqs=st.integers(0, 64),
    tp=st.sampled_from([1, 2, 4]),
    host=st.one_of(st.none(), st.integers(GIB, 200 * GIB)),
)
@settings(max_examples=60, deadline=None)
def test_more_never_takes_less(ctx: int, more_ctx: int, seqs: int, more_seqs: int, tp: int, host: int | None) -> None:
    made = estimate(tp=tp, options={"host_memory_bytes": host})
    less, more = made.allocate(ctx, seqs), made.allocate(ctx + more_ctx, seqs + more_seqs)
    memory, larger = less.devices[0].memory, more.devices[0].memory
    assert memory.total.mid == sum(amount.mid for amount in memory.parts.values())
    assert all(amount.low <= amount.mid <= amount.high for amount in memory.parts.values())
    assert memory.total.mid <= larger.total.mid and memory.total.high <= larger.total.high
    short = made.shortfall_bytes(ctx, seqs)
    assert short <= made.shortfall_bytes(ctx + more_ctx, seqs + more_seqs)
    assert short >= -less.devices[0].free_bytes
    assert less.fits == (short <= 0)
