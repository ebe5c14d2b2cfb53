"""What a tensor is for, told from its name.

ROLES. Text and multi-token prediction: embedding, lm_head, norm (every RMSNorm but the gated one),
linear_attn.in_proj_qkv, .in_proj_z, .in_proj_a, .in_proj_b, .in_proj_qkvz, .in_proj_ba, .conv1d, .A_log, .dt_bias,
.norm, .out_proj, self_attn.q_proj, .k_proj, .v_proj, .o_proj, .qkv_proj, mlp.gate_proj, .up_proj, .down_proj,
.gate_up_proj, mlp.gate (the router), experts.gate_up_proj, .gate_proj, .up_proj, .down_proj, shared_expert.gate_proj,
.up_proj, .down_proj, .gate_up_proj, shared_expert_gate, mtp.fc. Vision: vision.patch_embed, .pos_embed, .norm, .bias,
.attn.qkv, .attn.proj, .mlp.fc1, .mlp.fc2, .merger.fc1, .merger.fc2. Whatever is not known: other.

What a quantizer stores beside or instead of a weight (`.qweight .qzeros .scales .g_idx`, `.weight_packed
.weight_scale .weight_zero_point`, `.weight_scale_inv`, `.input_scale`, `.biases`, ...) has the role of that weight.
Prefixes differ by class and tool (`model.language_model.`, `model.`, `language_model.model.`) and do not matter.
"""

from functools import lru_cache

_LAYER_ROLES = {
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "self_attn.q_norm": "norm",
    "self_attn.k_norm": "norm",
    "mlp.gate": "mlp.gate",
    "mlp.shared_expert_gate": "shared_expert_gate",
}
for _name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"):
    _LAYER_ROLES[f"self_attn.{_name}"] = f"self_attn.{_name}"
for _name in ("qkv", "z", "a", "b", "qkvz", "ba"):
    _LAYER_ROLES[f"linear_attn.in_proj_{_name}"] = f"linear_attn.in_proj_{_name}"
for _name in ("conv1d", "A_log", "dt_bias", "norm", "out_proj"):
    _LAYER_ROLES[f"linear_attn.{_name}"] = f"linear_attn.{_name}"
for _name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj"):
    _LAYER_ROLES[f"mlp.{_name}"] = f"mlp.{_name}"
    _LAYER_ROLES[f"mlp.shared_expert.{_name}"] = f"shared_expert.{_name}"
    _LAYER_ROLES[f"mlp.experts.{_name}"] = f"experts.{_name}"
    _LAYER_ROLES[f"mlp.experts.{{expert}}.{_name}"] = f"experts.{_name}"
    _LAYER_ROLES[f"mlp.switch_mlp.{_name}"] = f"experts.{_name}"  # MLX

_TEXT_ROLES = {"embed_tokens": "embedding", "norm": "norm", "lm_head": "lm_head"}
_MTP_ROLES = {
    "fc": "mtp.fc",
    "norm": "norm",
    "pre_fc_norm_embedding": "norm",
    "pre_fc_norm_hidden": "norm",
    "embed_tokens": "embedding",
    "lm_head": "lm_head",
}
_VISION_ROLES = {
    "patch_embed.proj": "vision.patch_embed",
    "pos_embed": "vision.pos_embed",
    "blocks.{layer}.norm1": "vision.norm",
    "blocks.{layer}.norm2": "vision.norm",
    "blocks.{layer}.attn.qkv": "vision.attn.qkv",
    "blocks.{layer}.attn.proj": "vision.attn.proj",
    "blocks.{layer}.mlp.linear_fc1": "vision.mlp.fc1",
    "blocks.{layer}.mlp.linear_fc2": "vision.mlp.fc2",
    "merger.norm": "vision.norm",
    "merger.linear_fc1": "vision.merger.fc1",
    "merger.linear_fc2": "vision.merger.fc2",
}
for _roles in (_TEXT_ROLES, _MTP_ROLES):
    _roles.update({f"layers.{{layer}}.{name}": role for name, role in _LAYER_ROLES.items()})

# llama.cpp's names (gguf-py 0.19 `constants.py`, architectures qwen35, qwen35moe, qwen3next).
_GGUF_BLOCK_ROLES = {
    "attn_norm": "norm",
    "post_attention_norm": "norm",
    "ffn_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "norm",
    "attn_k_norm": "norm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt": "linear_attn.dt_bias",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "shared_expert_gate",
    "ffn_gate_exps": "experts.gate_proj",
    "ffn_up_exps": "experts.up_proj",
    "ffn_down_exps": "experts.down_proj",
    "ffn_gate_up_exps": "experts.gate_up_proj",
    "ffn_gate_shexp": "shared_expert.gate_proj",
    "ffn_up_shexp": "shared_expert.up_proj",
    "ffn_down_shexp": "shared_expert.down_proj",
    "nextn.eh_proj": "mtp.fc",
    "nextn.enorm": "norm",
    "nextn.hnorm": "norm",
    "nextn.shared_head_norm": "norm",
    "nextn.embed_tokens": "embedding",
    "nextn.shared_head_head": "lm_head",
}
_GGUF_ROLES = {
    "token_embd": "embedding",
    "output_norm": "norm",
    "output": "lm_head",
    **{f"blk.{{layer}}.{name}": role for name, role in _GGUF_BLOCK_ROLES.items()},
}

_WRAPPERS = ("model", "language_model", "text_model")
_VISION_TOWERS = ("visual", "vision_tower", "vision_model")
_LAYER_MARKS = ("layers.", "blocks.", "blk.")


def pattern_of(name: str) -> tuple[str, int | None, int | None]:
    """A tensor's name with its layer and expert numbers taken out: ('a.layers.{layer}.b', 3, None)."""
    layer = expert = None
    for mark in _LAYER_MARKS:
        before, layer, after = _cut(name, mark)
        if layer is not None:
            name = f"{before}{mark}{{layer}}.{after}"
            break
    if "experts." in name:
        before, expert, after = _cut(name, "experts.")
        if expert is not None:
            name = f"{before}experts.{{expert}}.{after}"
    return name, layer, expert


def _cut(name: str, mark: str) -> tuple[str, int | None, str]:
    """What is before the first `mark`, the number after it, and what is after that; no number: (..., None, ...)."""
    before, found, after = name.partition(mark)
    if not found or before[-1:] not in ("", "."):
        return before, None, after
    digits, dot, rest = after.partition(".")
    return before, _number(digits) if dot else None, rest


@lru_cache(maxsize=4096)
def _number(digits: str) -> int | None:
    """Longer ones stay part of the name: no model has a million layers, and int() of thousands of digits is slow."""
    return (
        int(digits)
        if len(digits) <= 6 and digits.isascii() and digits.isdecimal() and digits == str(int(digits))
        else None
    )


@lru_cache(maxsize=4096)
def classify(pattern: str) -> tuple[str, str]:
    """(part, role) of a safetensors name whose numbers are taken out. Never fails: an unknown name is ('text',
    'other').
    """
    words = pattern.split(".")
    start = 0
    while start < len(words) - 1 and words[start] in _WRAPPERS:
        start += 1
    if words[start] in _VISION_TOWERS:
        role = _look_up(words[start + 1 :], _VISION_ROLES)
        return "vision", "vision.bias" if words[-1] == "bias" else role
    if words[start] == "mtp":
        return "mtp", _look_up(words[start + 1 :], _MTP_ROLES)
    return "text", _look_up(words[start:], _TEXT_ROLES)


@lru_cache(maxsize=4096)
def classify_gguf(pattern: str) -> str:
    """Role of a GGUF name whose block number is taken out."""
    return _look_up(pattern.split("."), _GGUF_ROLES)


def _look_up(words: list[str], roles: dict[str, str]) -> str:
    """The role of `words` as they are, or of the weight whose bytes, scales or indices they are."""
    name, module = ".".join(words), ".".join(words[:-1])
    if name in roles:
        return roles[name]
    if module in roles:
        return roles[module]
    # A stack of experts has no `.weight`; its companions are experts.gate_up_proj_scale_inv and the like.
    if words[-2:-1] == ["experts"]:
        for stack in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
            if words[-1].startswith(stack + "_"):
                return f"experts.{stack}"
    return "other"
