"""Ollama on top of llama.cpp's arithmetic (its rules as read at git fb30760, August 2026)."""

from typing import Any

import pytest

from qwenfit.planner.engines import llamacpp, ollama
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles import device, devices_of
from qwenfit.profiles.errors import Unsupported
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.model_catalog import model

GIB = 1 << 30


def setup(asked: str, fmt: str, spec: str, kv_dtype: str = "f16", mtp: int = 0, **options: Any) -> Setup:
    devices = devices_of(spec)
    parts = (model(asked), weight_format(fmt), devices, "0.33.0", kv_dtype, "float32", 1, len(devices), mtp, False)
    return Setup(*parts, Options(**options))


def test_a_gigabyte_stays_free_and_the_vision_tower_comes_along() -> None:
    asked = setup("qwen3.5-9b", "q4_k_m", "rtx3060")
    ours, plain = ollama.estimate(asked).allocate(4096, 1), llamacpp.estimate(asked).allocate(4096, 1)
    assert plain.devices[0].usable_bytes - ours.devices[0].usable_bytes == GIB
    tower = ours.devices[0].memory.weights.mid - plain.devices[0].memory.weights.mid
    assert 0.9e9 < tower < 0.93e9  # 456 M parameters in F16


def test_the_batch_grows_with_the_context_where_there_is_room() -> None:
    found = ollama.estimate(setup("qwen3.5-9b", "q4_k_m", "a100-80gb"))
    assert [found.allocate(ctx, 1).detail["preferred_batch"] for ctx in (4096, 4097, 32768, 32769)] == [
        512, 1024, 1024, 2048,
    ]  # fmt: skip
    activation = found.allocate(262144, 1).devices[0].memory.activation
    assert activation.mid - activation.low > 3 * 2 * 512 * 262144  # the mask of 2048 tokens against that of 512
    tight = ollama.estimate(setup("qwen3.5-9b", "q4_k_m", "rtx3060", "q8_0"))
    ctx = next(ctx for ctx in range(262144, 0, -256) if tight.shortfall_bytes(ctx, 1) <= 0)
    assert tight.allocate(ctx, 1).fits


def test_its_scheduler_counts_a_cache_in_every_layer() -> None:
    """PredictServerVRAM: 131,072 B a token for 9B, four times what the eight attention layers take."""
    found = ollama.estimate(setup("qwen3.5-9b", "q4_k_m", "rtx3060"))
    predicted = [found.allocate(ctx, 1).detail["predicted_by_ollama_bytes"] for ctx in (4096, 8192)]
    assert predicted[1] - predicted[0] == 4096 * 131072  # pyright: ignore[reportOperatorIssue]
    assert any("every layer" in warning for warning in found.allocate(131072, 1).warnings)


def test_the_line() -> None:
    command = ollama.estimate(setup("qwen3.5-9b", "q4_k_m", "rtx3060", "q8_0")).command(32768, 2)
    assert command.startswith(
        "OLLAMA_CONTEXT_LENGTH=32768 OLLAMA_NUM_PARALLEL=2 OLLAMA_KV_CACHE_TYPE=q8_0 OLLAMA_FLASH_ATTENTION=1 "
    )
    assert command.endswith("ollama serve & sleep 3; ollama run qwen3.5:9b")
    assert ollama.estimate(setup("qwen3.6-35b-a3b", "q8_0", "rtx4090")).command(4096, 1).endswith("qwen3.6:35b-q8_0")
    assert "hf.co/" in ollama.estimate(setup("qwen3.5-9b", "q5_k_m", "rtx4090")).command(4096, 1)


def test_what_it_has_not() -> None:
    with pytest.raises(Unsupported, match="q5_0"):
        ollama.estimate(setup("qwen3.5-9b", "q4_k_m", "rtx3060", "q5_0"))
    with pytest.raises(Unsupported, match="multi-token"):
        ollama.estimate(setup("qwen3.5-9b", "q4_k_m", "rtx3060", mtp=2))
    assert ollama.runs_on(device("arc-b580"), "0.33.0")
    assert ollama.runs_on(device("rtx3060"), "0.33.0") is None
