"""quantization_config in one vocabulary, and the format that a config.json without weights is sized in."""

import json

import pytest

from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.quantization_config import read_quantization, stored_format

# Qwen/Qwen3.5-*-FP8, Qwen/Qwen3.5-*-GPTQ-Int4 and nvidia/Qwen3.5-122B-A10B-NVFP4, less their lists of modules.
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "dynamic": {"lm_head": {}, "-:.*attn.*": {}, "-:.*shared_expert.*": {}, "-:.*mtp.*": {}, "-:.*visual.*": {}},
}
NVFP4 = {
    "config_groups": {"group_0": {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}}},
    "quant_algo": "NVFP4",
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "quant_method": "modelopt",
}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int", "symmetric": False, "group_size": 32}}},
}


@pytest.mark.parametrize(
    ("config", "found", "stored"),
    [
        (FP8, {"method": "fp8", "bits": 8, "type": "float", "block": (128, 128)}, "fp8"),
        (
            GPTQ,
            {"method": "gptq", "bits": 4, "group_size": 128, "symmetric": True, "attention_kept": True},
            "gptq-int4-official",
        ),
        (GPTQ | {"dynamic": None}, {"method": "gptq", "bits": 4, "group_size": 128, "symmetric": True}, "int4-gptq"),
        (
            NVFP4,
            {
                "method": "modelopt",
                "bits": 4,
                "group_size": 16,
                "type": "float",
                "algorithm": "NVFP4",
                "kv_cache": "fp8",
            },
            "nvfp4",
        ),
        (
            PACKED,
            {
                "method": "compressed-tensors",
                "bits": 8,
                "group_size": 32,
                "symmetric": False,
                "type": "int",
                "algorithm": "pack-quantized",
            },
            "int8-g32-asym",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            {"method": "awq", "bits": 4, "group_size": 128, "symmetric": False},
            "int4-awq",
        ),
        (
            {"group_size": 64, "bits": 4, "mode": "affine"},  # what mlx-lm's `quantize_model` writes
            {"method": "mlx", "bits": 4, "group_size": 64},
            "mlx-4bit",
        ),
    ],
)
def test_methods(config, found, stored):
    for data, text in (({"quantization_config": config}, {}), ({}, {"quantization_config": config})):
        assert read_quantization(data, text, "config.json") == found
    assert stored_format(found, "config.json") == stored


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, "int4-gptq-g32"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False}, "int8-gptq-channel-asym"),
        ({"quant_method": "gptq", "bits": 4}, "int4-gptq"),  # GPTQConfig's default: 128
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "int4-awq-g64"),
        ({"weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}}, "int4-g32-sym"),
        ({"weights": {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": False}}, "int4"),
        ({"weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}}, "int8-channel"),
        (
            {
                "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
                "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
            },
            "int8-w8a8",
        ),
    ],
)
def test_the_size_follows_from_group_and_dialect(config, stored):
    """int4 in groups of 32 takes 4.5 bits a weight where groups of 128 take 4.16: the name has to say which."""
    if "quant_method" not in config:
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], **config}}}
    found = read_quantization({"quantization_config": config}, {}, "config.json")
    assert stored_format(found, "config.json") == stored
    assert weight_format(stored).name == stored


def test_without_quantization():
    assert read_quantization({}, {}, "config.json") is None
    assert stored_format(None, "config.json") is None


def test_modelopts_older_file_beside_config(tmp_path):
    beside = {"producer": {}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    found = read_quantization({}, {}, str(tmp_path / "config.json"))
    assert found == {"method": "modelopt", "group_size": 16, "algorithm": "NVFP4", "kv_cache": "fp8"}
    (tmp_path / "hf_quant_config.json").write_text("[")
    with pytest.raises(BadInput, match=r"hf_quant_config\.json is not JSON"):
        read_quantization({}, {}, str(tmp_path / "config.json"))


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quark", "mxfp4"])
def test_methods_of_unknown_size_are_refused(method):
    found = read_quantization({"quantization_config": {"quant_method": method}}, {}, "config.json")
    with pytest.raises(Unsupported, match=f"'{method}' weights do not follow from quantization_config"):
        stored_format(found, "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": [4]},
        {"quant_method": "gptq", "bits": "4"},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": 4, "group_size": 0},
        {"quant_method": "gptq", "bits": 4, "group_size": 48},
        {"quant_method": "awq", "bits": 4, "group_size": -1},
        {"bits": 3, "group_size": 64},
        {"bits": 4, "group_size": 32},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"g": 1}},
        {"quant_method": "modelopt", "quant_algo": {}},
    ],
)
def test_odd_values_never_pass_for_a_format(config):
    with pytest.raises(Unsupported):
        stored_format(read_quantization({"quantization_config": config}, {}, "config.json"), "config.json")


@pytest.mark.parametrize("config", [7, "fp8", [], {}, {"quant_method": None}, {"quant_method": ""}])
def test_what_is_no_quantization_config(config):
    with pytest.raises(BadInput, match="quantization_config"):
        read_quantization({"quantization_config": config}, {}, "config.json")
