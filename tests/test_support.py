"""A checkpoint read from disk is loaded where a format of its kind is, and nowhere else.

Which engine reads what is pinned by each engine's own test; here the folder or file has to get the same answer as the
name. GGUF left vLLM with 0.24, and Qwen3.5's files were never read there (pull request 39559, closed unmerged).
"""

from typing import Any

import pytest

from qwenfit.planner.candidates import engine_module
from qwenfit.planner.engines.support import likened, warnings
from qwenfit.profiles import device, model
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.frozen import replace
from qwenfit.profiles.model import Model

CHECKPOINT = weight_format("checkpoint")


def on_disk(**quantization: Any) -> Model:
    return replace(model("qwen3.5-9b"), stored="checkpoint", path="./folder", quantization=quantization or None)


KINDS = [
    ({"method": "gguf", "file_type": 15}, "gguf-bf16"),
    ({"method": "mlx", "bits": 8, "group_size": 64}, "mlx-8bit"),
    ({"method": "mlx", "bits": 3, "group_size": 32}, "mlx-4bit"),
    ({"method": "fp8", "bits": 8, "type": "float"}, "fp8"),
    ({"method": "modelopt", "algorithm": "NVFP4"}, "nvfp4"),
    ({"method": "compressed-tensors", "type": "float", "bits": 4, "group_size": 16}, "nvfp4"),
    ({"method": "gptq", "bits": 4, "group_size": 128, "symmetric": True}, "int4-gptq"),
    ({"method": "gptq", "bits": 4, "group_size": 128, "attention_kept": True}, "gptq-int4-official"),
    ({"method": "bitsandbytes"}, "checkpoint"),
    ({}, "checkpoint"),
]


@pytest.mark.parametrize(("quantization", "name"), KINDS)
def test_a_checkpoint_is_like_a_format(quantization: dict[str, Any], name: str) -> None:
    assert likened(on_disk(**quantization), CHECKPOINT).name == name


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
@pytest.mark.parametrize("card", ["t4", "a100-80gb", "mi300x", "epyc-genoa-12ch-192gb"])
@pytest.mark.parametrize(("quantization", "name"), KINDS)
def test_the_folder_loads_where_the_name_does(engine: str, card: str, quantization: dict[str, Any], name: str) -> None:
    module = engine_module(engine)
    asked = (device(card), module.ENGINE.default_version)
    expected = module.loads(model("qwen3.5-9b"), weight_format(name), *asked)
    assert module.loads(on_disk(**quantization), CHECKPOINT, *asked) == expected


def test_no_gguf_in_vllm_or_sglang() -> None:
    for engine in ("vllm", "sglang"):
        reason = engine_module(engine).loads(on_disk(method="gguf"), CHECKPOINT, device("rtx3090"), "0.32.0")
        assert "does not load GGUF files of these models; llama.cpp does" in str(reason)


def test_what_the_device_has_no_arithmetic_for_is_said_of_a_folder_too() -> None:
    fp8 = warnings("vLLM", (device("rtx3090"),), on_disk(method="fp8", bits=8, type="float"), CHECKPOINT)
    assert any("no fp8 arithmetic: weights only (Marlin)" in sentence for sentence in fp8)
