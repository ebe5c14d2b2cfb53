"""config.json -> Model. Everything comes from the file: a field that is missing is an error, never a class default.

The class defaults of transformers are not those of the releases (max_position_embeddings 32768 against 262144), so
nothing is filled in. Three fields say something by being absent, as the engines read them: `layer_types` follows from
full_attention_interval; `mtp_num_hidden_layers` is 0, except for Qwen3-Next, whose published checkpoints hold one
layer that their config.json does not mention (vLLM `qwen3_next_mtp.py` takes 1); `mamba_ssm_dtype` is "auto".

Importing this module imports pydantic: callers do it when they have a file to read.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from .config_fields import DenseFields, Fields, SparseFields, TextFields, VisionFields
from .errors import BadInput, Unsupported
from .formats import checkpoint_bytes, weight_format
from .frozen import dataclass, field, replace
from .json_file import read_json_object, short
from .model import Model, Vision
from .quantization_config import read_quantization, stored_format
from .tensors import Layout, layer_kinds, tensor_list

# architectures[0] -> (model_type, whether the text model sits inside a vision-language one)
_ARCHITECTURES = {
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", True),
    "Qwen3_5ForCausalLM": ("qwen3_5", False),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe", True),
    "Qwen3_5MoeForCausalLM": ("qwen3_5_moe", False),
    "Qwen3NextForCausalLM": ("qwen3_next", False),
}
_MODEL_TYPES = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

_Checked = TypeVar("_Checked", bound=Fields)


@dataclass(frozen=True, slots=True)
class Config:
    """What config.json says, checked; `model()` is the Model that follows from it alone."""

    path: str  # of config.json, for messages
    name: str
    repo: str  # what engines are given: the folder, that of a config.json, or the file's name without .json
    place: str  # what was read: the folder, or this file alone
    architecture: str
    dimensions: Mapping[str, Any]  # the fields of Model that need no decision
    tie_word_embeddings: bool | None  # None: the file does not say
    mtp_num_hidden_layers: int
    vision: Vision | None
    layout: Layout
    quantization: Mapping[str, object] | None
    rope: Mapping[str, object] = field(default_factory=dict)

    def model(self, with_weights: bool = False) -> Model:
        """The model; `with_weights` where its tensors will come from headers, so that no format has to be known.

        `BadInput` where the file does not say whether lm_head is tied, `Unsupported` for a quantization of unknown
        size.
        """
        if self.tie_word_embeddings is None:
            raise BadInput(f"{self.path}: tie_word_embeddings is missing")
        model = Model(
            name=self.name,
            repo=self.repo,
            architecture=self.architecture,
            tie_word_embeddings=self.tie_word_embeddings,
            mtp_num_hidden_layers=self.mtp_num_hidden_layers,
            vision=self.vision,
            tensors=(),
            stored=None if with_weights else stored_format(self.quantization, self.path),
            source=self.path,
            path=self.place,
            rope=self.rope,
            quantization=self.quantization,
            **self.dimensions,
        )
        model = replace(model, tensors=tensor_list(model, self.layout))
        if model.stored is None:
            return model
        return replace(model, release_bytes=checkpoint_bytes(model, weight_format(model.stored)))


def read_config(path: str, folder: str | None = None) -> Config:
    """The checked config.json at `path`; `folder` where it is read as part of a checkpoint.

    `BadInput` names file and field, `Unsupported` the architecture found and those that qwenfit takes.
    """
    data = read_json_object(path)
    architecture, is_wrapped = _architecture(data, path)
    inner = data.get("text_config", data)
    prefix = "text_config." if "text_config" in data else ""
    if not isinstance(inner, dict):
        raise BadInput(f"{path}: text_config is {short(inner)}, not an object")
    text = _validated(DenseFields if architecture == "qwen3_5" else SparseFields, inner, path, prefix)
    layer_types = _layer_types(text, path, prefix)
    _check_text(text, layer_types, path, prefix)
    vision = _vision(data, text, path) if is_wrapped else None
    dense_layers = _dense_layers(text, path, prefix)
    moe = text if isinstance(text, SparseFields) else None
    if isinstance(text, DenseFields):
        intermediate_size = text.intermediate_size
    else:
        intermediate_size = (text.intermediate_size or 0) if isinstance(text, SparseFields) and dense_layers else 0
    dimensions: dict[str, Any] = {
        name: getattr(text, name)
        for name in (
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
            "max_position_embeddings",
        )
    }
    dimensions.update(
        layer_types=layer_types,
        intermediate_size=intermediate_size,
        num_experts=moe.num_experts if moe else 0,
        num_experts_per_tok=moe.num_experts_per_tok if moe else 0,
        moe_intermediate_size=moe.moe_intermediate_size if moe else 0,
        shared_expert_intermediate_size=moe.shared_expert_intermediate_size if moe else 0,
        mamba_ssm_dtype=text.mamba_ssm_dtype or "auto",
    )
    repo = folder
    if repo is None:
        is_inside = os.path.basename(path) == "config.json"
        repo = os.path.dirname(path) or "." if is_inside else path.removesuffix(".json")
    return Config(
        path=path,
        name=os.path.basename(os.path.abspath(repo)).lower(),
        repo=repo,
        place=folder or path,
        architecture=architecture,
        dimensions=dimensions,
        tie_word_embeddings=_tied(data, inner, path),
        mtp_num_hidden_layers=_mtp_layers(text, architecture),
        vision=vision,
        layout=_layout(data, inner, text, architecture, is_wrapped, dense_layers, path),
        quantization=read_quantization(data, inner, path),
        rope=_rope(text),
    )


def _architecture(data: Mapping[str, Any], path: str) -> tuple[str, bool]:
    """(model type, whether it is the vision-language class)."""
    listed = data.get("architectures")
    found = listed[0] if isinstance(listed, list) and listed else _MODEL_TYPES.get(str(data.get("model_type")))
    if isinstance(found, str) and found in _ARCHITECTURES:
        return _ARCHITECTURES[found]
    if found is None:
        found = data.get("model_type")
    if not isinstance(found, str):
        raise BadInput(f"{path}: architectures is missing, so it is no config.json of a model")
    raise Unsupported(f"{path} is a {short(found)}; qwenfit takes {', '.join(_ARCHITECTURES)}")


def _validated(kind: type[_Checked], data: object, path: str, prefix: str) -> _Checked:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join([*filter(None, [prefix.rstrip(".")]), *map(str, first["loc"])])
    if first["type"] == "missing":
        raise BadInput(f"{path}: {place} is missing")
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "model_type":
        message = "input should be an object"
    raise BadInput(f"{path}: {place} is {short(first['input'])}, but {message.replace('input ', 'it ', 1)}")


def _layer_types(text: TextFields, path: str, prefix: str) -> tuple[str, ...]:
    if text.layer_types is None:
        if text.full_attention_interval is None:
            raise BadInput(f"{path}: {prefix}layer_types is missing, and so is full_attention_interval")
        kinds = layer_kinds(text.num_hidden_layers, text.full_attention_interval)
    else:
        kinds = tuple(text.layer_types)
    if len(kinds) != text.num_hidden_layers:
        raise BadInput(
            f"{path}: {prefix}layer_types has {len(kinds)} entries, "
            f"but {prefix}num_hidden_layers is {text.num_hidden_layers}"
        )
    for kind in ("linear_attention", "full_attention"):
        if kind not in kinds:
            raise BadInput(
                f"{path}: {prefix}layer_types has no {kind} layer, and every model of the family has both kinds"
            )
    return kinds


def _check_text(text: TextFields, layer_types: tuple[str, ...], path: str, prefix: str) -> None:
    if text.num_attention_heads % text.num_key_value_heads:
        raise BadInput(
            f"{path}: {prefix}num_attention_heads {text.num_attention_heads} is no multiple of "
            f"num_key_value_heads {text.num_key_value_heads}"
        )
    if text.linear_num_value_heads % text.linear_num_key_heads:
        raise BadInput(
            f"{path}: {prefix}linear_num_value_heads {text.linear_num_value_heads} is no multiple of "
            f"linear_num_key_heads {text.linear_num_key_heads}"
        )
    if isinstance(text, SparseFields) and text.num_experts_per_tok > text.num_experts:
        raise BadInput(
            f"{path}: {prefix}num_experts_per_tok {text.num_experts_per_tok} exceeds num_experts {text.num_experts}"
        )
    for name in ("attention_bias", "mtp_use_dedicated_embeddings"):
        if getattr(text, name):
            raise Unsupported(f"{path}: {prefix}{name} true is not supported; every released model has it false")


def _dense_layers(text: TextFields, path: str, prefix: str) -> tuple[int, ...]:
    """Layers of a mixture-of-experts model with a plain MLP (vLLM `qwen3_next.py`, Qwen3NextDecoderLayer)."""
    if not isinstance(text, SparseFields):
        return ()
    dense = tuple(
        layer
        for layer in range(text.num_hidden_layers)
        if layer in text.mlp_only_layers or (layer + 1) % text.decoder_sparse_step
    )
    if dense and text.intermediate_size is None:
        raise BadInput(f"{path}: {prefix}intermediate_size is missing, and layer {dense[0]} has no experts")
    return dense


def _vision(data: Mapping[str, Any], text: TextFields, path: str) -> Vision | None:
    if data.get("vision_config") is None or data.get("language_model_only") is True:
        return None
    vision = _validated(VisionFields, data["vision_config"], path, "vision_config.")
    if vision.hidden_size % vision.num_heads:
        raise BadInput(
            f"{path}: vision_config.hidden_size {vision.hidden_size} is no multiple of num_heads {vision.num_heads}"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise BadInput(
            f"{path}: vision_config.out_hidden_size {vision.out_hidden_size} differs from "
            f"text_config.hidden_size {text.hidden_size}"
        )
    if vision.deepstack_visual_indexes:
        raise Unsupported(
            f"{path}: vision_config.deepstack_visual_indexes is not empty; every released model has it empty"
        )
    return Vision(**vision.model_dump(exclude={"deepstack_visual_indexes"}))


def _tied(data: Mapping[str, Any], inner: Mapping[str, Any], path: str) -> bool | None:
    for source in (data, inner):
        if "tie_word_embeddings" in source:
            tied = source["tie_word_embeddings"]
            if not isinstance(tied, bool):
                raise BadInput(f"{path}: tie_word_embeddings is {short(tied)}, not true or false")
            return tied
    return None


def _mtp_layers(text: TextFields, architecture: str) -> int:
    if architecture == "qwen3_next":
        return 1 if text.num_nextn_predict_layers is None else text.num_nextn_predict_layers
    return text.mtp_num_hidden_layers or 0


def _layout(
    data: Mapping[str, Any],
    inner: Mapping[str, Any],
    text: TextFields,
    architecture: str,
    is_wrapped: bool,
    dense_layers: tuple[int, ...],
    path: str,
) -> Layout:
    """How the weights are written down. Without headers the release is told by its config: Qwen3.6 added bos_token_id.

    What hangs on it is 32 bits instead of 16 for A_log and one norm, 15 kB in all, and the names of the MTP experts.
    """
    dtype = _dtype(data, inner, path)
    is_next = architecture == "qwen3_next"
    is_qwen35 = not is_next and text.bos_token_id is None
    return Layout(
        text_prefix="model.language_model." if is_wrapped else "model.",
        dtype=dtype,
        state_dtype="F32" if is_qwen35 else dtype,
        fused_gdn_projections=is_next,
        split_experts=is_next,
        split_mtp_experts=is_next or is_qwen35,
        output_gate=text.attn_output_gate,
        dense_layers=dense_layers,
    )


def _dtype(data: Mapping[str, Any], inner: Mapping[str, Any], path: str) -> str:
    """Of the weights that nothing quantizes; bfloat16, as in every release, where the file does not say."""
    for source in (inner, data):
        for name in ("dtype", "torch_dtype"):
            dtype = source.get(name)
            if dtype is not None:
                if not isinstance(dtype, str) or dtype not in _DTYPES:
                    raise BadInput(f"{path}: {name} is {short(dtype)}, not one of {', '.join(_DTYPES)}")
                return _DTYPES[dtype]
    return "BF16"


def _rope(text: TextFields) -> dict[str, object]:
    rope: dict[str, object] = {
        "rope_type": "default",
        "rope_theta": text.rope_theta,
        "partial_rotary_factor": text.partial_rotary_factor,
    }
    for source in (text.rope_scaling, text.rope_parameters):
        if source is not None:
            rope.update(source.model_dump(exclude_none=True))
    return {name: value for name, value in rope.items() if value is not None}
