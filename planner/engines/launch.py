"""What launch lines share: the name of the checkpoint, shell quoting, JSON for one flag."""

import os
from collections.abc import Iterable

from ...profiles.formats import WeightFormat
from ...profiles.model import Model

# Names under which quantized models were published, by format (Qwen's and NVIDIA's collections, November 2026).
_PUBLISHED = {"fp8": "{repo}-FP8", "gptq-int4-official": "{repo}-GPTQ-Int4", "nvfp4": "nvidia/{base}-NVFP4"}
HEAD_ADDRESS = (
    "<HEAD_NODE_IP>"  # to be replaced: where every box reaches the one that serves; vLLM's guide spells it so
)
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./-_")


def node_address(node: int) -> str:
    """A place holder for the address of a box."""
    return HEAD_ADDRESS if node == 0 else f"<NODE_{node}_IP>"


def base_name(model: Model) -> str:
    """What files made of the model are called by: the last part of its repository, or of the folder where it lies."""
    where = model.repo if model.path is None else os.path.abspath(model.repo)
    base = os.path.basename(where.rstrip("/"))
    return base[: -len(".gguf")] if base.lower().endswith(".gguf") else base


def checkpoint_name(model: Model, fmt: WeightFormat) -> str:
    """What to give an engine as the model: a repository, or the folder that `qwen-quant` writes."""
    if fmt.name in ("bf16", "checkpoint") or fmt.name == model.stored:
        return model.repo
    base = base_name(model)
    if model.path is not None:
        return f"./{base}-{fmt.name}"
    if fmt.releases and fmt.is_released(model):
        return _PUBLISHED[fmt.name].format(repo=model.repo, base=base)
    return f"./{base}-{fmt.name}"


def rope_overrides(model: Model, ctx_tokens: int) -> dict[str, object] | None:
    """Changes to config.json that reach a context, None where it needs none."""
    rope = model.yarn_rope(ctx_tokens)
    if rope is None:
        return None
    return (
        {"rope_parameters": rope} if model.architecture == "qwen3_next" else {"text_config": {"rope_parameters": rope}}
    )


def compact_json(value: object) -> str:
    from json import dumps

    return dumps(value, separators=(",", ":"))


def shell_line(words: Iterable[object]) -> str:
    """Words as one line for a POSIX shell. (`shlex` would do; it costs a plan the import of `re`.)"""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    if word and _PLAIN.issuperset(word):
        return word
    return "'" + word.replace("'", "'\"'\"'") + "'"
