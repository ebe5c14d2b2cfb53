"""GPTQ: the tensors of a module and the `quantization_config` of a checkpoint.

Symmetric weights are written as version 1 (`gptq`), which every loader takes; asymmetric ones as version 2 (`gptq_v2`),
since version 1 stores a zero point less one, which loses the zero point 0, and GPTQModel refuses it from others.
There is no act-order (static: columns keep their places), so g_idx is i // group_size. Tensors and packing:
`kernels/layout/gptq_layout.py`. Scales are fp16.

Who reads which rule: vLLM 0.32 matches `dynamic` against fused names, transformers 5.23 (through optimum 2.3) ignores
it, replaces every Linear of a block, and needs `modules_in_block_to_quantize`; SGLang reads `dynamic` like vLLM. A
bit width by module is something that only `dynamic` can say, so transformers loads checkpoints of one scheme only.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout.packed_words import pack_words
from .module_rules import check_fused, kept_rules, named_rules
from .quantized import Quantized, Scheme, exact_scales

SCALE_DTYPE = torch.float16
ROWS_DIMENSION = 1
_ONES = {4: 0x11111111, 8: 0x01010101}


def module_entries(rows: int, columns: int, scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `module_tensors` will give for a matrix [rows, columns]: ending -> (dtype in safetensors' words, shape).

    ValueError for sides that do not fill words of 32 bits, and for W8A8, which GPTQ has not.
    """
    groups, per_word = scheme.groups(columns), 32 // scheme.bits
    if scheme.activation_bits:
        raise ValueError("GPTQ stores weights only: W8A8 is for compressed-tensors")
    if rows % per_word or columns % per_word:
        raise ValueError(f"a matrix of {rows} x {columns} cannot be stored as GPTQ: sides are multiples of {per_word}")
    return {
        "qweight": ("I32", (columns // per_word, rows)),
        "qzeros": ("I32", (groups, rows // per_word)),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def module_tensors(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a module, ending -> tensor. ValueError where scales are not exact in fp16."""
    scales = exact_scales(weight, SCALE_DTYPE)
    # A clone has rows of its own: of one column contiguous() makes no copy, and its strides do not suit the packer.
    qzeros = pack_words(weight.zeros.t().clone(memory_format=torch.contiguous_format), weight.bits)
    columns = weight.codes.shape[1]
    return {
        "qweight": pack_words(weight.codes, weight.bits).t().contiguous(),
        # Taken from whole words, as loaders add it to whole words.
        "qzeros": qzeros - _ONES[weight.bits] if weight.symmetric else qzeros,
        "scales": scales.t().contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // weight.group_size,
    }


def quantization_config(schemes: Mapping[str, Scheme], kept: Iterable[str]) -> dict[str, Any]:
    """The block for config.json, and for quantize_config.json beside it. Arguments as in `compressed_tensors_file.py`.

    ValueError where schemes differ in anything but bits and group size, or engines fuse modules of unlike schemes.
    """
    kept = list(kept)
    check_fused(schemes, kept)
    if len({scheme.symmetric for scheme in schemes.values()}) > 1:
        raise ValueError("a GPTQ checkpoint is symmetric or asymmetric as a whole: take compressed-tensors for both")
    (main, _), *others = Counter(schemes.values()).most_common()
    dynamic: dict[str, dict[str, int]] = {f"-:{rule}": {} for rule in kept_rules(schemes, kept)}
    for scheme, _ in others:
        override = {"bits": scheme.bits, "group_size": scheme.group_size}
        dynamic.update({f"+:{rule}": override for rule in named_rules(schemes, scheme)})
    return {
        "quant_method": "gptq",
        "bits": main.bits,
        "group_size": main.group_size,
        "sym": main.symmetric,
        "desc_act": False,
        "lm_head": any(module.endswith("lm_head") for module in schemes),
        "checkpoint_format": "gptq" if main.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "modules_in_block_to_quantize": [_leaves(schemes)],
        "meta": {"quantizer": ["qwenfit"], "act_group_aware": False, "static_groups": True},
    }


def _leaves(modules: Iterable[str]) -> list[str]:
    """Names inside a block, each once: `linear_attn.in_proj_qkv`; experts with their numbers. And what is quantized
    outside the blocks, which vLLM takes for unquantized if it is not here (0.32 `gptq_utils.py`,
    is_layer_gptq_quantized): `lm_head`."""
    inside = [module.partition("layers.")[2].partition(".")[2] if "layers." in module else module for module in modules]
    return list(dict.fromkeys(inside))
