"""The weights of a checkpoint folder, read one module at a time into what the kernels run on.

    checkpoint = open_checkpoint(folder)              # headers only
    checkpoint.has("layers.3.mlp.gate")
    checkpoint.matrix("layers.3.mlp.gate_proj", rows, columns)             # Tensor | QuantizedWeight
    checkpoint.stack("layers.3.mlp.experts.down_proj", experts, rows, columns)
    checkpoint.tensor("layers.3.linear_attn.A_log", (heads,))

Modules are named as all checkpoints of the family name them, without the prefix that differs by class and tool
(`model.`, `model.language_model.`): embed_tokens, norm, layers.0..., lm_head, mtp.... How a module is stored is told
by its own tensors, so folders that mix formats, bits and group sizes need no rules: a plain `weight`; GPTQ or AWQ
(`qweight`, told apart by shape); compressed-tensors (`weight_packed`, or `weight` int8 with `weight_scale`). Of
config.json's quantization_config only that is used which tensors cannot tell: GPTQ version 1 or 2, and the group size
where the last group is shorter. Quantization of activations (W8A8) is not applied: weights are what the file says.

Files are read, never mapped: a plain tensor is read into the memory that it stays in, the tensors of a quantized
module are freed when it is converted. So loading takes the result and about one module: pages of a mapped file would
count as memory of the process until the file is closed. The kernel's page cache keeps a second start fast all the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import path as os_path
from typing import Any

import torch
from torch import Tensor

from ...profiles.checkpoint import StoredTensor, stored_tensors
from ...profiles.json_file import read_json_object, short
from .awq_layout import from_awq
from .compressed_tensors_layout import from_int_quantized, from_pack_quantized
from .gptq_layout import from_gptq
from .packing import QuantizedWeight
from .weight_stack import stack_weights

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
FLOATS = ("BF16", "F16", "F32")
METHODS = ("compressed-tensors", "gptq", "awq")
_WRAPPERS = ("model.", "language_model.", "text_model.")
_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A folder's tensors by their names without prefix, and what its configuration adds to them."""

    folder: str
    tensors: Mapping[str, StoredTensor]
    device: torch.device
    gptq_version: int
    group_size: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, without prefix, as they are stored; the vision tower's begin with `visual.`."""
        return tuple(self.tensors)

    def has(self, module: str) -> bool:
        """Whether there is such a module in any format: a linear, a norm, a stack of experts, or experts one by one."""
        return self._stored_as(module) is not None or self._stored_as(_expert(module, 0)) is not None

    def matrix(self, module: str, rows: int, columns: int) -> Tensor | QuantizedWeight:
        """A linear layer or an embedding [rows, columns] as it is stored: a Tensor where it is not quantized.

        ValueError (here and below), naming module and folder, where it is missing, has another shape, or is in a format
        that the runtime does not have.
        """
        form, what = self._stored_as(module), f"{module} of {self.folder}"
        if form is None:
            raise ValueError(f"{what} is missing; finish the download, or a tool left it out when saving")
        self._refuse_bias(module)
        if form == ".qweight":
            weight = self._qweight(module, what)
        elif form == ".weight_packed":
            weight = self._packed(module, what)
        elif form == ".weight" and self.tensors[module + form].dtype == "I8":
            weight = self._int8(module, what)
        else:
            if module + ".weight_scale" in self.tensors and self.tensors[module + form].dtype in FLOATS:
                raise ValueError(f"{what} has scales beside plain weights: save the checkpoint compressed")
            return self.tensor(module + form, (rows, columns))
        if (weight.rows, weight.columns) != (rows, columns):
            raise ValueError(f"{what} is {weight.rows} x {weight.columns}, but config.json makes it {rows} x {columns}")
        return weight

    def stack(self, module: str, count: int, rows: int, columns: int) -> Tensor | QuantizedWeight:
        """Experts [count, rows, columns]: stored as one tensor, or one by one (`experts.7.down_proj` for
        `experts.down_proj`) and stacked here.
        """
        form = self._stored_as(module)
        if form in ("", ".weight"):
            return self.tensor(module + form, (count, rows, columns))
        what = f"{module} of {self.folder}"
        plain = self.tensors.get(_expert(module, 0) + ".weight")
        if plain is not None and plain.dtype in FLOATS:
            stack = torch.empty(count, rows, columns, dtype=DTYPES[plain.dtype], device=self.device)
            for expert in range(count):
                matrix = self.matrix(_expert(module, expert), rows, columns)
                if isinstance(matrix, QuantizedWeight) or matrix.dtype != stack.dtype:
                    raise ValueError(f"{what}: expert {expert} is not stored as expert 0 is; experts are stored alike")
                stack[expert] = matrix
            return stack
        return stack_weights(self._quantized_experts(module, count, rows, columns, what), count, what)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of floating-point numbers by its whole name, as it is stored."""
        found = self.tensors.get(name)
        if found is None:
            raise ValueError(f"{name} of {self.folder} is missing; finish the download")
        if found.dtype not in FLOATS:
            raise ValueError(
                f"{name} of {self.folder} is stored as {found.dtype}: the native runtime takes plain weights of "
                f"{', '.join(FLOATS)} and integers of 4 and 8 bits, vLLM more"
            )
        if found.shape != shape:
            sizes = list(found.shape)
            raise ValueError(f"{name} of {self.folder} is {short(str(sizes))}, but config.json makes it {list(shape)}")
        return self._read(name)

    def _quantized_experts(
        self, module: str, count: int, rows: int, columns: int, what: str
    ) -> Iterator[QuantizedWeight]:
        for expert in range(count):
            weight = self.matrix(_expert(module, expert), rows, columns)
            if isinstance(weight, Tensor):
                raise ValueError(f"{what}: expert {expert} is not stored as expert 0 is; experts are stored alike")
            yield weight

    def _stored_as(self, module: str) -> str | None:
        """The ending of the tensor that holds a module's weights; "" for a stack, which has none."""
        for ending in (".qweight", ".weight_packed", ".weight", ""):
            if module + ending in self.tensors:
                return ending
        return None

    def _qweight(self, module: str, what: str) -> QuantizedWeight:
        tensors = self._parts(module, what, ("qweight", "qzeros", "scales"), ("g_idx",))
        qweight, scales = tensors["qweight"], tensors["scales"]
        # AWQ packs outputs, GPTQ inputs: so only GPTQ's has as many columns as there are scales.
        if qweight.dim() == scales.dim() == 2 and qweight.shape[1] != scales.shape[1]:
            tensors.pop("g_idx", None)
            return from_awq(**tensors, group_size=self.group_size, what=what)
        return from_gptq(**tensors, version=self.gptq_version, group_size=self.group_size, what=what)

    def _packed(self, module: str, what: str) -> QuantizedWeight:
        optional = ("weight_zero_point", "weight_g_idx")
        tensors = self._parts(module, what, ("weight_packed", "weight_scale", "weight_shape"), optional)
        return from_pack_quantized(**tensors, group_size=self.group_size, what=what)

    def _int8(self, module: str, what: str) -> QuantizedWeight:
        tensors = self._parts(module, what, ("weight", "weight_scale"), ("weight_zero_point", "weight_g_idx"))
        return from_int_quantized(**tensors, group_size=self.group_size, what=what)

    def _parts(self, module: str, what: str, needed: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Tensor]:
        for part in needed:
            if f"{module}.{part}" not in self.tensors:
                raise ValueError(f"{what} has {needed[0]} and no {part}; finish the download")
        present = (*needed, *(part for part in optional if f"{module}.{part}" in self.tensors))
        return {part: self._read(f"{module}.{part}") for part in present}

    def _refuse_bias(self, module: str) -> None:
        """Some tools add a bias of zeros to what they quantize; no released model has any other."""
        name = module + ".bias"
        if name in self.tensors and bool(self.tensor(name, self.tensors[name].shape).any()):
            raise ValueError(f"{name} of {self.folder} is not zero, and the native runtime has no biases: use vLLM")

    def _read(self, name: str) -> Tensor:
        place = self.tensors[name]
        if place.dtype not in DTYPES:
            raise ValueError(f"{name} of {self.folder} is stored as {place.dtype}, which the runtime does not read")
        return read_tensor(place).to(self.device)


def open_checkpoint(folder: str, device: torch.device | str = "cpu") -> Checkpoint:
    """The checkpoint in a folder; its headers are read and checked, its weights are not.

    device: where modules are read to, and converted. ValueError in one sentence for a damaged folder, for two tensors
    that differ by their prefix only, and for quantizations that would be misread (other packings, rotated weights).
    """
    config_path = os_path.join(folder, "config.json")
    data = read_json_object(config_path)
    quantization = _quantization(data, config_path)
    tensors: dict[str, StoredTensor] = {}
    for name, place in stored_tensors(folder).items():
        bare = name
        while bare.startswith(_WRAPPERS):
            bare = bare.partition(".")[2]
        if bare in tensors:
            raise ValueError(f"{folder} holds {short(bare)} twice, under different prefixes; remove one model from it")
        tensors[bare] = place
    group_size = quantization.get("group_size")
    return Checkpoint(
        folder=folder,
        tensors=tensors,
        device=torch.device(device),
        gptq_version=_gptq_version(quantization, config_path),
        group_size=group_size if type(group_size) is int else None,
    )


def read_tensor(place: StoredTensor) -> Tensor:
    """A tensor of one of `DTYPES` on the CPU, read into memory of its own. ValueError where the file ends before it."""
    result = torch.empty(place.shape, dtype=DTYPES[place.dtype])
    if not place.bytes:
        return result
    buffer = result.view(-1).view(torch.uint8).numpy().data
    try:
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.offset_bytes)
            position = 0
            while position < place.bytes:  # Linux reads at most 2 GiB at once
                count = file.readinto(buffer[position:])
                if not count:
                    raise ValueError(f"{place.path} is cut short: it ends inside a tensor; finish the download")
                position += count
    except OSError as error:
        raise ValueError(f"{place.path} cannot be read: {error.strerror}") from error
    return result


def _quantization(data: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """`quantization_config`, or {}. ValueError for what would be loaded and be wrong."""
    text = data.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    config = data.get("quantization_config", inner)
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: quantization_config is {short(config)}, not an object")
    method, version = config.get("quant_method"), config.get("version", "gemm")
    if method not in METHODS:
        raise ValueError(
            f"{path}: quant_method {short(method)} is not {', '.join(METHODS)}, which the runtime loads; use vLLM"
        )
    if method == "awq" and str(version).lower() != "gemm":
        raise ValueError(f"{path}: AWQ weights of version {short(version)} are packed otherwise; save them as gemm")
    if config.get("transform_config"):
        raise ValueError(f"{path}: transform_config rotates activations, which the native runtime does not: use vLLM")
    return config


def _gptq_version(config: Mapping[str, Any], path: str) -> int:
    if config.get("quant_method") != "gptq":
        return 1
    name = config.get("checkpoint_format", config.get("format", "gptq"))
    if name not in _GPTQ_VERSIONS:
        raise ValueError(
            f"{path}: checkpoint_format {short(name)} is not {' or '.join(_GPTQ_VERSIONS)}; save the checkpoint as gptq"
        )
    return _GPTQ_VERSIONS[name]


def _expert(module: str, number: int) -> str:
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{number}.{leaf}"
