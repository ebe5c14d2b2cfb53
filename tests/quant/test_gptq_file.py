"""GPTQ as it is written here, read by the kernels' conversion and the runtime; and rules as vLLM looks them up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenfit.kernels.layout.checkpoint import DTYPES, open_checkpoint
from qwenfit.kernels.layout.gptq_layout import from_gptq
from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize
from qwenfit.profiles.storage import gptq, storage_bytes
from qwenfit.quant import gptq_file as form
from qwenfit.quant.quantized import Quantized, Scheme
from qwenfit.quant.shards import Entry

SCHEMES = {
    "int4 g128": Scheme(4, 128, True),
    "int4 g32 asym": Scheme(4, 32, False),
    "int8 g64": Scheme(8, 64, True),
    "int8 channel": Scheme(8, -1, True),
    "int4 channel asym": Scheme(4, -1, False),
}
KEPT_WORDS = ("in_proj_a", "in_proj_b", "conv1d", "mlp.gate.", "shared_expert_gate", "norm", "embed", "head", "mtp")


def is_text_matrix(module: str) -> bool:
    is_kept = any(word in f"{module}." for word in KEPT_WORDS) or module.endswith(("A_log", "dt_bias"))
    return "layers." in module and not is_kept


def version(scheme: Scheme) -> int:
    return 1 if scheme.symmetric else 2


@pytest.mark.parametrize("name", SCHEMES)
def test_the_kernels_read_what_was_written(name: str, rounded: Any) -> None:
    scheme = SCHEMES[name]
    weight = rounded(torch.randn(48, 256, generator=torch.Generator().manual_seed(0)), scheme, form.SCALE_DTYPE)
    tensors: dict[str, Any] = form.module_tensors(weight)
    read = from_gptq(**tensors, version=version(scheme))
    assert torch.equal(dequantize(read, torch.float32), weight.dequantize())


def test_symmetric_zero_points_are_those_of_version_1(rounded: Any) -> None:
    """0x77777777 for 4 bits, 0x7f7f7f7f for 8: the middle code less one, as GPTQModel and AutoGPTQ store it."""
    for scheme, word in ((Scheme(4, 128, True), 0x77777777), (Scheme(8, 128, True), 0x7F7F7F7F)):
        qzeros = form.module_tensors(rounded(torch.randn(32, 256), scheme, form.SCALE_DTYPE))["qzeros"]
        assert bool((qzeros == word).all())


def test_a_zero_point_of_0_survives() -> None:
    """In version 1 it would be -1: a borrow from its neighbour."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 8)
    zeros = torch.tensor([0, 15, 0, 0, 7, 0, 15, 0], dtype=torch.uint8).unsqueeze(1).repeat(1, 4)
    weight = Quantized(codes, torch.ones(8, 4), zeros, 4, 32, False)
    tensors: dict[str, Any] = form.module_tensors(weight)
    read = from_gptq(**tensors, version=2)
    assert torch.equal(dequantize(read, torch.float32), weight.dequantize())


@pytest.mark.parametrize("name", SCHEMES)
def test_entries_are_what_is_written_and_what_the_planner_counts(name: str, rounded: Any) -> None:
    scheme, shape = SCHEMES[name], (48, 256)
    described = form.module_entries(*shape, scheme)
    tensors = form.module_tensors(rounded(torch.randn(shape), scheme, form.SCALE_DTYPE))
    assert {key: (DTYPES[dtype], size) for key, (dtype, size) in described.items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
    }
    group = scheme.group_size if scheme.group_size > 0 else shape[1]
    total = sum(Entry(key, *entry).bytes for key, entry in described.items())
    assert total == storage_bytes(shape, gptq(scheme.bits, group))


def test_what_the_format_has_not() -> None:
    with pytest.raises(ValueError, match="sides are multiples of 8"):
        form.module_entries(12, 128, SCHEMES["int4 g128"])
    with pytest.raises(ValueError, match="W8A8 is for compressed-tensors"):
        form.module_entries(16, 128, Scheme(8, -1, True, activation_bits=8))
    both = {"model.layers.0.mlp.down_proj": Scheme(4, 128, True), "model.layers.1.mlp.down_proj": Scheme(4, 128, False)}
    with pytest.raises(ValueError, match="symmetric or asymmetric as a whole"):
        form.quantization_config(both, [])


@pytest.mark.parametrize("name", ["int4 g128", "int4 g32 asym", "int8 g64"])
@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_5_moe"])
def test_the_runtime_loads_it(
    name: str, architecture: str, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path
) -> None:
    folder, scheme = tmp_path / "quantized", SCHEMES[name]
    fake = quantized_checkpoint(
        checkpoint(architecture), folder, form, lambda module: scheme if is_text_matrix(module) else None
    )
    found = open_checkpoint(str(folder))
    for label, matrix in fake.items():
        bare = label.removeprefix("model.").removesuffix(".weight")
        if matrix.dim() == 2 or bare.endswith("down_proj"):
            weight = found.matrix(bare, *matrix.shape) if matrix.dim() == 2 else found.stack(bare, *matrix.shape)
            assert isinstance(weight, QuantizedWeight) and torch.equal(dequantize(weight, torch.float32), matrix)


def looked_up(dynamic: dict[str, Any], layer: str) -> Any:
    """vLLM 0.32 `gptq_utils.py`, get_dynamic_override: the first rule that matches; False: not quantized."""
    for rule, override in dynamic.items():
        if rule.startswith("-:"):
            if re.match(rule.removeprefix("-:"), layer):
                return False
        elif re.match(rule.removeprefix("+:"), layer):
            return override
    return None


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_is_listed(bits: int) -> None:
    """vLLM 0.32 `gptq_utils.py`, is_layer_gptq_quantized: whatever no name of `modules_in_block_to_quantize` is part of
    counts as unquantized."""
    scheme = Scheme(4, 64, True)
    schemes = {f"model.layers.{layer}.mlp.down_proj": scheme for layer in (0, 1)}
    config = form.quantization_config({**schemes, "lm_head": Scheme(bits, 64, True)}, [])
    assert config["lm_head"] and config["modules_in_block_to_quantize"] == [["mlp.down_proj", "lm_head"]]
    expected = None if bits == 4 else {"bits": 8, "group_size": 64}
    assert looked_up(config["dynamic"], "language_model.lm_head") == expected
    plain = form.quantization_config(schemes, ["lm_head"])
    assert plain["modules_in_block_to_quantize"] == [["mlp.down_proj"]] and not plain["lm_head"]


def test_rules_as_engines_look_them_up(checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path) -> None:
    def scheme_of(module: str) -> Scheme | None:
        if not is_text_matrix(module) or "layers.2.linear_attn.out_proj" in module:
            return None
        return Scheme(8 if "layers.1.linear_attn.in_proj" in module else 4, 64, True)

    folder = tmp_path / "quantized"
    quantized_checkpoint(checkpoint("qwen3_5_moe"), folder, form, scheme_of)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for prefix in ("model.layers.", "language_model.model.layers."):
        for kept in ("0.linear_attn.in_proj_ba", "2.linear_attn.out_proj", "1.mlp.gate", "1.mlp.shared_expert_gate"):
            assert looked_up(config["dynamic"], prefix + kept) is False
        assert looked_up(config["dynamic"], prefix + "1.linear_attn.in_proj_qkvz") == {"bits": 8, "group_size": 64}
        for usual in ("0.linear_attn.in_proj_qkvz", "1.mlp.experts", "3.self_attn.qkv_proj", "0.linear_attn.out_proj"):
            assert looked_up(config["dynamic"], prefix + usual) is None
    assert looked_up(config["dynamic"], "mtp.layers.0.self_attn.qkv_proj") is False
    assert looked_up(config["dynamic"], "lm_head") is False
    [inside] = config["modules_in_block_to_quantize"]
    assert {"linear_attn.in_proj_qkv", "self_attn.q_proj", "mlp.shared_expert.up_proj"} <= set(inside)
    assert not [name for name in inside if "in_proj_a" in name or "in_proj_b" in name]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 64, True, False)
    assert config["checkpoint_format"] == "gptq"
