"""What is in a checkpoint, module by module: `inspect(folder)`, whoever wrote it. Headers are read, weights are not.

A module is what has one weight: a quantized matrix with its scales and zero points, a plain one, a norm, a stack of
experts. Formats are told by tensors, as `kernels/layout/checkpoint.py` does; bits per weight are all bytes of a module
over the numbers that it stands for.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..kernels.layout.checkpoint import read_tensor
from ..profiles.checkpoint import StoredTensor, stored_tensors
from ..profiles.errors import BadInput
from ..profiles.ggml import GGML_TYPES
from ..profiles.gguf_header import read_gguf_header
from ..profiles.json_file import short
from ..profiles.roles import classify, classify_gguf, pattern_of

# What belongs to a quantized weight, by its ending.
_PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_scale_inv",
    "weight_scale_2",
    "input_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "biases",
    "weight",
)
_FLOAT_BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16}


@dataclass(frozen=True, slots=True)
class Module:
    """form: pack-quantized, int-quantized, gptq, awq, a GGML type, or the dtype of a plain tensor. bits: of one code.

    group_size: columns per scale; None where it is not quantized, the columns where a row has one scale.
    """

    name: str
    part: str
    role: str
    layer: int | None
    form: str
    shape: tuple[int, ...]
    bits: int
    group_size: int | None
    symmetric: bool | None
    bytes: int

    @property
    def weights(self) -> int:
        """Numbers that it stands for."""
        return prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        return self.group_size is not None


@dataclass(frozen=True, slots=True)
class Inspection:
    """All modules in the order of the files, and their sums."""

    path: str
    modules: tuple[Module, ...]

    @property
    def bytes(self) -> int:
        return sum(module.bytes for module in self.modules)

    @property
    def weights(self) -> int:
        return sum(module.weights for module in self.modules)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Of the quantized modules alone, scales and zero points included."""
        quantized = [module for module in self.modules if module.is_quantized]
        weights = sum(module.weights for module in quantized)
        return 8 * sum(module.bytes for module in quantized) / weights if weights else None


def inspect(path: str) -> Inspection:
    """The modules of a folder of safetensors, or of a GGUF file or a folder with one.

    `BadInput` for damaged files, and for a folder that holds neither.
    """
    if os.path.isdir(path):
        tensors = stored_tensors(path)
        if tensors:
            return Inspection(path, _modules(tensors))
        found = [name for name in sorted(os.listdir(path)) if name.endswith(".gguf")]
        if not found:
            raise BadInput(f"{path} holds neither safetensors nor GGUF files; give a checkpoint")
        path = os.path.join(path, found[0])
    return Inspection(path, _gguf_modules(path))


def _modules(tensors: Mapping[str, StoredTensor]) -> tuple[Module, ...]:
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        owner, _, ending = name.rpartition(".")
        if ending in _PARTS:
            parts[owner][ending] = tensor
        else:
            parts[name][""] = tensor
    return tuple(_module(name, found) for name, found in parts.items())


def _module(name: str, parts: Mapping[str, StoredTensor]) -> Module:
    pattern, layer, _ = pattern_of(name)
    part, role = classify(pattern if "" in parts else pattern + ".weight")
    form, shape, bits, groups, symmetric = _stored(name, parts)
    size = None if groups is None else shape[-1] // max(groups, 1)
    total_bytes = sum(tensor.bytes for tensor in parts.values())
    return Module(name, part, role, layer, form, shape, bits, size, symmetric, total_bytes)


def _stored(name: str, parts: Mapping[str, StoredTensor]) -> tuple[str, tuple[int, ...], int, int | None, bool | None]:
    """(form, shape, bits, groups per row or None, symmetric or None)."""
    if "weight_packed" in parts and "weight_shape" in parts and "weight_scale" in parts:
        rows, columns = map(int, read_tensor(parts["weight_shape"]))
        if rows < 1 or columns < 1:
            raise BadInput(f"{name}.weight_shape says {rows} x {columns}; the file is damaged")
        bits = 32 * parts["weight_packed"].shape[1] // columns
        symmetric = "weight_zero_point" not in parts
        return "pack-quantized", (rows, columns), bits, parts["weight_scale"].shape[-1], symmetric
    if {"qweight", "qzeros", "scales"} <= set(parts):
        groups, rows = parts["scales"].shape
        words = parts["qweight"].shape
        bits = 32 * parts["qzeros"].shape[1] // rows
        if words[1] == rows:  # GPTQ packs the inputs, AWQ the outputs
            return "gptq", (rows, words[0] * 32 // max(bits, 1)), bits, groups, None
        return "awq", (rows, words[0]), bits, groups, None
    plain = parts.get("weight", parts.get(""))
    if plain is None:
        raise BadInput(f"{short(name)} has no weights, only {', '.join(parts)}; the checkpoint is damaged")
    if plain.dtype == "I8" and "weight_scale" in parts:
        return "int-quantized", plain.shape, 8, parts["weight_scale"].shape[-1], "weight_zero_point" not in parts
    return plain.dtype, plain.shape, _FLOAT_BITS.get(plain.dtype, 8 * plain.bytes // prod(plain.shape)), None, None


def _gguf_modules(path: str) -> tuple[Module, ...]:
    modules = []
    for name, shape, dtype, begin, end in read_gguf_header(path, ()).tensors:
        pattern, layer, _ = pattern_of(name)
        elements, block_bytes = GGML_TYPES[dtype]
        is_plain = elements == 1
        bits = 8 * block_bytes if is_plain else 8 * block_bytes // elements
        group_size = None if is_plain else min(elements, 32)
        role = classify_gguf(pattern)
        modules.append(Module(name, "text", role, layer, dtype, shape, bits, group_size, None, end - begin))
    return tuple(modules)
