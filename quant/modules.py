"""The matrices of a checkpoint that may be quantized, and which of them read the same input.

    layer of linear attention   input -> in_proj_qkv, in_proj_z (and in_proj_a, in_proj_b, never quantized)
                                core  -> out_proj
    layer of full attention     input -> q_proj, k_proj, v_proj;  core -> o_proj
    dense MLP                   middle -> gate_proj, up_proj;     inner -> down_proj
    experts                     middle -> every expert's gate and up, and the shared expert's; inner -> its down

Stacks of experts ([E, 2 I, H] and [E, H, I] in one tensor, as Qwen3.5 releases them) are modules one by one here, as
quantized files have them (`experts.7.gate_proj`); gate is the first half of a stack's rows.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..profiles.errors import Unsupported
from .source import Source

# What a layer's stage is called -> the leaves that read it, without `.weight`.
STAGES: dict[str, tuple[str, ...]] = {
    "input": (
        *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_qkvz"),
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    "core": ("linear_attn.out_proj", "self_attn.o_proj"),
    "middle": ("mlp.gate_proj", "mlp.up_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "inner": ("mlp.down_proj", "mlp.shared_expert.down_proj"),
}
LEAVES = {leaf for leaves in STAGES.values() for leaf in leaves}
EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"(.*\blayers\.(\d+)\.)(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class Module:
    """A matrix [rows, columns] of the source, in `tensor`, from row `first_row` of expert `expert` of it on.

    name: the full name that a quantized file gives it, without an ending. part: "layers", "shared_experts", "experts",
    "mtp", "lm_head" or "embeddings". layer: its number; None for the last three. leaf: what comes behind `layers.N.`.
    expert: None where it is none; where `tensor` is a stack, its first index.
    """

    name: str
    tensor: str
    rows: int
    columns: int
    part: str
    layer: int | None
    leaf: str
    expert: int | None = None
    first_row: int = 0


def list_modules(source: Source) -> list[Module]:
    """Every matrix of the text model, its prediction layer and its head that some recipe may quantize, in file
    order."""
    return [module for name in source.names() for module in _modules_of(source, name)]


def _modules_of(source: Source, name: str) -> Iterator[Module]:
    shape = source.shape(name)
    bare = name.removesuffix(".weight")
    if bare == "lm_head" or bare.endswith(".lm_head"):
        yield Module(bare, name, *shape, part="lm_head", layer=None, leaf="lm_head")
        return
    if bare.endswith("embed_tokens") and len(shape) == 2:
        yield Module(bare, name, *shape, part="embeddings", layer=None, leaf="embed_tokens")
        return
    match = _LAYER.fullmatch(bare)
    if match is None or "visual." in name:
        if bare in ("mtp.fc",):
            yield Module(bare, name, *shape, part="mtp", layer=None, leaf="fc")
        return
    prefix, number, leaf = match[1], int(match[2]), match[3]
    is_mtp = name.startswith("mtp.") or ".mtp." in name
    layer = None if is_mtp else number
    if leaf in LEAVES and len(shape) == 2:
        part = "mtp" if is_mtp else "shared_experts" if "shared_expert" in leaf else "layers"
        yield Module(bare, name, *shape, part=part, layer=layer, leaf=leaf)
    elif (expert := _EXPERT.fullmatch(leaf)) and len(shape) == 2:
        yield Module(
            bare, name, *shape, part="mtp" if is_mtp else "experts", layer=layer, leaf=leaf, expert=int(expert[1])
        )
    elif leaf in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        yield from _stacked(name, prefix, leaf, shape, "mtp" if is_mtp else "experts", layer)


def _stacked(
    name: str, prefix: str, leaf: str, shape: tuple[int, ...], part: str, layer: int | None
) -> Iterator[Module]:
    if len(shape) != 3 or (leaf.endswith("gate_up_proj") and shape[1] % 2):
        raise Unsupported(f"{name} is {list(shape)}: a stack of experts has three dimensions, gate and up of one size")
    count, rows, columns = shape
    for expert in range(count):
        parts = (("down_proj", 0, rows),)
        if leaf.endswith("gate_up_proj"):
            parts = (("gate_proj", 0, rows // 2), ("up_proj", rows // 2, rows // 2))
        for own, first, size in parts:
            full = f"mlp.experts.{expert}.{own}"
            yield Module(prefix + full, name, size, columns, part, layer, full, expert, first)
