"""Which GGML type llama.cpp gives each tensor of a GGUF file: `Q4_K_M` is a mixture, not a type.

Two rules in a row. The converter (llama.cpp `conversion/`) leaves vectors, the convolution and the routers in F32 and
splits Qwen3-Next's fused projection. Then `llama-quantize` (`src/llama-quant.cpp`, `llama_tensor_get_type_impl`,
build b11434) starts from the file type's base and gives some kinds of tensors more, or less, by their place among the
layers. `FILE_TYPES` says so per file type; `gguf_tensors` applies it.

Importance matrix: assumed only where llama-quantize refuses to work without one (IQ1, IQ2, IQ3_XS, IQ3_XXS, Q2_K_S);
with one IQ4 loses its Q5_K in the first eighth of ffn_down, and Q4_0 and Q5_0 gain Q4_1 and Q5_1 there. Files made
early in 2026 do not count attn_qkv as an attn_v (Qwen3.5-27B's IQ4_XS was 3 % smaller, its Q4_K_M the same).
Uploaders' own recipes (UD-, _L and _XL files) are not here.
"""

from collections.abc import Iterator

from .frozen import dataclass
from .ggml import GGML_TYPES
from .model import Model, Tensor

Exceptions = tuple[tuple[str, str], ...]
"""(which layers, type) pairs; the first that applies wins, otherwise the base stays."""


@dataclass(frozen=True, slots=True, eq=False)
class FileType:
    """A file type of llama-quantize: the base and what departs from it, by kind of tensor."""

    base: str
    output: str = "Q6_K"  # lm_head, and the embedding that stands in for it
    embedding: str | None = None  # where there is an lm_head beside it
    value: Exceptions = ()  # attn_v and attn_qkv
    value_few: Exceptions = ()  # the same, where fewer than four query heads share a key-value head
    query: str | None = None
    key: str | None = None
    attention_output: str | None = None
    up: Exceptions = ()  # ffn_gate and ffn_up, of experts too
    down: Exceptions = ()  # ffn_down, of experts too
    experts: str | None = None  # routed experts, whatever the rest says


def _two_bit(base: str, embedding: str, extra: str, attention_output: str | None) -> FileType:
    return FileType(
        base,
        output="Q5_K",
        embedding=embedding,
        value=(("all", "Q4_K"),),
        value_few=(("all", extra),),
        attention_output=attention_output,
        down=(("first eighth of tensors", extra),),
    )


FILE_TYPES: dict[str, FileType] = {
    "F32": FileType("F32", output="F32"),
    "F16": FileType("F16", output="F16"),
    "BF16": FileType("BF16", output="BF16"),
    "Q8_0": FileType("Q8_0", output="Q8_0"),
    "Q6_K": FileType("Q6_K"),
    "Q5_K_M": FileType(
        "Q5_K",
        value=(("more bits", "Q6_K"),),
        value_few=(("more bits", "Q6_K"),),
        down=(("more bits", "Q6_K"),),
    ),
    "Q5_K_S": FileType("Q5_K"),
    "Q5_1": FileType("Q5_1"),
    "Q5_0": FileType("Q5_0"),
    "Q4_K_M": FileType(
        "Q4_K",
        value=(("more bits", "Q6_K"),),
        value_few=(("more bits", "Q6_K"),),
        down=(("more bits", "Q6_K"),),
    ),
    "Q4_K_S": FileType(
        "Q4_K",
        value=(("first four", "Q5_K"),),
        value_few=(("first four", "Q5_K"),),
        down=(("first eighth", "Q5_K"),),
    ),
    "Q4_1": FileType("Q4_1"),
    "Q4_0": FileType("Q4_0"),
    "IQ4_NL": FileType("IQ4_NL", value=(("all", "Q5_K"),), down=(("first eighth", "Q5_K"),)),
    "IQ4_XS": FileType("IQ4_XS", value=(("all", "Q5_K"),), down=(("first eighth", "Q5_K"),)),
    "Q3_K_L": FileType(
        "Q3_K",
        value=(("all", "Q5_K"),),
        value_few=(("all", "Q5_K"),),
        attention_output="Q5_K",
        down=(("all", "Q5_K"),),
    ),
    "Q3_K_M": FileType(
        "Q3_K",
        value=(("first two", "Q5_K"), ("all", "Q4_K")),
        value_few=(("first two", "Q5_K"), ("all", "Q4_K")),
        attention_output="Q4_K",
        down=(("first sixteenth", "Q5_K"), ("all", "Q4_K")),
    ),
    "Q3_K_S": FileType("Q3_K"),
    "IQ3_M": FileType(
        "IQ3_S",
        value=(("all", "Q4_K"),),
        value_few=(("all", "Q4_K"),),
        attention_output="Q4_K",
        down=(("first eighth", "Q4_K"),),
    ),
    "IQ3_S": FileType("IQ3_S", value=(("all", "Q4_K"),)),
    "IQ3_XS": FileType(
        "IQ3_S", value=(("all", "Q4_K"),), query="IQ3_XXS", key="IQ3_XXS", up=(("middle three quarters", "IQ3_XXS"),)
    ),
    "IQ3_XXS": FileType(
        "IQ3_XXS",
        output="Q5_K",
        embedding="IQ3_S",
        value=(("all", "Q4_K"),),
        query="IQ2_S",
        key="IQ2_S",
        attention_output="IQ3_S",
    ),
    "Q2_K": FileType(
        "Q2_K",
        value=(("all", "Q4_K"),),
        value_few=(("all", "Q3_K"),),
        attention_output="Q3_K",
        down=(("all", "Q3_K"),),
    ),
    "Q2_K_S": FileType("Q2_K", value=(("all", "Q4_K"),), down=(("first eighth", "Q4_K"),)),
    "IQ2_M": _two_bit("IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_S": _two_bit("IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_XS": _two_bit("IQ2_XS", "Q2_K", "Q2_K", None),
    "IQ2_XXS": _two_bit("IQ2_XXS", "Q2_K", "Q2_K", None),
    "IQ1_M": _two_bit("IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ1_S": _two_bit("IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"),
    "MXFP4_MOE": FileType("Q8_0", output="Q8_0", experts="MXFP4"),
}

# Where columns are no multiple of the block: types of 256 fall back to types of 32, those to F16
# (`tensor_type_fallback`).
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

_KINDS = {
    "embedding": "embedding",
    "lm_head": "output",
    "norm": "f32",
    "mlp.gate": "f32",
    "shared_expert_gate": "f32",
    "linear_attn.conv1d": "f32",
    "linear_attn.A_log": "f32",
    "linear_attn.dt_bias": "f32",
    "linear_attn.norm": "f32",
    "linear_attn.in_proj_qkv": "value",
    "self_attn.v_proj": "value",
    "self_attn.k_proj": "key",
    "self_attn.q_proj": "query",
    "self_attn.o_proj": "attention_output",
}
for _block in ("mlp", "experts", "shared_expert"):
    _KINDS.update({f"{_block}.{name}": "up" for name in ("gate_proj", "up_proj", "gate_up_proj")})
    _KINDS[f"{_block}.down_proj"] = "down"
_VARYING = frozenset(("up", "down", "value"))


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor:
    """Tensors of one type and shape that a GGUF file makes from one tensor of the checkpoint."""

    source: Tensor
    role: str
    shape: tuple[int, ...]  # row length last; experts that the file merges are still counted by `source.experts`
    layers: tuple[int, ...]  # empty: it occurs once
    type: str


def gguf_tensors(model: Model, file_type: str, mtp: bool = False) -> Iterator[GgufTensor]:
    """Everything that a GGUF of that file type holds, and the block of multi-token prediction and the mmproj besides.

    `mtp`: the file keeps the block of multi-token prediction, which makes one more layer to count (the converter's
    default since it knows that block; llama.cpp has none for Qwen3-Next). The vision tower is a file of its own, always
    in F16. `KeyError` for a file type that is not in `FILE_TYPES`.
    """
    rules = FILE_TYPES[file_type]
    text_layers = model.num_layers
    all_layers = text_layers + model.mtp_num_hidden_layers
    counted = all_layers if mtp else text_layers
    for tensor in model.unquantized:
        if tensor.part == "vision":
            yield GgufTensor(tensor, tensor.role, tensor.shape, tensor.layers, _mmproj_type(tensor))
        elif tensor.part == "text":
            for role, shape in _converted(tensor, model):
                yield from _typed(tensor, role, shape, rules, model, 0, counted)
        elif model.architecture != "qwen3_next":
            yield from _typed(tensor, tensor.role, tensor.shape, rules, model, text_layers, all_layers)


def _converted(tensor: Tensor, model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    if tensor.role != "linear_attn.in_proj_qkvz":
        yield tensor.role, tensor.shape
        return
    rows, columns = tensor.shape
    yield "linear_attn.in_proj_qkv", (model.conv_dim, columns)
    yield "linear_attn.in_proj_z", (rows - model.conv_dim, columns)


def _typed(
    source: Tensor, role: str, shape: tuple[int, ...], rules: FileType, model: Model, first_layer: int, num_layers: int
) -> Iterator[GgufTensor]:
    if not _varies(role, rules, model):
        kind = _fallback(_type_of(role, rules, model, first_layer, num_layers), shape[-1])
        yield GgufTensor(source, role, shape, source.layers, kind)
        return
    by_type: dict[str, list[int]] = {}
    for layer in source.layers or (0,):
        kind = _fallback(_type_of(role, rules, model, first_layer + layer, num_layers), shape[-1])
        by_type.setdefault(kind, []).append(layer)
    for kind, layers in by_type.items():
        yield GgufTensor(source, role, shape, tuple(layers) if source.layers else (), kind)


def _varies(role: str, rules: FileType, model: Model) -> bool:
    """Whether some layers may have that tensor in another type than others."""
    kind = _KINDS.get(role)
    return kind in _VARYING and bool(_exceptions(kind, rules, model))


def _exceptions(kind: str, rules: FileType, model: Model) -> Exceptions:
    if kind == "value":
        shared = model.num_attention_heads // model.num_key_value_heads
        return rules.value if shared >= 4 else rules.value_few
    return rules.up if kind == "up" else rules.down


def _type_of(role: str, rules: FileType, model: Model, layer: int, num_layers: int) -> str:
    kind = _KINDS.get(role)
    if kind is None:  # attn_gate, ssm_alpha, ssm_beta, ssm_out, nextn.eh_proj
        return rules.base
    if kind == "f32":
        return "F32"
    if kind == "output" or (kind == "embedding" and model.tie_word_embeddings):
        return rules.output
    if kind == "embedding":
        return rules.embedding or rules.base
    if rules.experts and role.startswith("experts."):
        return rules.experts
    if kind in _VARYING:
        for where, type_name in _exceptions(kind, rules, model):
            if _holds(where, role, layer, num_layers, model.is_moe):
                return type_name
        return rules.base
    named = {"query": rules.query, "key": rules.key, "attention_output": rules.attention_output}[kind]
    return named or rules.base


def _holds(where: str, role: str, layer: int, num_layers: int, is_moe: bool) -> bool:
    """Every layer has one attn_v or attn_qkv, so their count in file order is the layer's number."""
    if where == "all":
        return True
    if where == "more bits":
        eighth = num_layers // 8
        return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
    if where == "first eighth":
        return layer < num_layers // 8
    if where == "first sixteenth":
        return layer < num_layers // 16
    if where == "first two":
        return layer < 2
    if where == "first four":
        return layer < 4
    if where == "middle three quarters":
        return num_layers // 8 <= layer < 7 * num_layers // 8
    # "first eighth of tensors": two ffn_down per layer with experts, routed before shared, and each is counted
    place = 2 * layer + role.startswith("shared_expert.") if is_moe else layer
    return place < num_layers // 8


def _fallback(type_name: str, columns: int) -> str:
    if columns % GGML_TYPES[type_name][0] == 0:
        return type_name
    type_name = _FALLBACK.get(type_name, "IQ4_NL" if type_name.startswith("IQ") else "F16")
    return type_name if columns % GGML_TYPES[type_name][0] == 0 else "F16"


def _mmproj_type(tensor: Tensor) -> str:
    """Vectors and position embeddings F32, the rest F16 (llama.cpp `conversion/base.py`, `--mmproj` with F16)."""
    return "F32" if len(tensor.shape) < 2 or tensor.role == "vision.pos_embed" else "F16"
