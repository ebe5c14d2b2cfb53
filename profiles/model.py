"""A model as a list of its tensors, with the handful of dimensions that caches and states are made of.

`model(name)` answers for a name of the catalog (`models.json`), for a folder (config.json and safetensors headers),
for a config.json alone and for a GGUF file. No weights are read, only headers.

Letters used everywhere: L layers, A full-attention layers, G Gated DeltaNet layers, H query heads, KV key-value
heads, D head dim (256), NK / NV linear key / value heads, DK / DV their dims (128), E hidden size.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import ceil, prod

from .errors import Unsupported
from .frozen import dataclass, field, replace

# Bits of one element by safetensors' dtype word (safetensors 0.8, `Dtype`). GGML's block types are in `ggml.py`.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one tensor of `shape` (row length last) in safetensors' or GGML's words; `KeyError` for another word."""
    bits = DTYPE_BITS.get(dtype)
    if bits is not None:
        return prod(shape) * bits // 8
    from .ggml import GGML_TYPES

    block_elements, block_bytes = GGML_TYPES[dtype]
    return prod(shape) // block_elements * block_bytes


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a checkpoint, or one per layer (and per expert) where the same shape repeats.

    `name` is the checkpoint's own, with `{layer}` (and `{expert}`) where it repeats. `count` tensors of `shape` exist.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # as stored, safetensors' words (BF16, F32, F8_E4M3, I32, U8) or GGML's (Q4_K, F16)
    part: str  # text, vision, mtp
    role: str  # see `roles.py`
    layers: tuple[int, ...] = ()  # text or mtp or vision block numbers; empty: it occurs once
    experts: int = 0  # stored expert by expert: how many per layer; 0: not so

    @cached_property
    def elements(self) -> int:
        return prod(self.shape)

    @cached_property
    def count(self) -> int:
        return max(1, len(self.layers)) * max(1, self.experts)

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of one of the `count` tensors, as stored."""
        return stored_bytes(self.shape, self.dtype)

    def names(self) -> Iterator[str]:
        """The checkpoint's real names, `count` of them: layer by layer, expert by expert."""
        for layer in self.layers or (None,):
            name = self.name if layer is None else self.name.replace("{layer}", str(layer))
            if not self.experts:
                yield name
            else:
                before, _, after = name.partition("{expert}")
                for expert in range(self.experts):
                    yield f"{before}{expert}{after}"


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision tower."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    num_position_embeddings: int = 2304
    max_image_tokens: int = 16384  # preprocessor_config.json longest_edge 16777216 pixels / 1024
    max_video_tokens: int = 12288  # video_preprocessor_config.json longest_edge 25165824 / (2 * 1024)


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A checkpoint of the family: its dimensions and its tensors. Compared by identity."""

    name: str
    repo: str  # what an engine is told to load: a repository, or the path for a local model
    architecture: str  # qwen3_5, qwen3_5_moe, qwen3_next
    hidden_size: int
    layer_types: tuple[str, ...]  # linear_attention or full_attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    vocab_size: int
    intermediate_size: int  # 0 where every layer is a mixture of experts
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    mtp_num_hidden_layers: int
    mamba_ssm_dtype: str  # the config's word; "auto" where it has none (Qwen3-Next): each engine then has its own rule
    vision: Vision | None
    tensors: tuple[Tensor, ...]
    # None: as in `tensors`, bf16. A format's name: quantized, headers not read. "checkpoint": headers read.
    stored: str | None
    source: str
    path: str | None = None  # folder, config.json or GGUF file it was read from
    rope: Mapping[str, object] = field(default_factory=dict)  # rope_parameters as config.json has them
    quantization: Mapping[str, object] | None = None  # what config.json says about it: method, bits, group_size, ...
    original: tuple[Tensor, ...] = ()  # where headers were read: the same weights unquantized, from the dimensions
    release_bytes: int | None = None  # of the quantized files, where `stored` names their format

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @cached_property
    def full_attention_layers(self) -> int:
        return sum(kind == "full_attention" for kind in self.layer_types)

    @cached_property
    def linear_attention_layers(self) -> int:
        return len(self.layer_types) - self.full_attention_layers

    @cached_property
    def conv_dim(self) -> int:
        """Channels of the causal convolution of one Gated DeltaNet layer: queries, keys and values."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    @cached_property
    def state_elements(self) -> int:
        """Elements of the recurrent state of one Gated DeltaNet layer and sequence: [NV, DK, DV]."""
        return self.linear_num_value_heads * self.linear_key_head_dim * self.linear_value_head_dim

    @property
    def unquantized(self) -> tuple[Tensor, ...]:
        """The tensors before any quantization: what another format would be made from."""
        return self.original or self.tensors

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.elements * tensor.count for tensor in self.unquantized)

    @cached_property
    def active_parameters(self) -> int:
        """Text parameters that one token passes through: of the routed experts only those it is routed to."""
        total = 0
        for tensor in self.unquantized:
            if tensor.part == "text":
                elements = tensor.elements * tensor.count
                if tensor.role.startswith("experts."):
                    elements = elements * self.num_experts_per_tok // self.num_experts
                total += elements
        return total

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Bytes of all tensors as stored: safetensors' `metadata.total_size`, the tensor data of a GGUF."""
        if self.release_bytes is not None:
            return self.release_bytes
        return sum(tensor.stored_bytes * tensor.count for tensor in self.tensors)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def has_vision(self) -> bool:
        return self.vision is not None

    @property
    def max_image_tokens(self) -> int:
        return self.vision.max_image_tokens if self.vision else 0

    def expanded(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its real name, with the entry of `tensors` that describes it."""
        for tensor in self.tensors:
            for name in tensor.names():
                yield name, tensor

    @cached_property
    def native_context_tokens(self) -> int:
        """Tokens that the model reaches without changing its configuration."""
        factor, original = self.rope.get("factor"), self.rope.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and isinstance(original, int):
            return max(self.max_position_embeddings, int(factor * original))
        return self.max_position_embeddings

    def yarn_factor(self, ctx_tokens: int) -> float | None:
        """Factor of the static YaRN that a context needs, None where the model reaches that far as it is.

        The model cards name 4.0 for 1,010,000 tokens and 2.0 for 524,288: the smallest whole factor that covers.
        """
        if ctx_tokens <= self.native_context_tokens:
            return None
        return float(ceil(ctx_tokens / self._trained_tokens))

    def yarn_rope(self, ctx_tokens: int) -> dict[str, object] | None:
        """`rope_parameters` with the YaRN that a context needs, None where it needs none."""
        factor = self.yarn_factor(ctx_tokens)
        if factor is None:
            return None
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": self._trained_tokens}
        return {**self.rope, **scaling}

    @property
    def _trained_tokens(self) -> int:
        original = self.rope.get("original_max_position_embeddings")
        return original if isinstance(original, int) else self.max_position_embeddings


def first_layers(model: Model, count: int) -> Model:
    """The model without the text layers behind the first `count`: for a run on a machine that is too small for all.

    `Unsupported` where they are not whole repetitions of linear and full attention, and so do not stand for the rest.
    """
    kinds = model.layer_types
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds)
    if not 0 < count <= len(kinds) or count % period:
        raise Unsupported(f"{count} layers of {model.name}: give a multiple of {period}, up to {len(kinds)}")
    kept = frozenset(range(count))

    def shorter(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = []
        for tensor in tensors:
            if tensor.part != "text" or not tensor.layers:
                found.append(tensor)
            elif layers := tuple(layer for layer in tensor.layers if layer in kept):
                found.append(replace(tensor, layers=layers))
        return tuple(found)

    return replace(
        model, layer_types=kinds[:count], tensors=shorter(model.tensors), original=shorter(model.original),
        release_bytes=None,
    )  # fmt: skip
