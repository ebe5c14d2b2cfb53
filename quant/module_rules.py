"""Which modules a configuration means: rules that match the names of the files and the names of the engines.

vLLM and SGLang fuse neighbours (in_proj_qkv and in_proj_z into in_proj_qkvz, ...) and look rules up by the fused name;
transformers knows the unfused ones only. So every rule here is a regular expression that matches both, and modules that
are fused somewhere have one scheme (vLLM 0.32 `compressed_tensors/utils.py` should_ignore_layer and
`auto_gptq.py` get_linear_quant_method refuse anything else; all projections of a layer's experts count as fused:
`compressed_tensors_moe.py` get_moe_method). Prefixes differ by class and engine (`model.language_model.layers.0`,
`language_model.model.layers.0`), so rules begin with `.*` and name the layers by number.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from .quantized import Scheme

# Never quantized, whatever the recipe: state and gates of the DeltaNet, routers; and parts that are kept as a whole.
KEPT = (
    r".*in_proj_(a|b|ba)$",
    r".*conv1d$",
    r".*mlp\.gate$",
    r".*shared_expert_gate$",
    r".*visual.*",
    r".*mtp.*",
    r".*embed_tokens$",
)
# What is fused -> the leaf of a rule that matches the parts and the whole.
_LEAVES = {
    "linear_attn.in_proj_qkv": r"linear_attn\.in_proj_(qkv|z|qkvz)",
    "linear_attn.in_proj_z": r"linear_attn\.in_proj_(qkv|z|qkvz)",
    "self_attn.q_proj": r"self_attn\.(q|k|v|qkv)_proj",
    "self_attn.k_proj": r"self_attn\.(q|k|v|qkv)_proj",
    "self_attn.v_proj": r"self_attn\.(q|k|v|qkv)_proj",
    "mlp.gate_proj": r"mlp\.(gate|up|gate_up)_proj",
    "mlp.up_proj": r"mlp\.(gate|up|gate_up)_proj",
    "mlp.shared_expert.gate_proj": r"mlp\.shared_expert\.(gate|up|gate_up)_proj",
    "mlp.shared_expert.up_proj": r"mlp\.shared_expert\.(gate|up|gate_up)_proj",
}
_EXPERTS = r"mlp\.experts(\..*)?"
_LAYER = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(.+)")


def fused_with(module: str) -> str:
    """A key that modules share which some engine fuses: `module` is a full name without `.weight`."""
    layer, leaf = _layer_and_leaf(module)
    return f"{'mtp ' if _is_mtp(module) else ''}{layer} {leaf}"


def check_fused(schemes: Mapping[str, Scheme], kept: Iterable[str] = ()) -> None:
    """ValueError, naming two modules, where engines fuse them and their schemes differ, or one is quantized only."""
    first: dict[str, tuple[str, Scheme | None]] = {}
    for module, scheme in (*schemes.items(), *((module, None) for module in kept)):
        other, expected = first.setdefault(fused_with(module), (module, scheme))
        if scheme != expected:
            raise ValueError(f"{other} and {module} are fused by engines and need one scheme: {expected}, {scheme}")


def rules(modules: Iterable[str], beside_mtp: bool = False) -> list[str]:
    """Regular expressions, for `re.match`, that match these modules and none of another leaf or layer.

    Modules that are fused count as named together. beside_mtp: layers of the text model are not those of the
    prediction layers, which have the same numbers. The order is that of the first module of each rule.
    """
    layers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for module in modules:
        layer, leaf = _layer_and_leaf(module)
        has_twin = beside_mtp and layer is not None
        prefix = r".*mtp\." if _is_mtp(module) else "(?!.*mtp).*" if has_twin else ".*"
        layers[prefix, leaf].update(() if layer is None else (layer,))
    found = []
    for (prefix, leaf), numbers in layers.items():
        where = rf"layers\.({'|'.join(map(str, sorted(numbers)))})\." if numbers else ""
        found.append(f"{prefix}{where}{leaf}$")
    return found


def named_rules(schemes: Mapping[str, Scheme], scheme: Scheme) -> list[str]:
    """Rules for the modules of one scheme."""
    named = [module for module, of in schemes.items() if of == scheme]
    return rules(named, beside_mtp=any(map(_is_mtp, schemes)))


def kept_rules(schemes: Mapping[str, Scheme], kept: Iterable[str]) -> list[str]:
    """Rules for the modules that stay as they are: `KEPT` but for what is quantized all the same, lm_head, `kept`.

    A head that shares the embedding's weights is in no file, and yet a Linear that loaders would convert.
    """
    fixed = [rule for rule in KEPT if not any(re.match(rule, module) for module in schemes)]
    head = [] if any(module.endswith("lm_head") for module in schemes) else ["lm_head"]
    others = [module for module in (*head, *kept) if not covered(module, fixed)]
    return [*fixed, *rules(others, beside_mtp=any(map(_is_mtp, schemes)))]


def covered(module: str, patterns: Collection[str]) -> bool:
    """Whether one of the rules matches."""
    return any(re.match(pattern, module) for pattern in patterns)


def _is_mtp(module: str) -> bool:
    return module.startswith("mtp.")


def _layer_and_leaf(module: str) -> tuple[int | None, str]:
    """(layer, what a rule says after it); (None, name) for a module outside the layers, such as lm_head."""
    match = _LAYER.fullmatch(module)
    if match is None:
        return None, re.escape(module.removeprefix("mtp.").removeprefix("model.").removeprefix("language_model."))
    leaf = match[2]
    if leaf.startswith("mlp.experts"):
        return int(match[1]), _EXPERTS
    return int(match[1]), _LEAVES.get(leaf, re.escape(leaf))
