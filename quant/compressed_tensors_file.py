"""compressed-tensors: the tensors of a module and the `quantization_config` of a checkpoint (version 0.15 and later).

Weights of 4 and 8 bits are pack-quantized; with `activation_bits` 8 they are int-quantized (W8A8). A checkpoint may mix
them: every scheme is a group of its own, the commonest one matches class Linear (and names the head, where it has it:
SGLang 0.5.23 `compressed_tensors.py` get_lm_head_scheme), and the others name their modules.
Tensors and packing: `kernels/layout/compressed_tensors_layout.py`. Scales are bf16, as transformers keeps them.
(compressed-tensors 0.20 `quantization/quant_config.py`; vLLM 0.32 `compressed_tensors.py`; transformers 5.23.)
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout.packed_words import pack_words
from .module_rules import check_fused, kept_rules, named_rules
from .quantized import Quantized, Scheme, exact_scales

SCALE_DTYPE = torch.bfloat16
ROWS_DIMENSION = 0
"""Rows can be written on their own, eight at a time; the other formats pack along the inputs."""
VERSION = "0.15.0"  # the oldest that reads what is written here


def module_entries(rows: int, columns: int, scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `module_tensors` will give for a matrix [rows, columns]: ending -> (dtype in safetensors' words, shape)."""
    groups, bits = scheme.groups(columns), scheme.bits
    if scheme.activation_bits:
        _check_int_quantized(scheme)
        return {"weight": ("I8", (rows, columns)), "weight_scale": ("BF16", (rows, groups))}
    entries: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (rows, -(-columns * bits // 32))),
        "weight_scale": ("BF16", (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not scheme.symmetric:
        entries["weight_zero_point"] = ("I32", (-(-rows * bits // 32), groups))
    return entries


def module_tensors(weight: Quantized, activation_bits: int | None = None) -> dict[str, Tensor]:
    """The tensors of a module, ending -> tensor. ValueError where scales are not exact in bf16."""
    scales = exact_scales(weight, SCALE_DTYPE)
    if activation_bits:
        _check_int_quantized(weight.scheme)
        return {"weight": (weight.codes ^ 128).view(torch.int8), "weight_scale": scales}
    tensors = {
        "weight_packed": pack_words(weight.codes, weight.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.symmetric:
        # A clone has rows of its own: of one column contiguous() makes no copy, and its strides do not suit the packer.
        zeros = weight.zeros.t().clone(memory_format=torch.contiguous_format)
        tensors["weight_zero_point"] = pack_words(zeros, weight.bits).t().contiguous()
    return tensors


def quantization_config(schemes: Mapping[str, Scheme], kept: Iterable[str]) -> dict[str, Any]:
    """The block for config.json. schemes: every quantized module by its full name (experts one by one), without
    `.weight`; kept: every other module that is a matrix. ValueError where engines fuse modules of unlike schemes.
    """
    kept = list(kept)
    check_fused(schemes, kept)
    common = Counter(schemes.values()).most_common()
    # Groups that name modules come first: loaders take the first match, and Linear matches everything.
    ordered = [scheme for scheme, _ in common[1:]] + [scheme for scheme, _ in common[:1]]
    groups = {}
    for number, scheme in enumerate(ordered):
        rules = [f"re:{rule}" for rule in named_rules(schemes, scheme)]
        if scheme == common[0][0]:
            # A head is no Linear to vLLM and SGLang, and counts as quantized only where a target names it.
            rules = ["Linear", *(rule for rule in rules if "lm_head" in rule)]
        groups[f"group_{number}"] = _group(rules, scheme)
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "dequantize": _loads_dequantized_only(schemes),
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [f"re:{rule}" for rule in kept_rules(schemes, kept)],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
        "version": VERSION,
    }


def _loads_dequantized_only(schemes: Mapping[str, Scheme]) -> bool:
    """Whether transformers is to unpack the weights while it loads them, which needs no flag of the user then.

    Kept packed until the first use, zero points and experts do not load: compressed-tensors 0.18 to 0.20 lay asymmetric
    modules out without packing their zero points (`pack_quantized/base.py`, compress, on the meta device), and experts
    are no modules of transformers 5.23. Unpacking has limits of its own (`integrations/compressed_tensors.py`): one
    scheme for what is no expert, one for experts, those symmetric; and it multiplies in the dtype of the scales, so
    weights are rounded to bf16. Other engines do not read the key.
    """
    experts = {scheme for module, scheme in schemes.items() if ".experts." in module}
    dense = {scheme for module, scheme in schemes.items() if ".experts." not in module}
    needed = bool(experts) or not all(scheme.symmetric for scheme in dense)
    return needed and len(dense) <= 1 and len(experts) <= 1 and not any(s.activation_bits for s in dense | experts)


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    per_row = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations = None
    if scheme.activation_bits:
        activations = {
            "num_bits": scheme.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
            "actorder": None,
            "block_structure": None,
            "observer": None,
            "observer_kwargs": {},
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": "int-quantized" if scheme.activation_bits else "pack-quantized",
    }


def _check_int_quantized(scheme: Scheme) -> None:
    if scheme.bits != 8 or not scheme.symmetric or scheme.group_size != -1:
        raise ValueError("int-quantized weights (W8A8) are symmetric, of 8 bits, with one scale per row")
