"""The runtime to come: its contract in bytes, by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.calibration import Calibration, Factor
from qwenfit.planner.engines import native
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles.device import Device
from qwenfit.profiles.errors import Unsupported
from qwenfit.profiles.formats import Piece, weight_format
from qwenfit.profiles.model_catalog import model
from qwenfit.profiles.storage import packed_integers, plain

GIB = 1 << 30
TEXT_9B_BYTES = 17_907_614_208  # 8,953,803,264 bf16 parameters, and A_log and the gated norm in F32


def made_device(usable_bytes: int = 24 * GIB, **changes: Any) -> Device:
    facts: dict[str, Any] = {
        "name": "made-gpu",
        "title": "A GPU",
        "vendor": "nvidia",
        "architecture": "ampere",
        "kind": "discrete",
        "memory_bytes": usable_bytes,
        "usable_bytes": usable_bytes,
        "memory_bandwidth_bytes_per_s": 10**12,
        "flops_per_s": {"bf16": 10**14},
        "source": "invented",
        "checked": "2026-11-22",
        "compute_capability": "8.6",
    }
    return Device(**{**facts, **changes})


CPU = made_device(64 * GIB, name="made-cpu", vendor="cpu", kind="cpu", compute_capability=None)


def estimate(name: str = "qwen3.5-9b", weights: str = "int4", device: Device | None = None, **told: Any):
    options = Options(**told.pop("options", {}))
    fields: dict[str, Any] = {"kv_dtype": "bf16", "state_dtype": "float32", "mtp": 0, "vision": False, **told}
    setup = Setup(
        model=model(name),
        weights=weight_format(weights),
        devices=(device or made_device(),),
        version="0.1",
        tp=1,
        pp=1,
        options=options,
        **fields,
    )
    return native.estimate(setup)


@pytest.mark.parametrize(
    ("kv_dtype", "mtp", "per_token"),
    [("bf16", 0, 32768), ("int8", 0, 8 * 4 * 2 * 260), ("bf16", 3, 36864), ("int8", 3, 9 * 4 * 2 * 260)],
)
def test_cache_is_padded_to_64_tokens(kv_dtype: str, mtp: int, per_token: int) -> None:
    """9B: 8 layers x 4 heads x (256 keys + 256 values); int8 adds one float32 scale to each; drafts one layer more."""
    allocation = estimate(kv_dtype=kv_dtype, mtp=mtp).allocate(1001, 2)
    assert allocation.detail["kv_bytes_per_token"] == per_token
    assert allocation.devices[0].memory.kv_cache.mid == 2 * 1024 * per_token


@pytest.mark.parametrize(
    ("state_dtype", "mtp", "bytes_per_seq"),
    [("float32", 0, 51_511_296), ("bfloat16", 0, 26_345_472), ("float32", 2, 3 * 51_511_296)],
)
def test_state_slots(state_dtype: str, mtp: int, bytes_per_seq: int) -> None:
    """9B: 24 layers x (32 x 128 x 128 elements + 3 x 8192 x 2 B), once more for every draft token."""
    allocation = estimate(state_dtype=state_dtype, mtp=mtp).allocate(4096, 3)
    assert allocation.devices[0].memory.recurrent_state.mid == 3 * bytes_per_seq
    assert allocation.detail["state_slots"] == 3 * (1 + mtp)


def test_bf16_weights_are_the_checkpoint_s() -> None:
    assert estimate(weights="bf16").allocate(1, 1).devices[0].memory.weights.mid == TEXT_9B_BYTES
    drafting = estimate(weights="bf16", mtp=1).allocate(1, 1).devices[0].memory.weights.mid
    assert drafting == TEXT_9B_BYTES + 2 * 243_290_624


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "expected"),
    [
        (4, 128, True, 12288 * 4096 // 2 + 12288 * 32 * 2),
        (4, 128, False, 12288 * 4096 // 2 + 12288 * 32 * 4),
        (8, 64, True, 12288 * 4096 + 12288 * 64 * 2),
    ],
)
def test_one_matrix_in_the_runtime_layout(bits: int, group: int, symmetric: bool, expected: int) -> None:
    tensor: Any = SimpleNamespace(part="text", experts=0)
    gate = Piece(tensor, "mlp.gate_proj", (12288, 4096), (), packed_integers(bits, group, symmetric))
    assert native.runtime_bytes(gate, symmetric) == expected


def test_rows_are_padded_and_experts_counted() -> None:
    tensor: Any = SimpleNamespace(part="text", experts=0)
    storage = packed_integers(4, 128, True)
    assert native.runtime_bytes(Piece(tensor, "experts.down_proj", (8, 20, 256), (0, 1, 2), storage), True) == (
        3 * 8 * (32 * 256 // 2 + 32 * 2 * 2)
    )
    assert native.runtime_bytes(Piece(tensor, "norm", (4096,), (0, 1), plain("BF16")), True) == 2 * 8192


def test_arena_of_9b() -> None:
    """Per token: stream 4 x 4096; delta rule 2 x (2 x 8192 + 5 x 4096) + 32 x (8 + 256) + one state per 64 tokens."""
    per_token = 4 * 4096 + 2 * (2 * 8192 + 5 * 4096) + 32 * 264 + 2 * 524_288 // 64
    assert native.arena_bytes_per_token(model("qwen3.5-9b")) == per_token == 114_944
    unpacked = 2 * 12288 * 4096
    assert estimate().arena_bytes == 2048 * per_token + unpacked
    assert estimate(weights="bf16").arena_bytes == 2048 * per_token
    # On a CPU a quarter more for the heap's holes, 18 MB, and tiles of 2,048 keys: 4 KV heads x 256 x 2 in float32,
    # scores of 16 heads x 64 queries.
    tiles = 2048 * (4 * 256 * 2 * 4 + 16 * 64 * 4)
    assert estimate(device=CPU).arena_bytes == 512 * per_token * 5 // 4 + 18_000_000 + tiles
    assert estimate(options={"max_num_batched_tokens": 256}).arena_bytes == 256 * per_token + unpacked


def test_where_it_runs() -> None:
    assert native.runs_on(made_device(), "0.1") is None
    assert native.runs_on(CPU, "0.1") is None
    for target in ("gfx942", "gfx950", "gfx1100", "gfx1201"):
        assert native.runs_on(made_device(vendor="amd", compute_capability=target), "0.1") is None
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"compute_capability": "7.0"}, "7.5"),
        ({"vendor": "amd", "compute_capability": "gfx1151"}, "gfx1151"),
        ({"vendor": "apple", "compute_capability": None}, "no kernels"),
        ({"vendor": "intel", "compute_capability": None}, "no kernels"),
    )
    for changes, word in refused:
        assert word in (native.runs_on(made_device(**changes), "0.1") or "")
    assert any(
        "Turing" in warning
        for warning in estimate(device=made_device(compute_capability="7.5")).allocate(1, 1).warnings
    )


def test_what_it_loads() -> None:
    nine, device = model("qwen3.5-9b"), made_device()
    for name in ("bf16", "int8", "int4", "int4-g64-head8-embed8", "int4-gptq", "int4-awq", "gptq-int4-official"):
        assert native.loads(nine, weight_format(name), device, "0.1") is None
    for name in ("fp8", "nvfp4", "q4_k_m", "mlx-4bit"):
        assert name in (native.loads(nine, weight_format(name), device, "0.1") or "")


@pytest.mark.parametrize(
    ("told", "word"),
    [
        ({"kv_dtype": "fp8"}, "bf16 or int8"),
        ({"vision": True}, "--vision"),
        ({"options": {"offload_experts": True}}, "device"),
    ],
)
def test_what_it_does_not_have(told: dict[str, Any], word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        estimate(**told)


def test_it_is_not_released_yet() -> None:
    assert not native.ENGINE.released


def test_launch_line() -> None:
    assert estimate(kv_dtype="int8", state_dtype="bfloat16", mtp=2).command(32768, 4) == (
        "python -m qwenfit.kernels.run ./Qwen3.5-9B-int4 --ctx 32768 --seqs 4 --kv-dtype int8 --state-dtype bfloat16 "
        "--prefill-chunk 2048 --mtp 2 --device cuda"
    )
    assert estimate(device=CPU).command(1, 1).endswith("--prefill-chunk 512 --device cpu")


@given(
    ctx=st.integers(1, 1_010_000),
    more_ctx=st.integers(0, 300_000),
    seqs=st.integers(1, 64),
    more_seqs=st.integers(0, 64),
    weights=st.sampled_from([("int4", "int8"), ("int8", "bf16"), ("int4-head8-embed8", "int4"), ("int4-sym", "int4")]),
    mtp=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_more_never_takes_less(
    ctx: int, more_ctx: int, seqs: int, more_seqs: int, weights: tuple[str, str], mtp: int
) -> None:
    made, wider = (estimate("qwen3.5-2b", name, mtp=mtp) for name in weights)
    less, more = made.allocate(ctx, seqs), made.allocate(ctx + more_ctx, seqs + more_seqs)
    memory, larger = less.devices[0].memory, more.devices[0].memory
    assert memory.total.mid == sum(amount.mid for amount in memory.parts.values())
    assert all(amount.low <= amount.mid <= amount.high for amount in memory.parts.values())
    assert memory.total.mid <= larger.total.mid and memory.total.high <= larger.total.high
    short = made.shortfall_bytes(ctx, seqs)
    assert short == -less.devices[0].free_bytes and less.fits == (short <= 0)
    assert memory.weights.mid <= wider.allocate(ctx, seqs).devices[0].memory.weights.mid


def test_receipts_move_what_is_estimated_and_nothing_else() -> None:
    """A calibration by half of the scratch and a third more of the runtime; the shortfall follows to the byte."""
    factors = (
        Factor("native", "activation", "", "", 4, 4, 0.5, 0.9, 1.1),
        Factor("native", "runtime", "", "", 4, 4, 4 / 3, 0.8, 1.2),
        Factor("llama.cpp", "runtime", "", "", 4, 4, 9.0, 0.8, 1.2),
    )
    plain_, moved = estimate(), estimate(options={"calibration": Calibration("mine.yaml", factors)})
    before, after = (one.allocate(32768, 4).devices[0].memory for one in (plain_, moved))
    for part in ("weights", "kv_cache", "recurrent_state"):
        assert before.parts[part] == after.parts[part]
    half = before.activation.mid / 2
    assert after.activation.mid == pytest.approx(half, abs=1)
    assert (after.activation.low, after.activation.high) == pytest.approx((half * 0.9, half * 1.1), abs=2)
    assert after.runtime.mid == pytest.approx(before.runtime.mid * 4 / 3, abs=1)
    assert moved.shortfall_bytes(32768, 4) - plain_.shortfall_bytes(32768, 4) == after.total.mid - before.total.mid
