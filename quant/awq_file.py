"""AWQ (GEMM version): the tensors of a module and the `quantization_config` of a checkpoint.

4 bits, asymmetric, one group size: AutoAWQ's format has no other, and vLLM 0.32 (`auto_awq.py`, TYPE_MAP) takes no
other. Tensors and packing: `kernels/layout/awq_layout.py`. Scales are fp16.

`modules_to_not_convert` is matched as a substring of the fused name by vLLM, as a prefix or an ending of the unfused
one by transformers 5.23 (`quantizers/quantizers_utils.py`, should_convert_module). So entries are plain words, in both
forms.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout.awq_layout import INTERLEAVE
from ..kernels.layout.packed_words import pack_words
from .module_rules import KEPT, check_fused, covered
from .quantized import Quantized, Scheme, exact_scales

SCALE_DTYPE = torch.float16
ROWS_DIMENSION = 1
_KEPT = ("in_proj_a", "in_proj_b", "in_proj_ba", "conv1d", "shared_expert_gate", "visual", "model.visual", "mtp")
_FUSED = {
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def module_entries(rows: int, columns: int, scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `module_tensors` will give for a matrix [rows, columns]: ending -> (dtype in safetensors' words, shape).

    ValueError for another scheme than AWQ has, and for rows that do not fill words of 32 bits.
    """
    groups = scheme.groups(columns)
    _check(scheme)
    if rows % 8:
        raise ValueError(f"a matrix of {rows} x {columns} cannot be stored as AWQ: its rows are no multiple of 8")
    return {
        "qweight": ("I32", (columns, rows // 8)),
        "qzeros": ("I32", (groups, rows // 8)),
        "scales": ("F16", (groups, rows)),
    }


def module_tensors(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a module, ending -> tensor. Symmetric codes are stored with their zero point 8 written out.

    ValueError where scales are not exact in fp16.
    """
    scales = exact_scales(weight, SCALE_DTYPE)
    return {
        "qweight": _packed(weight.codes),
        "qzeros": _packed(weight.zeros),
        "scales": scales.t().contiguous(),
    }


def quantization_config(schemes: Mapping[str, Scheme], kept: Iterable[str]) -> dict[str, Any]:
    """The block for config.json. Arguments as in `compressed_tensors_file.py`.

    ValueError where there are several schemes, or engines fuse modules of which one is kept only.
    """
    kept = list(kept)
    check_fused(schemes, kept)
    if len(set(schemes.values())) > 1:
        raise ValueError("an AWQ checkpoint has one scheme: take compressed-tensors for mixed precision")
    scheme = next(iter(schemes.values()))
    _check(scheme)
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "lm_head": any(module.endswith("lm_head") for module in schemes),
        "modules_to_not_convert": _not_converted(schemes, kept),
    }


def _not_converted(schemes: Mapping[str, Scheme], kept: list[str]) -> list[str]:
    words: list[str] = [*_KEPT]
    # "mlp.gate" is part of "mlp.gate_proj" too, so routers are named only where no layer has a plain MLP.
    if any(module.endswith("mlp.gate") for module in kept):
        if any(".mlp.gate_proj" in module for module in schemes):
            raise ValueError("routers beside plain MLPs cannot be told apart in AWQ's rules: take compressed-tensors")
        words.append("mlp.gate")
    leaves = {_from_layer(module) for module in schemes}
    head = [] if any(module.endswith("lm_head") for module in schemes) else ["lm_head"]
    for module in dict.fromkeys((*head, *kept)):
        if covered(module, KEPT):
            continue
        name = _from_layer(module)
        parent, _, leaf = name.rpartition(".")
        words.append(name)
        if leaf in _FUSED:
            words.append(f"{parent}.{_FUSED[leaf]}")
        if any(word.startswith(name) and word != name for word in leaves):
            raise ValueError(f"{module} cannot be told apart in AWQ's rules: take compressed-tensors")
    return list(dict.fromkeys(words))


def _from_layer(module: str) -> str:
    """`layers.3.mlp.up_proj` of a full name: what all engines' prefixes have in common; `lm_head` stays."""
    _, found, rest = module.partition("layers.")
    return f".{found}{rest}" if found else module


def _packed(rows: Tensor) -> Tensor:
    """uint8 [O, n] -> int32 [n, O / 8], nibble i of word w being row 8 w + INTERLEAVE[i]."""
    lanes = torch.tensor(INTERLEAVE[4])
    return pack_words(rows.t().unflatten(1, (-1, 8))[..., lanes].flatten(1), 4)


def _check(scheme: Scheme) -> None:
    if scheme.bits != 4 or scheme.activation_bits:
        raise ValueError("AWQ has weights of 4 bits only: take compressed-tensors or GPTQ for 8")
