"""`quantization_config` of a config.json, in one vocabulary whatever tool wrote it.

It decides nothing where the weights are there: then the headers tell what is stored. Without weights it names the
format that the checkpoint is sized in (`stored_format`).
"""

import os
from collections.abc import Mapping
from typing import Any

from .errors import BadInput, Unsupported
from .json_file import read_json_object, short

_KV_WORDS = {"FP8": "fp8", "NVFP4": "nvfp4"}
# Methods of integers in groups -> (the dialect in a format's name, columns per scale where the file does not say:
# transformers' GPTQConfig and AwqConfig take 128; compressed-tensors leaves the size out of a scale per channel)
_INTEGERS: dict[str, tuple[str, int]] = {"gptq": ("-gptq", 128), "awq": ("-awq", 128), "compressed-tensors": ("", -1)}
_GROUP_WORDS = {-1: "-channel", 32: "-g32", 64: "-g64", 128: "", 256: "-g256"}


def read_quantization(data: Mapping[str, Any], text: Mapping[str, Any], path: str) -> dict[str, object] | None:
    """method, bits, group_size, symmetric, algorithm, kv_cache: what the file says of them. None: not quantized.

    ModelOpt's older releases keep it in hf_quant_config.json beside config.json.
    """
    config = data.get("quantization_config", text.get("quantization_config"))
    if config is None:
        beside = os.path.join(os.path.dirname(path), "hf_quant_config.json")
        if os.path.basename(path) != "config.json" or not os.path.exists(beside):
            return None
        path, config = beside, read_json_object(beside).get("quantization")
        if isinstance(config, dict):
            config = {"quant_method": "modelopt", **config}
    if not isinstance(config, dict):
        raise BadInput(f"{path}: quantization_config is {short(config)}, not an object")
    method = config.get("quant_method")
    if method is None and type(config.get("bits")) is int and type(config.get("group_size")) is int:
        method = "mlx"  # mlx-lm `quantize_model` writes its bits and group_size here, without a method
    if not isinstance(method, str) or not method:
        raise BadInput(f"{path}: quantization_config.quant_method is {short(method)}, not a name")
    weights = _weights(config)
    found: dict[str, object] = {
        "method": method,
        "bits": weights.get("num_bits", config.get("bits", config.get("w_bit"))),
        "group_size": weights.get("group_size", config.get("group_size", config.get("q_group_size"))),
        "symmetric": weights.get("symmetric", config.get("sym")),
        "type": weights.get("type"),
        "activation_bits": _activation_bits(config),
        "algorithm": config.get("quant_algo", config.get("format")),
        "kv_cache": _kv_cache(config),
    }
    if method == "fp8":
        found.update(bits=8, type="float", block=_pair(config.get("weight_block_size")))
    if method == "awq" and isinstance(config.get("zero_point"), bool):
        found["symmetric"] = not config["zero_point"]
    found["attention_kept"] = _keeps_attention(config) or None
    return {name: value for name, value in found.items() if isinstance(value, int | str | tuple)}


def stored_format(quantization: Mapping[str, object] | None, path: str) -> str | None:
    """Name of the weight format that a config.json without weights is sized in; None: not quantized.

    `Unsupported` for a method whose sizes do not follow from config.json.
    """
    if quantization is None:
        return None
    method, bits, algorithm = (quantization.get(name) for name in ("method", "bits", "algorithm"))
    if method == "fp8":
        return "fp8"
    if method == "modelopt" and algorithm in ("NVFP4", "MIXED_PRECISION"):
        return "nvfp4"
    if method == "gptq" and bits == 4 and quantization.get("attention_kept"):
        return "gptq-int4-official"
    if method == "mlx" and bits in (4, 5, 6, 8) and quantization.get("group_size") == 64:
        return f"mlx-{bits}bit"
    found = _integers(quantization)
    if found is not None:
        return found
    raise Unsupported(
        f"{path}: the sizes of {short(method)} weights do not follow from quantization_config; "
        "give the folder with its safetensors files"
    )


def _integers(quantization: Mapping[str, object]) -> str | None:
    """`int4-gptq-g32` and the like: bits, dialect, group size and symmetry decide the size. None: no such integers."""
    method, bits, symmetric = (quantization.get(name) for name in ("method", "bits", "symmetric"))
    if method not in _INTEGERS or quantization.get("type", "int") != "int" or bits not in (4, 8):
        return None
    if bits == 8 and quantization.get("activation_bits") == 8:
        return "int8-w8a8"
    dialect, unsaid = _INTEGERS[str(method)]
    size = quantization.get("group_size", unsaid)
    if type(size) is not int or size not in _GROUP_WORDS or (method == "awq" and (bits == 8 or size < 0)):
        return None
    if method == "awq" or symmetric is None or symmetric == (bits == 8 or method == "gptq"):
        return f"int{bits}{dialect}{_GROUP_WORDS[size]}"
    return f"int{bits}{dialect}{_GROUP_WORDS[size]}-{'sym' if symmetric else 'asym'}"


def _weights(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `weights` scheme of the first config group (compressed-tensors, ModelOpt)."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            return weights
    return {}


def _activation_bits(config: Mapping[str, Any]) -> int | None:
    """Bits of integer activations (compressed-tensors' W8A8); None: activations stay as they are."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        scheme = group.get("input_activations") if isinstance(group, dict) else None
        if isinstance(scheme, dict) and scheme.get("type") == "int":
            bits = scheme.get("num_bits")
            return bits if type(bits) is int else None
    return None


def _kv_cache(config: Mapping[str, Any]) -> str | None:
    word = config.get("kv_cache_quant_algo")
    if isinstance(word, str):
        return _KV_WORDS.get(word)
    scheme = config.get("kv_cache_scheme")
    is_fp8 = isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float"
    return "fp8" if is_fp8 else None


def _pair(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int for size in value):
        return tuple(value)
    return None


def _keeps_attention(config: Mapping[str, Any]) -> bool:
    """GPTQModel's `dynamic` rules with `-:` leave modules alone; Qwen's releases leave out everything with attn in
    it.
    """
    dynamic = config.get("dynamic")
    return isinstance(dynamic, dict) and any(rule.startswith("-:") and "attn" in rule for rule in dynamic)
