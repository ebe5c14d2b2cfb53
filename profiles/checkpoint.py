"""A checkpoint folder as a Model: dimensions from config.json, tensors with real shapes and dtypes from safetensors
headers.

Shards are found as loaders find them: by `model.safetensors.index.json`, else `model.safetensors`, else every
`*.safetensors` that is no adapter. Shard names are free (Qwen's own are
`model.safetensors-00001-of-00004.safetensors`), but must be plain file names. They may be symbolic links to regular
files: that is what the Hugging Face cache consists of.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from .config import Config, read_config
from .errors import BadInput, Unsupported
from .frozen import replace
from .json_file import read_json_object, short
from .model import Model, Tensor
from .roles import classify, pattern_of
from .safetensors_header import HeaderTensor, SafetensorsHeader, read_safetensors_header
from .tensors import tensor_list

# The index of Qwen3.5-397B-A17B-GPTQ-Int4 names 370,000 tensors in some 45 MB.
_INDEX_LIMIT_BYTES = 128 << 20
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class StoredTensor(NamedTuple):
    """One tensor of a folder: `bytes` of its file from `offset_bytes` on, little-endian, row by row."""

    path: str
    offset_bytes: int
    bytes: int
    dtype: str  # as safetensors names it: BF16, F32, I32, ...
    shape: tuple[int, ...]


def stored_tensors(path: str) -> dict[str, StoredTensor]:
    """Where every tensor of a checkpoint folder lies, by its name in the file. `BadInput` as `read_folder`."""
    try:
        files = sorted(os.listdir(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be listed: {error.strerror}") from error
    return {
        tensor.name: StoredTensor(
            header.path, header.data_start + tensor.begin, tensor.end - tensor.begin, tensor.dtype, tensor.shape
        )
        for header, tensor in _read(path, _shards(path, files))
    }


def read_folder(path: str) -> Model:
    """The model in a folder. Without weights in it, what config.json alone says."""
    try:
        files = sorted(os.listdir(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be listed: {error.strerror}") from error
    gguf = [name for name in files if name.lower().endswith(".gguf")]
    if "config.json" not in files:
        hint = f"give {os.path.join(path, gguf[0])}" if gguf else "give a checkpoint's folder"
        raise BadInput(f"{path} has no config.json; {hint}")
    config = read_config(os.path.join(path, "config.json"), path)
    shards = _shards(path, files)
    if not shards:
        pickles = [name for name in files if name.lower().endswith(_PICKLES)]
        if pickles:
            raise Unsupported(
                f"{os.path.join(path, pickles[0])} is a pickle, which qwenfit never opens; "
                "convert the checkpoint to safetensors"
            )
        if gguf:
            raise BadInput(f"{path} has GGUF files and no safetensors; give {os.path.join(path, gguf[0])}")
        return _with_processor_limits(config.model(), path, files)
    tensors = aggregate(tensor for _, tensor in _read(path, shards))
    return _with_processor_limits(_from_tensors(config, tensors, path), path, files)


def aggregate(found: Iterable[HeaderTensor]) -> tuple[Tensor, ...]:
    """One Tensor per name pattern, shape and dtype, in the order in which they come first."""
    groups: dict[tuple[str, str, tuple[int, ...]], dict[int | None, list[int | None]]] = {}
    for name, dtype, shape, *_ in found:
        pattern, layer, expert = pattern_of(name)
        groups.setdefault((pattern, dtype, shape), {}).setdefault(layer, []).append(expert)
    tensors: list[Tensor] = []
    for (pattern, dtype, shape), places in groups.items():
        part, role = classify(pattern)
        # Layers with the same experts go together; experts other than 0 ... n - 1 keep their numbers in the name.
        by_experts: dict[tuple[int | None, ...], list[int]] = {}
        for layer, experts in places.items():
            key = tuple(sorted(experts, key=lambda expert: expert or 0))
            by_experts.setdefault(key, []).extend([] if layer is None else [layer])
        for experts, layers in by_experts.items():
            numbers = tuple(sorted(layers))
            if experts == (None,):
                tensors.append(Tensor(pattern, shape, dtype, part, role, numbers))
            elif experts == tuple(range(len(experts))):
                tensors.append(Tensor(pattern, shape, dtype, part, role, numbers, len(experts)))
            else:
                for expert in experts:
                    name = pattern.replace("{expert}", str(expert))
                    tensors.append(Tensor(name, shape, dtype, part, role, numbers))
    return tuple(tensors)


def _shards(path: str, files: list[str]) -> dict[str, set[str] | None]:
    """File name -> the tensors that count there (None: all)."""
    if _INDEX in files:
        return _indexed(path, files)
    if "model.safetensors" in files:
        return {"model.safetensors": None}
    return dict.fromkeys(name for name in files if name.endswith(".safetensors") and not name.startswith("adapter_"))


def _indexed(path: str, files: list[str]) -> dict[str, set[str] | None]:
    index_path = os.path.join(path, _INDEX)
    weight_map: Any = read_json_object(index_path, _INDEX_LIMIT_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index_path}: weight_map is not an object of tensor names and file names")
    shards: dict[str, set[str] | None] = {}
    present = set(files)
    names: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise BadInput(f"{index_path}: weight_map places {short(name)} in {short(shard)}, not in a file")
        names.setdefault(shard, set()).add(name)
    for shard in sorted(names):
        if not shard.endswith(".safetensors") or os.path.basename(shard) != shard or "\\" in shard:
            raise BadInput(f"{index_path}: weight_map names {short(shard)}, which is no safetensors file of the folder")
        if shard not in present:
            raise BadInput(f"{path} lacks {short(shard)}, which {_INDEX} names; finish the download")
        shards[shard] = names[shard]
    return shards


def _read(path: str, shards: dict[str, set[str] | None]) -> Iterable[tuple[SafetensorsHeader, HeaderTensor]]:
    """The tensors of all shards, each once, with the header that it stands in."""
    home: dict[str, str] = {}
    listed = {name for indexed in shards.values() if indexed for name in indexed}
    for shard, indexed in shards.items():
        shard_path = os.path.join(path, shard)
        header = read_safetensors_header(shard_path)
        missing = (indexed or set()) - {tensor.name for tensor in header.tensors}
        if missing:
            raise BadInput(f"{shard_path} lacks the tensor {short(min(missing))}, which {_INDEX} places there")
        for tensor in header.tensors:
            name = tensor.name
            if "{" in name or "}" in name:
                raise BadInput(f"{shard_path}: {short(name)} is no name for a tensor")
            if indexed is not None and name not in indexed and name in listed:
                continue  # a second copy: loaders take the one that the index names
            if name in home:
                raise BadInput(f"tensor {short(name)} is in both {shard_path} and {os.path.join(path, home[name])}")
            home[name] = shard
            yield header, tensor


def _from_tensors(config: Config, tensors: tuple[Tensor, ...], path: str) -> Model:
    """The model with `tensors` as they are stored, and only the parts that the folder really holds."""
    tied = not any(tensor.role == "lm_head" and tensor.part == "text" for tensor in tensors)
    if tied and config.tie_word_embeddings is False:
        raise BadInput(f"{path} has no lm_head, though config.json says tie_word_embeddings false; a shard is missing")
    mtp_layers = {layer for tensor in tensors if tensor.part == "mtp" for layer in tensor.layers}
    dimensions = replace(
        config,
        tie_word_embeddings=config.tie_word_embeddings or tied,
        mtp_num_hidden_layers=len(mtp_layers),
        vision=config.vision if any(tensor.part == "vision" for tensor in tensors) else None,
    )
    model = dimensions.model(with_weights=True)
    _check_against_config(model, tensors, path)
    return replace(
        model,
        tensors=tensors,
        stored="checkpoint",
        original=tensor_list(model, dimensions.layout),
        source=f"config.json and safetensors headers in {path}",
    )


def _check_against_config(model: Model, tensors: tuple[Tensor, ...], path: str) -> None:
    kinds: dict[str, set[int]] = {"linear_attn.": set(), "self_attn.": set()}
    for tensor in tensors:
        if tensor.part != "text":
            continue
        if tensor.layers and tensor.layers[-1] >= model.num_layers:
            raise BadInput(f"{path} holds layer {tensor.layers[-1]}, but config.json has {model.num_layers} layers")
        for kind, layers in kinds.items():
            if tensor.role.startswith(kind):
                layers.update(tensor.layers)
        # Its scales have its role too, and an MLX folder keeps them in bf16.
        if tensor.name.endswith("embed_tokens.weight") and tensor.dtype in ("BF16", "F16", "F32"):
            expected = (model.vocab_size, model.hidden_size)
            if tensor.shape != expected:
                raise BadInput(
                    f"{path}: {tensor.name} is {short(str(list(tensor.shape)))}, "
                    f"but config.json's vocab_size and hidden_size make it {list(expected)}"
                )
    for layer, kind in enumerate(model.layer_types):
        expected, other = (
            ("linear_attn.", "self_attn.") if kind == "linear_attention" else ("self_attn.", "linear_attn.")
        )
        if layer in kinds[other]:
            raise BadInput(f"{path}: layer {layer} holds {other}* tensors, but config.json makes it {kind}")
        if layer not in kinds[expected]:
            raise BadInput(f"{path} holds no {expected}* tensors of layer {layer}; a shard is missing")


def _with_processor_limits(model: Model, path: str, files: list[str]) -> Model:
    """The largest image and video as the folder's preprocessor files allow them, where it has such files."""
    vision = model.vision
    if vision is None:
        return model
    pixels_per_token = (vision.patch_size * vision.spatial_merge_size) ** 2
    image = _longest_edge(path, files, "preprocessor_config.json")
    video = _longest_edge(path, files, "video_preprocessor_config.json")
    limits = {}
    if image:
        limits["max_image_tokens"] = max(1, image // pixels_per_token)
    if video:
        limits["max_video_tokens"] = max(1, video // (pixels_per_token * vision.temporal_patch_size))
    return replace(model, vision=replace(vision, **limits)) if limits else model


def _longest_edge(path: str, files: list[str], name: str) -> int | None:
    """`size.longest_edge`: despite its name a number of pixels, width times height (times frames)."""
    if name not in files:
        return None
    size = read_json_object(os.path.join(path, name)).get("size")
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if edge is None:
        return None
    if type(edge) is not int or not 0 < edge <= 1 << 40:
        raise BadInput(f"{os.path.join(path, name)}: size.longest_edge is {short(edge)}, not a number of pixels")
    return edge
