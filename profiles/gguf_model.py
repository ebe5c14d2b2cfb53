"""A GGUF file, or the first of a split one, as a Model: dimensions from its metadata, tensors from its records.

llama.cpp keeps vision in a second file (mmproj), so these models have none. Of Qwen3.5's MTP layers those are here
that the converter kept: blocks from block_count - nextn_predict_layers on (llama.cpp b11434 `src/llama-model.cpp`).
Which layers attend fully is told by their tensors.
"""

import os
import re
from collections.abc import Mapping

from .errors import BadInput, Unsupported
from .frozen import replace
from .gguf_header import GgufHeader, GgufTensor, Value, read_gguf_header
from .json_file import short
from .model import Model, Tensor
from .roles import classify_gguf, pattern_of
from .tensors import Layout, tensor_list

_ARCHITECTURES = {"qwen35": "qwen3_5", "qwen35moe": "qwen3_5_moe", "qwen3next": "qwen3_next"}
# Key after the architecture's name -> smallest and largest value.
_NUMBERS = {
    "block_count": (1, 1040),
    "nextn_predict_layers": (0, 16),
    "context_length": (1, 1 << 31),
    "embedding_length": (1, 1 << 20),
    "feed_forward_length": (0, 1 << 20),
    "attention.head_count": (1, 4096),
    "attention.head_count_kv": (1, 4096),
    "attention.key_length": (1, 4096),
    "expert_count": (0, 65536),
    "expert_used_count": (0, 65536),
    "expert_feed_forward_length": (0, 1 << 20),
    "expert_shared_feed_forward_length": (0, 1 << 20),
    "ssm.conv_kernel": (1, 64),
    "ssm.state_size": (1, 4096),
    "ssm.group_count": (1, 4096),
    "ssm.time_step_rank": (1, 4096),
    "ssm.inner_size": (1, 1 << 24),
}
_OPTIONAL = {"nextn_predict_layers", "feed_forward_length", "expert_count", "expert_used_count"}
_OPTIONAL |= {"expert_feed_forward_length", "expert_shared_feed_forward_length"}
_GENERAL = {"general.architecture", "general.file_type", "split.no", "split.count"}
_SPLIT = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL | re.IGNORECASE)


def read_gguf(path: str) -> Model:
    """The model in a GGUF file; in all parts of a split one when given the first.

    `BadInput` names file and key or tensor; `Unsupported` the architecture found and those that qwenfit takes.
    """
    wanted = _GENERAL | {f"{name}.{key}" for name in _ARCHITECTURES for key in (*_NUMBERS, "rope.freq_base")}
    header = read_gguf_header(path, wanted)
    found = header.metadata.get("general.architecture")
    split = header.metadata.get("split.count", 0)
    if split and header.metadata.get("split.no", 0) != 0:
        raise BadInput(f"{path} is a later part of a split GGUF; give the part whose name has -00001-of-")
    if not isinstance(found, str):
        raise BadInput(f"{path}: general.architecture is missing")
    if found not in _ARCHITECTURES:
        raise Unsupported(f"{path} is a GGUF of architecture {short(found)}; qwenfit takes {', '.join(_ARCHITECTURES)}")
    tensors = list(header.tensors)
    for part in _later_parts(path, split):
        tensors += read_gguf_header(part, _GENERAL).tensors
    return _model(header, tensors, found)


def _later_parts(path: str, count: Value) -> list[str]:
    match = _SPLIT.fullmatch(path)
    if not isinstance(count, int) or count <= 1:
        return []
    if match is None or int(match[3]) != count or int(match[2]) != 1:
        raise BadInput(f"{path} is the first of {count} parts, so its name should end in -00001-of-{count:05}.gguf")
    parts = [f"{match[1]}-{number:05}-of-{match[3]}{path[-5:]}" for number in range(2, count + 1)]
    for part in parts:
        if not os.path.exists(part):
            raise BadInput(f"{part} is missing, one of the {count} parts of {path}; finish the download")
    return parts


def _model(header: GgufHeader, tensors: list[GgufTensor], name: str) -> Model:
    path = header.path
    numbers = {key: _number(header, f"{name}.{key}", *bounds) for key, bounds in _NUMBERS.items()}
    mtp = numbers["nextn_predict_layers"]
    num_layers = numbers["block_count"] - mtp
    if num_layers < 1:
        raise BadInput(f"{path}: {name}.nextn_predict_layers leaves no layer of {name}.block_count")
    value_dim, rest = divmod(numbers["ssm.inner_size"], numbers["ssm.time_step_rank"])
    if rest:
        raise BadInput(f"{path}: {name}.ssm.inner_size is no multiple of {name}.ssm.time_step_rank")
    if numbers["attention.head_count"] % numbers["attention.head_count_kv"]:
        raise BadInput(f"{path}: {name}.attention.head_count is no multiple of {name}.attention.head_count_kv")
    if numbers["ssm.time_step_rank"] % numbers["ssm.group_count"]:
        raise BadInput(f"{path}: {name}.ssm.time_step_rank is no multiple of {name}.ssm.group_count")
    is_moe = name != "qwen35"
    if is_moe and not 1 <= numbers["expert_used_count"] <= numbers["expert_count"]:
        raise BadInput(f"{path}: {name}.expert_used_count is not between 1 and {name}.expert_count")
    for key in (
        ("expert_feed_forward_length", "expert_shared_feed_forward_length") if is_moe else ("feed_forward_length",)
    ):
        if not numbers[key]:
            raise BadInput(f"{path}: {name}.{key} is missing")
    entries = _aggregate(tensors, num_layers, path)
    embedding = next((tensor for tensor in entries if tensor.role == "embedding" and tensor.part == "text"), None)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != numbers["embedding_length"]:
        raise BadInput(f"{path}: token_embd.weight is missing or its rows are not {name}.embedding_length long")
    frequency = header.metadata.get(f"{name}.rope.freq_base")
    file_type = header.metadata.get("general.file_type")
    layer_types, dense_layers = _layer_types(entries, num_layers, is_moe, path)
    model = Model(
        name=os.path.basename(path)[: -len(".gguf")].lower(),
        repo=path,
        architecture=_ARCHITECTURES[name],
        hidden_size=numbers["embedding_length"],
        layer_types=layer_types,
        num_attention_heads=numbers["attention.head_count"],
        num_key_value_heads=numbers["attention.head_count_kv"],
        head_dim=numbers["attention.key_length"],
        linear_num_key_heads=numbers["ssm.group_count"],
        linear_num_value_heads=numbers["ssm.time_step_rank"],
        linear_key_head_dim=numbers["ssm.state_size"],
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=numbers["ssm.conv_kernel"],
        vocab_size=embedding.shape[0],
        intermediate_size=0 if is_moe and not dense_layers else numbers["feed_forward_length"],
        num_experts=numbers["expert_count"] if is_moe else 0,
        num_experts_per_tok=numbers["expert_used_count"] if is_moe else 0,
        moe_intermediate_size=numbers["expert_feed_forward_length"] if is_moe else 0,
        shared_expert_intermediate_size=numbers["expert_shared_feed_forward_length"] if is_moe else 0,
        max_position_embeddings=numbers["context_length"],
        tie_word_embeddings=not any(tensor.role == "lm_head" and tensor.part == "text" for tensor in entries),
        mtp_num_hidden_layers=len({layer for tensor in entries if tensor.part == "mtp" for layer in tensor.layers}),
        mamba_ssm_dtype="float32",
        vision=None,
        tensors=entries,
        stored="checkpoint",
        source=f"GGUF header of {path}",
        path=path,
        rope={"rope_theta": frequency} if isinstance(frequency, float) else {},
        quantization={"method": "gguf", **({"file_type": file_type} if isinstance(file_type, int) else {})},
    )
    layout = Layout(fused_gdn_projections=name == "qwen3next", dense_layers=dense_layers)
    return replace(model, original=tensor_list(model, layout))


def _number(header: GgufHeader, key: str, low: int, high: int) -> int:
    value: Value | None = header.metadata.get(key)
    if isinstance(value, tuple):
        # One number per layer, 0 where a layer has none of it: what the other layers share.
        shared = set(value) - {0}
        value = shared.pop() if len(shared) == 1 else value
    if value is None and key.partition(".")[2] in _OPTIONAL:
        return 0
    if value is None:
        raise BadInput(f"{header.path}: {key} is missing")
    if type(value) is not int or not low <= value <= high:
        raise BadInput(f"{header.path}: {key} is {short(value)}, not a number from {low} to {high}")
    return value


def _aggregate(tensors: list[GgufTensor], num_layers: int, path: str) -> tuple[Tensor, ...]:
    groups: dict[tuple[str, str, tuple[int, ...], str], list[int]] = {}
    names: set[str] = set()
    for name, shape, dtype, *_ in tensors:
        if name in names or "{" in name:
            raise BadInput(f"{path}: tensor {short(name)} is there twice or has no name for a tensor")
        names.add(name)
        pattern, layer, _ = pattern_of(name)
        part = "text" if layer is None or layer < num_layers else "mtp"
        groups.setdefault((pattern, dtype, shape, part), []).extend([] if layer is None else [layer])
    return tuple(
        Tensor(pattern, shape, dtype, part, classify_gguf(pattern), tuple(sorted(layers)))
        for (pattern, dtype, shape, part), layers in groups.items()
    )


def _layer_types(
    tensors: tuple[Tensor, ...], num_layers: int, is_moe: bool, path: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(the kind of each layer, the layers of a mixture-of-experts model that have a plain MLP)."""
    layers: Mapping[str, set[int]] = {"linear_attn.": set(), "self_attn.": set(), "mlp.down_proj": set()}
    for tensor in tensors:
        if tensor.part == "text":
            for role, found in layers.items():
                if tensor.role.startswith(role):
                    found.update(tensor.layers)
    linear, full = layers["linear_attn."], layers["self_attn."]
    for layer in range(num_layers):
        if (layer in linear) == (layer in full):
            fault = "both kinds of attention" if layer in linear else "no attention"
            raise BadInput(f"{path}: block {layer} has the tensors of {fault}; is a part of the file missing?")
    if not linear or not full:
        raise BadInput(f"{path} has only one kind of attention, and every model of the family has both")
    kinds = tuple("full_attention" if layer in full else "linear_attention" for layer in range(num_layers))
    return kinds, tuple(sorted(layers["mlp.down_proj"])) if is_moe else ()
