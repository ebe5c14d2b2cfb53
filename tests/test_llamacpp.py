"""llama.cpp's estimate: what lies where, what is emitted, what never shrinks. Figures are b11434's own or public."""

import shlex
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.engines import llamacpp
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.engines.llamacpp_devices import _fewest_filled, shares
from qwenfit.planner.engines.llamacpp_launch import gguf_name, mmproj_name
from qwenfit.planner.request import Options
from qwenfit.profiles import device, devices_of
from qwenfit.profiles.errors import UnknownName, Unsupported
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.frozen import replace
from qwenfit.profiles.model_catalog import model

GIB = 1 << 30
MIB = 1 << 20


def setup(asked: str, fmt: str, spec: str, kv_dtype: str = "f16", **changes: Any) -> Setup:
    devices = devices_of(spec)
    named = {"mtp": 0, "vision": False, "tp": 1, "pp": len(devices), "state_dtype": "float32", "version": "b11434"}
    named |= {key: changes.pop(key) for key in list(changes) if key in named}
    return Setup(model(asked), weight_format(fmt), devices, kv_dtype=kv_dtype, options=Options(**changes), **named)


def estimate(*args: Any, **changes: Any) -> llamacpp.LlamaCppEstimate:
    return llamacpp.estimate(setup(*args, **changes))


def words(line: str, flag: str) -> str:
    found = shlex.split(line)
    return found[found.index(flag) + 1]


def layer_by_layer(loads: list[int], rooms: list[int], head: int, tail: int) -> list[int]:
    """Where devices end, dealt out one layer after another at fractions that are halved forty times."""

    def ends(fraction: float) -> list[int]:
        found, layer = [], 0
        for index, room in enumerate(rooms):
            left = fraction * room - (head if index == 0 else 0) - (tail if index == len(rooms) - 1 else 0)
            while layer < len(loads) and loads[layer] <= left:
                left -= loads[layer]
                layer += 1
            found.append(layer)
        return found

    low, high = 0.0, (sum(loads) + head + tail) / min(rooms)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if ends(middle)[-1] == len(loads) else (middle, high)
    return ends(high)


GIGABYTES = st.integers(1, 80).map(lambda size: size * 10**9)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([310_000_007, 250_000_013, 1_900_000_011]), min_size=24, max_size=60),
    st.lists(GIGABYTES, min_size=2, max_size=16),
    st.sampled_from([0, 900_000_000]),
    st.sampled_from([100_000_000, 9_000_000_000]),
)
def test_layers_are_dealt_as_one_by_one(loads: list[int], rooms: list[int], head: int, tail: int) -> None:
    sums = list(accumulate(loads, initial=0))
    assert _fewest_filled(sums, rooms, head, tail)[:-1] == layer_by_layer(loads, rooms, head, tail)[:-1]


def test_token_embd_stays_on_the_host_and_a_tied_output_is_loaded_twice() -> None:
    """The engine's own breakdown with one device: 9B Q4_K_M 5,618,141,184 B of which 572,129,280 on the host; 0.8B
    (tied) 518,335,744 on the device and 208,588,800 on the host as well."""
    nine = estimate("qwen3.5-9b", "q4_k_m", "rtx4090")
    assert nine.layout.shares[0].weights_bytes == 5_618_141_184 - 572_129_280
    assert nine.host.embedding_bytes == 572_129_280
    small = estimate("qwen3.5-0.8b", "q4_k_m", "rtx4090")
    assert small.layout.shares[0].weights_bytes == 518_335_744
    assert small.host.embedding_bytes == 208_588_800


def test_9b_at_262144_tokens_on_12_gb() -> None:
    f16, q8 = (estimate("qwen3.5-9b", "q4_k_m", "rtx3060", kv_dtype) for kv_dtype in ("f16", "q8_0"))
    assert f16.shortfall_bytes(262144, 1) > GIB
    assert q8.shortfall_bytes(262144, 1) < 0
    memory = q8.allocate(262144, 1).devices[0].memory
    assert memory.kv_cache.mid == 4.25 * GIB and memory.kv_cache.exact
    assert memory.recurrent_state.mid == 50.25 * MIB and memory.recurrent_state.exact
    assert memory.weights.exact and not memory.activation.exact
    assert sum(amount.mid for amount in memory.parts.values()) == memory.total.mid


def test_a_quantized_cache_brings_an_f16_copy_of_one_layer_on_cuda_and_not_on_vulkan() -> None:
    for spec, room in (("rtx4090", True), ("rx7900xtx", True), ("arc-b580", False)):
        plain, quantized = (
            estimate("qwen3.5-9b", "q4_k_m", spec, kv_dtype).allocate(262144, 1).detail["compute_buffer_bytes"]
            for kv_dtype in ("f16", "q8_0")
        )
        assert (quantized[0] - plain[0] > 0.9 * GIB) is room  # pyright: ignore[reportIndexIssue]
    metal = estimate("qwen3.5-9b", "q4_k_m", "m1-16gb").allocate(262144, 1).detail["compute_buffer_bytes"]
    assert metal[0] > 1.2 * GIB  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("layers", "spec", "mtp", "device_bytes", "host_bytes"),
    [
        # -ncmoe N with one device, 35B-A3B Q4_K_M: bytes of the engine's own breakdown
        (0, "rtx4090", 0, (20_869_704_192,), 286_064_640),
        (1, "rtx4090", 0, (20_347_513_344,), 808_255_488),
        (22, "rtx4090", 0, (10_211_977_728,), 10_943_791_104),
        (40, "rtx4090", 0, (1_366_190_592,), 19_789_578_240),
    ],
)
def test_experts_move_layer_by_layer(
    layers: int, spec: str, mtp: int, device_bytes: tuple[int, ...], host_bytes: int
) -> None:
    asked = setup("qwen3.5-35b-a3b", "q4_k_m", spec)
    found = shares(asked.model, asked.weights, asked.devices, "f16", "f16", bool(mtp), False, None, layers)
    assert tuple(share.weights_bytes for share in found) == device_bytes
    host = llamacpp.estimate(asked).host
    assert host.embedding_bytes + host.moved_bytes(layers) == host_bytes


def test_the_fewest_layers_move() -> None:
    found = estimate("qwen3.5-35b-a3b", "q4_k_m", "rtx3060")
    assert found.shortfall_bytes(32768, 1) == 0
    answer = found.allocate(32768, 1)
    moved = int(words(found.command(32768, 1), "--n-cpu-moe"))
    assert answer.fits and answer.detail["n_cpu_moe"] == moved and 15 < moved < 30
    share = answer.devices[0]
    assert share.memory.total.high <= share.usable_bytes  # surely, where that can be
    one_less = found._question(32768, 1).missing_bytes(found._layout_of(moved - 1), doubted=True)[0]
    assert one_less > 0
    assert answer.host.weights.mid == found.host.embedding_bytes + found.host.moved_bytes(moved)
    never = estimate("qwen3.5-35b-a3b", "q4_k_m", "rtx3060", offload_experts=False)
    assert never.shortfall_bytes(32768, 1) > 9 * GIB
    assert "--n-cpu-moe" not in never.command(32768, 1)


def test_host_memory_is_judged_where_it_is_known() -> None:
    enough, little = (
        estimate("qwen3.5-35b-a3b", "q4_k_m", "rtx3060", host_memory_bytes=size * GIB) for size in (32, 8)
    )
    assert enough.shortfall_bytes(32768, 1) <= 0
    assert little.shortfall_bytes(32768, 1) > 0
    assert "host memory" in little.allocate(32768, 1).reasons[0]


def test_layers_are_dealt_out_as_the_line_says() -> None:
    """The engine gives a device as many layers as `-ts` says, the output counting as one and the draft's block too;
    27B Q4_K_M with MTP at 46,20: 10,524,695,168 and 5,559,862,656 B (its own breakdown on two devices)."""
    found = estimate("qwen3.5-27b", "q8_0", "rtx3090,rtx3060", mtp=3)
    first, second = found.layout.shares
    assert first.layers + second.layers == 64
    assert first.layers > 2 * second.layers
    assert words(found.command(65536, 1), "-ts") == f"{first.layers},{second.layers + 2}"
    fullness = [share.memory.weights.mid / share.usable_bytes for share in found.allocate(65536, 1).devices]
    assert fullness[0] == pytest.approx(fullness[1], abs=0.05)


def test_a_pipeline_takes_its_copies_only_where_there_is_room() -> None:
    roomy = estimate("qwen3.5-9b", "q4_k_m", "rtx3090,rtx3090").allocate(262144, 1).devices[0]
    assert roomy.memory.activation.mid - roomy.memory.activation.low > 3 * 2 * 512 * 262144
    full = estimate("qwen3.6-27b", "q4_k_m", "rtx3060,rtx3060")
    ctx_tokens = next(tokens for tokens in range(262144, 0, -256) if full.shortfall_bytes(tokens, 1) <= 0)
    for share in full.allocate(ctx_tokens, 1).devices:
        assert share.memory.total.mid <= share.usable_bytes


def test_a_cpu_box_holds_everything_and_a_rearranged_copy() -> None:
    """9B Q4_0: CPU_REPACK 3,891,658,752 B beside a mapped file of 5,302,388,736 (the engine's own breakdown)."""
    found = estimate("qwen3.5-9b", "q4_0", "desktop-ddr5-2ch-64gb").allocate(4096, 1)
    weights = found.devices[0].memory.weights
    assert (weights.low, weights.mid) == (5_302_388_736, 5_302_388_736 + 3_891_658_752)
    assert found.host.total.mid == 0
    assert estimate("qwen3.5-9b", "q8_0", "desktop-ddr5-2ch-64gb").allocate(4096, 1).devices[0].memory.weights.exact
    small = estimate("qwen3.5-9b", "q4_0", "laptop-ddr4-2ch-8gb")
    assert small.shortfall_bytes(4096, 1) <= 0  # pages of the file are dropped before anything fails
    assert small.allocate(4096, 1).devices[0].memory.weights.mid < 6_000_000_000


def test_the_line_carries_what_was_assumed() -> None:
    line = estimate("qwen3.5-9b", "q8_0", "a100-80gb", "q8_0/q5_0", vision=True).command(1_010_000, 2)
    assert words(line, "-c") == str(2 * 1_010_176)
    assert (words(line, "-np"), words(line, "-ngl"), words(line, "-fa"), words(line, "--fit")) == (
        "2",
        "99",
        "on",
        "off",
    )
    assert (words(line, "-ctk"), words(line, "-ctv")) == ("q8_0", "q5_0")
    assert (words(line, "--rope-scaling"), words(line, "--rope-scale")) == ("yarn", "4")
    assert words(line, "--yarn-orig-ctx") == "262144"
    assert words(line, "--mmproj") == "mmproj-Qwen3.5-9B-F16.gguf"
    assert words(line, "-m") == "Qwen3.5-9B-Q8_0.gguf"
    assert "--rope-scaling" not in estimate("qwen3.5-9b", "q8_0", "a100-80gb").command(262144, 1)
    draft = estimate("qwen3.5-9b", "q8_0", "a100-80gb", "q8_0", mtp=2).command(4096, 1)
    assert (words(draft, "--spec-type"), words(draft, "--spec-draft-n-max")) == ("draft-mtp", "2")
    assert words(draft, "-ctkd") == "q8_0"


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="float32"):
        estimate("qwen3.5-9b", "q8_0", "rtx4090", state_dtype="bfloat16")
    with pytest.raises(Unsupported, match="layers"):
        estimate("qwen3.5-9b", "q8_0", "rtx4090", tp=2)
    with pytest.raises(Unsupported, match="CPU box"):
        estimate("qwen3.5-9b", "q8_0", "rtx4090,desktop-ddr5-2ch-64gb")
    with pytest.raises(UnknownName, match="fp8"):
        estimate("qwen3.5-9b", "q8_0", "rtx4090", "fp8")
    assert llamacpp.loads(model("9b"), weight_format("fp8"), device("rtx4090"), "b11434")
    assert llamacpp.loads(model("9b"), weight_format("q4_k_m"), device("rtx4090"), "b11434") is None
    assert llamacpp.loads(model("9b"), weight_format("bf16"), device("rtx4090"), "b11434") is None
    mine, checkpoint = replace(model("9b"), path="D/MINE.GGUF", repo="D/MINE.GGUF"), weight_format("checkpoint")
    assert llamacpp.loads(mine, checkpoint, device("rtx4090"), "b11434")
    mine = replace(mine, quantization={"method": "gguf"})
    assert llamacpp.loads(mine, checkpoint, device("rtx4090"), "b11434") is None
    assert gguf_name(mine, checkpoint) == "D/MINE.GGUF" and mmproj_name(mine) == "mmproj-MINE-F16.gguf"


@pytest.mark.parametrize(
    ("name", "asked", "fmt", "spec", "ctx_tokens", "kv_dtype", "changes", "other_bytes", "measured_gib"),
    [
        # public totals per card; `other_bytes` is what the uploader's file weighs more than llama-quantize's mixture
        ("rs-4b-1seq", "qwen3.5-4b", "q4_k_m", "rtx3060", 4096, "f16", {}, 0, 3.235),
        ("club3090-L144", "qwen3.6-27b", "q4_k_m-mtp", "rtx3090", 131072, "q8_0", {"mtp": 3}, 800_000_000, 23.1),
        ("club3090-L131", "qwen3.6-27b", "q4_k_m-mtp", "rtx3090", 200000, "q4_0", {"mtp": 3}, 0, 22.4),
        ("hanxiao-l4-ncmoe0", "qwen3.6-35b-a3b", "q4_k_m-mtp", "l4", 8192, "f16", {"mtp": 3, "ubatch_tokens": 64},
         1_203_000_000, 21.4),
    ],
)  # fmt: skip
def test_public_totals(
    name: str, asked: str, fmt: str, spec: str, ctx_tokens: int, kv_dtype: str, changes: Any, other_bytes: int,
    measured_gib: float,
) -> None:  # fmt: skip
    total = estimate(asked, fmt, spec, kv_dtype, **changes).allocate(ctx_tokens, 1).devices[0].memory.total.mid
    assert (total + other_bytes) / GIB == pytest.approx(measured_gib, rel=0.05), name


SPECS = ("rtx3060", "m1-16gb", "desktop-ddr5-2ch-64gb", "rtx3090,rtx3060", "strix-halo-128gb", "arc-b580")


@settings(max_examples=150, deadline=None)
@given(
    asked=st.sampled_from(("qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-35b-a3b")),
    spec=st.sampled_from(SPECS),
    kv_dtype=st.sampled_from(("f16", "q8_0", "q4_0")),
    mtp=st.sampled_from((0, 2)),
    ctx_tokens=st.integers(1, 1_010_000),
    seqs=st.integers(1, 600),
    more_tokens=st.integers(0, 100_000),
    more_seqs=st.integers(0, 5),
    offload=st.sampled_from((None, False)),
)
def test_more_never_takes_less(
    asked: str, spec: str, kv_dtype: str, mtp: int, ctx_tokens: int, seqs: int, more_tokens: int, more_seqs: int,
    offload: bool | None,
) -> None:  # fmt: skip
    found = estimate(asked, "q4_k_m", spec, kv_dtype, mtp=mtp, offload_experts=offload)
    less, more = (ctx_tokens, seqs), (ctx_tokens + more_tokens, seqs + more_seqs)
    assert found.shortfall_bytes(*less) <= found.shortfall_bytes(*more)
    small, large = found.allocate(*less), found.allocate(*more)
    assert small.fits == (found.shortfall_bytes(*less) <= 0)
    if not large.detail["n_cpu_moe"]:
        for one, other in zip(small.devices, large.devices, strict=True):
            assert one.memory.total.mid <= other.memory.total.mid
    for share in small.devices:
        for amount in share.memory.parts.values():
            assert amount.low <= amount.mid <= amount.high
