"""AWQ (GEMM) as it is written here, read by the kernels' conversion and the runtime; and rules as engines read them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenfit.kernels.layout.awq_layout import from_awq
from qwenfit.kernels.layout.checkpoint import DTYPES, open_checkpoint
from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize
from qwenfit.profiles.storage import awq, storage_bytes
from qwenfit.quant import awq_file as form
from qwenfit.quant.quantized import Scheme
from qwenfit.quant.shards import Entry

SCHEMES = {"g128 asym": Scheme(4, 128, False), "g32 asym": Scheme(4, 32, False), "g64 sym": Scheme(4, 64, True)}
KEPT_WORDS = ("in_proj_a", "in_proj_b", "conv1d", "mlp.gate.", "shared_expert_gate", "norm", "embed", "head", "mtp")


def is_text_matrix(module: str) -> bool:
    is_kept = any(word in f"{module}." for word in KEPT_WORDS) or module.endswith(("A_log", "dt_bias"))
    return "layers." in module and not is_kept


@pytest.mark.parametrize("name", SCHEMES)
def test_the_kernels_read_what_was_written(name: str, rounded: Any) -> None:
    matrix = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    weight = rounded(matrix, SCHEMES[name], form.SCALE_DTYPE)
    tensors: dict[str, Any] = form.module_tensors(weight)
    read = from_awq(**tensors)
    assert torch.equal(dequantize(read, torch.float32), weight.dequantize())


@pytest.mark.parametrize("name", SCHEMES)
def test_entries_are_what_is_written_and_what_the_planner_counts(name: str, rounded: Any) -> None:
    scheme, shape = SCHEMES[name], (48, 256)
    described = form.module_entries(*shape, scheme)
    tensors = form.module_tensors(rounded(torch.randn(shape), scheme, form.SCALE_DTYPE))
    assert {key: (DTYPES[dtype], size) for key, (dtype, size) in described.items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
    }
    total = sum(Entry(key, *entry).bytes for key, entry in described.items())
    assert total == storage_bytes(shape, awq(4, scheme.group_size))


def test_what_the_format_has_not() -> None:
    with pytest.raises(ValueError, match="AWQ has weights of 4 bits only"):
        form.module_entries(16, 128, Scheme(8, 128, True))
    with pytest.raises(ValueError, match="no multiple of 8"):
        form.module_entries(12, 128, SCHEMES["g128 asym"])
    modules = {
        "model.layers.0.mlp.down_proj": Scheme(4, 128, False),
        "model.layers.1.mlp.down_proj": Scheme(4, 64, False),
    }
    with pytest.raises(ValueError, match="an AWQ checkpoint has one scheme"):
        form.quantization_config(modules, [])


@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_5_moe"])
def test_the_runtime_loads_it(architecture: str, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path) -> None:
    folder, scheme = tmp_path / "quantized", SCHEMES["g32 asym"]
    fake = quantized_checkpoint(
        checkpoint(architecture), folder, form, lambda module: scheme if is_text_matrix(module) else None
    )
    found = open_checkpoint(str(folder))
    for label, matrix in fake.items():
        bare = label.removeprefix("model.").removesuffix(".weight")
        if matrix.dim() == 2 or bare.endswith("down_proj"):
            weight = found.matrix(bare, *matrix.shape) if matrix.dim() == 2 else found.stack(bare, *matrix.shape)
            assert isinstance(weight, QuantizedWeight) and torch.equal(dequantize(weight, torch.float32), matrix)


def vllm_skips(words: list[str], layer: str) -> bool:
    """vLLM 0.32 `quant_utils.py`, is_layer_skipped with match_mode substring."""
    return any(word in layer for word in words)


def transformers_skips(words: list[str], module: str) -> bool:
    """transformers 5.23 `quantizers_utils.py`, should_convert_module."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{word}){boundary}", module) or module.endswith(word) for word in words)


@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_5_moe"])
def test_rules_as_engines_read_them(
    architecture: str, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path
) -> None:
    """One layer's gate and up kept by recipe, beside what is always kept."""

    def scheme_of(module: str) -> Scheme | None:
        kept = ("layers.2.linear_attn.in_proj", "layers.3.self_attn.q", "layers.3.self_attn.k", "layers.3.self_attn.v")
        is_kept = any(word in module for word in kept) or not is_text_matrix(module)
        return None if is_kept else SCHEMES["g32 asym"]

    folder = tmp_path / "quantized"
    quantized_checkpoint(checkpoint(architecture), folder, form, scheme_of)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    words = config["modules_to_not_convert"]
    fused = ["0.self_attn.qkv_proj", "0.linear_attn.in_proj_qkvz", "12.linear_attn.in_proj_qkvz"]
    fused += ["1.mlp.experts", "1.mlp.shared_expert.gate_up_proj"] if "moe" in architecture else ["0.mlp.gate_up_proj"]
    for layer in fused:
        assert not vllm_skips(words, f"language_model.model.layers.{layer}"), layer
    for layer in (
        "0.linear_attn.in_proj_ba",
        "3.self_attn.qkv_proj",
        "2.linear_attn.in_proj_qkvz",
        "1.linear_attn.conv1d",
    ):
        assert vllm_skips(words, f"language_model.model.layers.{layer}")
    for module in ("0.self_attn.q_proj", "0.linear_attn.in_proj_z", "1.mlp.shared_expert.up_proj", "0.mlp.gate_proj"):
        assert not transformers_skips(words, f"model.layers.{module}"), module
    for module in ("0.linear_attn.in_proj_a", "2.linear_attn.in_proj_qkv", "2.linear_attn.in_proj_z"):
        assert transformers_skips(words, f"model.layers.{module}")
    assert transformers_skips(words, "lm_head") and vllm_skips(words, "visual.blocks.0.attn.qkv")
    assert transformers_skips(words, "model.visual.blocks.0.attn.qkv")
    if "moe" in architecture:
        assert vllm_skips(words, "model.layers.1.mlp.gate") and vllm_skips(
            words, "model.layers.1.mlp.shared_expert_gate"
        )
    assert (config["bits"], config["group_size"], config["zero_point"], config["version"]) == (4, 32, True, "gemm")
