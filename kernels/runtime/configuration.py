"""What the runtime has to know of a model, from a checkpoint folder, a config.json's Model or the catalog.

Dimensions come from `profiles` (config.json and safetensors headers, checked there); the few fields that sizes do not
follow from (rms_norm_eps, the stop tokens) are read here. Letters: H query heads, KV key-value heads, D their dim, NK /
NV linear key / value heads, DK / DV their dims, C = 2 NK DK + NV DV channels of the convolution, W its width.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...profiles.checkpoint import read_folder
from ...profiles.json_file import read_json_object, short
from ...profiles.model import Model

ARCHITECTURES = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
RMS_NORM_EPS = 1e-6
"""Of every release; config.json has it, the catalog of models does not."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The text model and its prediction layer. Everything is a count of elements, heads, layers or tokens."""

    architecture: str
    hidden_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    vocab_size: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    mtp_num_hidden_layers: int
    mamba_ssm_dtype: str
    rope: Mapping[str, Any]
    rms_norm_eps: float = RMS_NORM_EPS
    stop_tokens: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def full_attention_layers(self) -> int:
        return self.layer_types.count("full_attention")

    @property
    def linear_attention_layers(self) -> int:
        return self.num_layers - self.full_attention_layers

    @property
    def key_dim(self) -> int:
        """Queries of all linear key heads together, and as many keys."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution of one linear-attention layer: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    @property
    def state_elements(self) -> int:
        """Of the recurrent state of one linear-attention layer and slot: [NV, DV, DK]."""
        return self.value_dim * self.linear_key_head_dim

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    def with_layers(self, count: int | None) -> "Configuration":
        """The first `count` layers of it, all of them for None; ValueError where there are not so many, or they are
        not whole repetitions of linear and full attention (a slice is to stand for the whole)."""
        if count is None or count == self.num_layers:
            return self
        kinds = self.layer_types
        period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds)
        if not 0 < count <= self.num_layers or count % period:
            raise ValueError(
                f"{count} layers of {self.num_layers}: give a multiple of {period}, up to {self.num_layers}"
            )
        return replace(self, layer_types=kinds[:count])


def configuration_of(
    model: Model, rms_norm_eps: float = RMS_NORM_EPS, stop_tokens: tuple[int, ...] = ()
) -> Configuration:
    """The configuration of a Model of `profiles`; ValueError where the runtime does not know its architecture."""
    if model.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{model.name} is a {model.architecture}; the native runtime takes {', '.join(ARCHITECTURES)}, "
            "llama.cpp or vLLM may take more"
        )
    names = Configuration.__dataclass_fields__.keys() - {"rms_norm_eps", "stop_tokens"}
    fields = {name: getattr(model, name) for name in names}
    return Configuration(**fields, rms_norm_eps=rms_norm_eps, stop_tokens=stop_tokens)


def read_configuration(folder: str) -> Configuration:
    """The configuration of a checkpoint folder.

    ValueError (from `profiles`, or here) in one sentence where a file is missing, wrong, or says something that no
    release says: another activation, queries without gates, router weights that are not normalised.
    """
    model = read_folder(folder)
    path = os.path.join(folder, "config.json")
    data = read_json_object(path)
    text = data.get("text_config", data)
    eps = text.get("rms_norm_eps")
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"{path}: rms_norm_eps is {short(eps)}, not a small number; restore the field")
    _refuse_other_math(text, path)
    return configuration_of(model, eps, _stop_tokens(folder, text))


def _refuse_other_math(text: Mapping[str, Any], path: str) -> None:
    """Fields that change what is computed: each has one value in every release, and only that one is implemented."""
    known = (
        ("hidden_act", "silu", ("silu", "swish")),
        ("output_gate_type", "swish", ("silu", "swish")),
        ("attn_output_gate", True, (True,)),
        ("norm_topk_prob", True, (True,)),
    )
    for name, released, accepted in known:
        value = text.get(name, released)
        if value not in accepted:
            raise ValueError(
                f"{path}: {name} is {short(value)}, and the native runtime computes {short(released)} only, "
                "as in every released model"
            )


def _stop_tokens(folder: str, text: Mapping[str, Any]) -> tuple[int, ...]:
    """eos_token_id of generation_config.json where there is one, else of config.json."""
    path = os.path.join(folder, "generation_config.json")
    sources = [read_json_object(path)] if os.path.exists(path) else []
    for source in (*sources, text):
        found: Any = source.get("eos_token_id")
        tokens: list[Any] = found if isinstance(found, list) else [found]
        if tokens and all(type(token) is int and token >= 0 for token in tokens):
            return tuple(tokens)
    return ()
