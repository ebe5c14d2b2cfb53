"""The catalog of models (`models.json`) and the way from what a person types to one of them, or to a path.

`models.json` is both source and product: plain JSON that needs no compiling. A new model is one more entry: its
config.json's own field names, `aliases` (other names of the same weights), `stored` (repositories of the same model
in a format of ours) and `layout` (`tensors.Layout`: how its checkpoint names and types the tensors).
"""

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .errors import BadInput, UnknownName
from .frozen import replace
from .model import Model, Vision
from .tensors import Layout, layer_kinds, tensor_list

_FIELDS = (
    "name",
    "repo",
    "architecture",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "vocab_size",
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "mtp_num_hidden_layers",
    "mamba_ssm_dtype",
    "rope",
    "source",
)
_SEPARATORS = str.maketrans(":_ ", "---")
_PATH_ENDINGS = (".json", ".gguf", ".safetensors", ".bin", ".pt", ".pth")


def model(name_or_path: str) -> Model:
    """The model of that name (one object per name), or the one in that folder, config.json or GGUF file.

    A catalog name comes before a file of the same name; `./9b` is always a path. `UnknownName` for a name that is
    neither, `BadInput` for a path that is not there or cannot be used, `Unsupported` for another architecture.
    """
    key = name_or_path.strip().lower()
    known = _keys()
    place = _place(key)
    if place:
        return _named(*place)
    path = os.path.expanduser(name_or_path)
    if path and os.path.exists(path):
        return _read(path, _fingerprint(path))
    from .names import did_you_mean, quote

    if _looks_like_path(name_or_path):
        raise BadInput(
            f"{quote(name_or_path)} is neither a file nor a folder; give a checkpoint folder, a config.json or a .gguf"
        )
    hint = did_you_mean(key, known)
    raise UnknownName(f"no model is called {quote(name_or_path)}; {hint}`qwen-plan models` lists them")


def is_name(text: str) -> bool:
    """Whether the catalog has that name: nothing is looked for on the disk."""
    return _place(text.strip().lower()) is not None


def _place(key: str) -> Any:
    # Ollama's qwen3.5:9b and the spelling with spaces are the same name.
    return _keys().get(key) or _keys().get(key.translate(_SEPARATORS))


@lru_cache(maxsize=1)
def models() -> tuple[Model, ...]:
    """The catalog, in its order."""
    return tuple(_named(number, None, None) for number in range(len(_entries())))


@lru_cache(maxsize=1)
def _entries() -> list[dict[str, Any]]:
    with open(os.path.join(os.path.dirname(__file__), "models.json"), "rb") as file:
        return json.load(file)


@lru_cache(maxsize=1)
def _keys() -> Mapping[str, tuple[int, str | None, str | None]]:
    """Every spelling in lower case -> (number of the entry, format it is stored in, repository of that format)."""
    keys: dict[str, tuple[int, str | None, str | None]] = {}
    for number, entry in enumerate(_entries()):
        spellings = {entry["name"]: None, entry["repo"]: None, **dict.fromkeys(entry["aliases"]), **entry["stored"]}
        for spelling, stored in spellings.items():
            place = (number, stored, spelling if "/" in spelling else None)
            keys[spelling.lower()] = place
            keys.setdefault(spelling.lower().rpartition("/")[2], place)
    return keys


@lru_cache(maxsize=256)
def _named(number: int, stored: str | None, repo: str | None) -> Model:
    entry = _entries()[number]
    if stored:
        from .formats import checkpoint_bytes, weight_format

        plain = _named(number, None, None)
        return replace(plain, stored=stored, repo=repo, release_bytes=checkpoint_bytes(plain, weight_format(stored)))
    if repo not in (None, entry["repo"]):
        return replace(_named(number, None, None), repo=repo)
    if repo:
        return _named(number, None, None)
    bare = Model(
        layer_types=layer_kinds(entry["num_hidden_layers"], entry["full_attention_interval"]),
        vision=Vision(**entry["vision"]) if entry["vision"] else None,
        tensors=(),
        stored=None,
        **{field: entry[field] for field in _FIELDS},
    )
    return replace(bare, tensors=tensor_list(bare, Layout(**entry["layout"])))


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~", "\\"))
        or text.count("/") > 1
        or "\\" in text
        or text.lower().endswith(_PATH_ENDINGS)
    )


def _fingerprint(path: str) -> tuple[object, ...]:
    """Changes when the file, or a file of the folder, does."""
    if os.path.isdir(path):
        try:
            with os.scandir(path) as entries:
                found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            raise BadInput(f"{path} cannot be listed: {error.strerror}") from error
        return os.path.abspath(path), *sorted((name, status.st_mtime_ns, status.st_size) for name, status in found)
    status = os.stat(path)
    return os.path.abspath(path), status.st_mtime_ns, status.st_size


@lru_cache(maxsize=16)
def _read(path: str, _fingerprint: tuple[object, ...]) -> Model:
    if os.path.isdir(path):
        from .checkpoint import read_folder

        return read_folder(path)
    if path.lower().endswith(".gguf"):
        from .gguf_model import read_gguf

        return read_gguf(path)
    if path.lower().endswith(".json"):
        from .config import read_config

        return read_config(path).model()
    raise BadInput(f"{path} is not a model; give the checkpoint's folder, its config.json or a .gguf file")
