"""From dimensions to the list of tensors that a checkpoint of the family holds.

Shapes follow transformers 5.23 `models/qwen3_5`, `qwen3_5_moe` and `qwen3_next` (`modeling_*.py`); the multi-token
prediction layer, which transformers leaves out, follows vLLM's `qwen3_5_mtp.py` and `qwen3_next_mtp.py`. Names and
dtypes are those of the releases: tests hold every list against the published `total_size`.

Linear weights are [out, in].
"""

from typing import NamedTuple

from .model import Model, Tensor, Vision


class Layout(NamedTuple):
    """How a release writes the same weights down: names and dtypes, never sizes."""

    text_prefix: str = "model."  # "model.language_model." inside the vision-language class
    dtype: str = "BF16"
    state_dtype: str = "BF16"  # of A_log and linear_attn.norm: F32 in Qwen3.5, BF16 in Qwen3.6 and Qwen3-Next
    fused_gdn_projections: bool = False  # in_proj_qkvz and in_proj_ba instead of four projections
    split_experts: bool = False  # one tensor per expert and projection instead of one stack for all
    split_mtp_experts: bool = False
    output_gate: bool = True  # q_proj makes queries and their gates
    dense_layers: tuple[int, ...] = ()  # layers of a mixture-of-experts model that have a plain MLP


def layer_kinds(num_layers: int, full_attention_interval: int) -> tuple[str, ...]:
    """Layer i attends fully where i + 1 is a multiple of the interval, so the last of each group does."""
    return tuple(
        "linear_attention" if (layer + 1) % full_attention_interval else "full_attention" for layer in range(num_layers)
    )


def tensor_list(model: Model, layout: Layout) -> tuple[Tensor, ...]:
    """All tensors of `model` (whose own `tensors` are not looked at), one entry per shape and role."""
    prefix, size, dtype = layout.text_prefix, model.hidden_size, layout.dtype
    layers = tuple(range(model.num_layers))
    full = tuple(layer for layer in layers if model.layer_types[layer] == "full_attention")
    linear = tuple(layer for layer in layers if model.layer_types[layer] == "linear_attention")
    dense = layout.dense_layers if model.is_moe else layers
    sparse = tuple(layer for layer in layers if layer not in dense) if model.is_moe else ()

    tensors: list[Tensor] = []
    if model.vision:
        tensors += _vision(model.vision, dtype)
    text = _Block(tensors, prefix + "layers.{layer}.", dtype, "text")
    tensors.append(Tensor(prefix + "embed_tokens.weight", (model.vocab_size, size), dtype, "text", "embedding"))
    _gated_delta_net(text, model, layout, linear)
    _attention(text, model, layout, full)
    _mlp(text, model, dense)
    _experts(text, model, sparse, split=layout.split_experts)
    text.add("input_layernorm.weight", (size,), "norm", layers)
    text.add("post_attention_layernorm.weight", (size,), "norm", layers)
    tensors.append(Tensor(prefix + "norm.weight", (size,), dtype, "text", "norm"))
    if not model.tie_word_embeddings:
        tensors.append(Tensor("lm_head.weight", (model.vocab_size, size), dtype, "text", "lm_head"))
    _multi_token_prediction(tensors, model, layout)
    return tuple(tensors)


class _Block:
    """Collects the tensors of repeated layers, leaving out those that no layer has."""

    def __init__(self, tensors: list[Tensor], prefix: str, dtype: str, part: str) -> None:
        self.tensors = tensors
        self.prefix = prefix
        self.dtype = dtype
        self.part = part

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        role: str,
        layers: tuple[int, ...],
        dtype: str | None = None,
        experts: int = 0,
    ) -> None:
        if layers:
            self.tensors.append(
                Tensor(self.prefix + name, shape, dtype or self.dtype, self.part, role, layers, experts)
            )


def _gated_delta_net(block: _Block, model: Model, layout: Layout, layers: tuple[int, ...]) -> None:
    size, heads = model.hidden_size, model.linear_num_value_heads
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    values = heads * model.linear_value_head_dim
    if layout.fused_gdn_projections:
        block.add("linear_attn.in_proj_qkvz.weight", (2 * keys + 2 * values, size), "linear_attn.in_proj_qkvz", layers)
        block.add("linear_attn.in_proj_ba.weight", (2 * heads, size), "linear_attn.in_proj_ba", layers)
    else:
        block.add("linear_attn.in_proj_qkv.weight", (2 * keys + values, size), "linear_attn.in_proj_qkv", layers)
        block.add("linear_attn.in_proj_z.weight", (values, size), "linear_attn.in_proj_z", layers)
        block.add("linear_attn.in_proj_b.weight", (heads, size), "linear_attn.in_proj_b", layers)
        block.add("linear_attn.in_proj_a.weight", (heads, size), "linear_attn.in_proj_a", layers)
    channels = (model.conv_dim, 1, model.linear_conv_kernel_dim)
    block.add("linear_attn.conv1d.weight", channels, "linear_attn.conv1d", layers)
    block.add("linear_attn.A_log", (heads,), "linear_attn.A_log", layers, layout.state_dtype)
    block.add("linear_attn.dt_bias", (heads,), "linear_attn.dt_bias", layers)
    block.add("linear_attn.norm.weight", (model.linear_value_head_dim,), "linear_attn.norm", layers, layout.state_dtype)
    block.add("linear_attn.out_proj.weight", (size, values), "linear_attn.out_proj", layers)


def _attention(block: _Block, model: Model, layout: Layout, layers: tuple[int, ...]) -> None:
    size, dim = model.hidden_size, model.head_dim
    queries, keys = model.num_attention_heads * dim, model.num_key_value_heads * dim
    gated = 2 * queries if layout.output_gate else queries
    block.add("self_attn.q_proj.weight", (gated, size), "self_attn.q_proj", layers)
    block.add("self_attn.k_proj.weight", (keys, size), "self_attn.k_proj", layers)
    block.add("self_attn.v_proj.weight", (keys, size), "self_attn.v_proj", layers)
    block.add("self_attn.o_proj.weight", (size, queries), "self_attn.o_proj", layers)
    block.add("self_attn.q_norm.weight", (dim,), "norm", layers)
    block.add("self_attn.k_norm.weight", (dim,), "norm", layers)


def _mlp(block: _Block, model: Model, layers: tuple[int, ...]) -> None:
    size, inner = model.hidden_size, model.intermediate_size
    block.add("mlp.gate_proj.weight", (inner, size), "mlp.gate_proj", layers)
    block.add("mlp.up_proj.weight", (inner, size), "mlp.up_proj", layers)
    block.add("mlp.down_proj.weight", (size, inner), "mlp.down_proj", layers)


def _experts(block: _Block, model: Model, layers: tuple[int, ...], split: bool) -> None:
    size, experts, inner = model.hidden_size, model.num_experts, model.moe_intermediate_size
    shared = model.shared_expert_intermediate_size
    block.add("mlp.gate.weight", (experts, size), "mlp.gate", layers)
    if split:
        each = "mlp.experts.{expert}."
        block.add(each + "gate_proj.weight", (inner, size), "experts.gate_proj", layers, experts=experts)
        block.add(each + "up_proj.weight", (inner, size), "experts.up_proj", layers, experts=experts)
        block.add(each + "down_proj.weight", (size, inner), "experts.down_proj", layers, experts=experts)
    else:
        block.add("mlp.experts.gate_up_proj", (experts, 2 * inner, size), "experts.gate_up_proj", layers)
        block.add("mlp.experts.down_proj", (experts, size, inner), "experts.down_proj", layers)
    block.add("mlp.shared_expert.gate_proj.weight", (shared, size), "shared_expert.gate_proj", layers)
    block.add("mlp.shared_expert.up_proj.weight", (shared, size), "shared_expert.up_proj", layers)
    block.add("mlp.shared_expert.down_proj.weight", (size, shared), "shared_expert.down_proj", layers)
    block.add("mlp.shared_expert_gate.weight", (1, size), "shared_expert_gate", layers)


def _multi_token_prediction(tensors: list[Tensor], model: Model, layout: Layout) -> None:
    """A projection of [next embedding, hidden state] and full-attention layers; embedding and lm_head are shared."""
    layers, size = tuple(range(model.mtp_num_hidden_layers)), model.hidden_size
    if not layers:
        return
    tensors.append(Tensor("mtp.fc.weight", (size, 2 * size), layout.dtype, "mtp", "mtp.fc"))
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors.append(Tensor(f"mtp.{norm}.weight", (size,), layout.dtype, "mtp", "norm"))
    block = _Block(tensors, "mtp.layers.{layer}.", layout.dtype, "mtp")
    block.add("input_layernorm.weight", (size,), "norm", layers)
    block.add("post_attention_layernorm.weight", (size,), "norm", layers)
    _attention(block, model, layout, layers)
    if model.is_moe:
        _experts(block, model, layers, split=layout.split_mtp_experts)
    else:
        _mlp(block, model, layers)


def _vision(vision: Vision, dtype: str) -> list[Tensor]:
    size, inner, merged = (
        vision.hidden_size,
        vision.intermediate_size,
        vision.hidden_size * vision.spatial_merge_size**2,
    )
    blocks = tuple(range(vision.depth))
    patch = (size, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    tensors: list[Tensor] = []

    def add(name: str, shape: tuple[int, ...], role: str, layers: tuple[int, ...] = ()) -> None:
        tensors.append(Tensor(f"model.visual.{name}.weight", shape, dtype, "vision", role, layers))

    def add_with_bias(name: str, shape: tuple[int, ...], role: str, layers: tuple[int, ...] = ()) -> None:
        add(name, shape, role, layers)
        tensors.append(Tensor(f"model.visual.{name}.bias", shape[:1], dtype, "vision", "vision.bias", layers))

    add_with_bias("patch_embed.proj", patch, "vision.patch_embed")
    add("pos_embed", (vision.num_position_embeddings, size), "vision.pos_embed")
    add_with_bias("blocks.{layer}.norm1", (size,), "vision.norm", blocks)
    add_with_bias("blocks.{layer}.norm2", (size,), "vision.norm", blocks)
    add_with_bias("blocks.{layer}.attn.qkv", (3 * size, size), "vision.attn.qkv", blocks)
    add_with_bias("blocks.{layer}.attn.proj", (size, size), "vision.attn.proj", blocks)
    add_with_bias("blocks.{layer}.mlp.linear_fc1", (inner, size), "vision.mlp.fc1", blocks)
    add_with_bias("blocks.{layer}.mlp.linear_fc2", (size, inner), "vision.mlp.fc2", blocks)
    add_with_bias("merger.norm", (size,), "vision.norm")
    add_with_bias("merger.linear_fc1", (merged, merged), "vision.merger.fc1")
    add_with_bias("merger.linear_fc2", (vision.out_hidden_size, merged), "vision.merger.fc2")
    return tensors
