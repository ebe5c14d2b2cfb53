"""The fields of config.json that sizes follow from, each with its type and its bounds.

Strict: `"4096"`, `4096.0` and `true` are no numbers. The bounds are far above every release and low enough that
nothing built from them (a list of layers, a list of tensors) can grow out of hand. Fields that sizes do not follow
from are not looked at.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Width = Annotated[int, Field(ge=1, le=1 << 20)]
Heads = Annotated[int, Field(ge=1, le=4096)]
HeadDim = Annotated[int, Field(ge=1, le=4096)]
Layers = Annotated[int, Field(ge=1, le=1024)]
LayerNumber = Annotated[int, Field(ge=0, le=1023)]
Number = Annotated[int | float, Field(gt=0, le=1e12)]


class Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class RopeFields(Fields):
    """rope_parameters, or rope_scaling of older configs."""

    rope_type: Annotated[str, Field(max_length=32)] | None = None
    rope_theta: Number | None = None
    partial_rotary_factor: Number | None = None
    mrope_interleaved: bool | None = None
    mrope_section: Annotated[list[HeadDim], Field(max_length=8)] | None = None
    factor: Number | None = None
    original_max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    attention_factor: Number | None = None
    beta_fast: Number | None = None
    beta_slow: Number | None = None


class TextFields(Fields):
    """text_config, or the whole file of a text-only model."""

    hidden_size: Width
    num_hidden_layers: Layers
    layer_types: Annotated[list[Literal["linear_attention", "full_attention"]], Field(max_length=1024)] | None = None
    full_attention_interval: Annotated[int, Field(ge=1, le=1024)] | None = None
    num_attention_heads: Heads
    num_key_value_heads: Heads
    head_dim: HeadDim
    linear_num_key_heads: Heads
    linear_num_value_heads: Heads
    linear_key_head_dim: HeadDim
    linear_value_head_dim: HeadDim
    linear_conv_kernel_dim: Annotated[int, Field(ge=1, le=64)]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 31)]
    mamba_ssm_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    mtp_num_hidden_layers: Annotated[int, Field(ge=0, le=16)] | None = None
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=16)] | None = None
    attention_bias: bool = False
    attn_output_gate: bool = True
    mtp_use_dedicated_embeddings: bool = False
    bos_token_id: Any = None
    rope_parameters: RopeFields | None = None
    rope_scaling: RopeFields | None = None
    rope_theta: Number | None = None
    partial_rotary_factor: Number | None = None


class DenseFields(TextFields):
    intermediate_size: Width


class SparseFields(TextFields):
    num_experts: Annotated[int, Field(ge=1, le=65536)]
    num_experts_per_tok: Annotated[int, Field(ge=1, le=65536)]
    moe_intermediate_size: Width
    shared_expert_intermediate_size: Width
    intermediate_size: Width | None = None
    mlp_only_layers: Annotated[list[LayerNumber], Field(max_length=1024)] = []
    decoder_sparse_step: Annotated[int, Field(ge=1, le=1024)] = 1


class VisionFields(Fields):
    depth: Layers
    hidden_size: Width
    intermediate_size: Width
    num_heads: Heads
    out_hidden_size: Width
    patch_size: Annotated[int, Field(ge=1, le=1024)]
    temporal_patch_size: Annotated[int, Field(ge=1, le=64)]
    spatial_merge_size: Annotated[int, Field(ge=1, le=64)]
    in_channels: Annotated[int, Field(ge=1, le=64)]
    num_position_embeddings: Annotated[int, Field(ge=1, le=1 << 24)]
    deepstack_visual_indexes: Annotated[list[int], Field(max_length=1024)] = []
