"""A model from named matrices, wherever they come from: a checkpoint (`loading.py`) or a generator (`synthetic.py`).

A `Source` knows modules by the names that checkpoints of the family share, without their prefix:
layers.3.mlp.gate_proj, embed_tokens, norm, lm_head, mtp.fc. Matrices that share an input are laid on top of each other
here, in the row order of `layers.py`: per-head mixtures of queries and gates (q_proj) and of queries, keys, values and
z (Qwen3-Next's in_proj_qkvz and in_proj_ba; transformers 5.23 `modeling_qwen3_next.py`, fix_query_key_value_ordering)
are sorted out once, at loading. Assembled on the CPU, one group of matrices at a time, each then moved to the device.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..layout.packing import QuantizedWeight
from ..layout.rows import Stacked, Weight, stack_rows, take_rows
from ..operations import Operations
from .configuration import Configuration
from .layers import MLP, Experts, FullAttention, Layer, LinearAttention, Prediction
from .model import Model


class Source(Protocol):
    """Where weights come from. Every call states the shape that the configuration asks for."""

    def has(self, module: str) -> bool:
        """Whether there is such a module, quantized or not."""
        ...

    def matrix(self, module: str, rows: int, columns: int) -> Weight:
        """A linear or an embedding [rows, columns], as it is stored."""
        ...

    def stack(self, module: str, count: int, rows: int, columns: int) -> Weight:
        """A stack of expert matrices [count, rows, columns]."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that nobody quantizes, by its whole name."""
        ...


def assemble(
    source: Source,
    configuration: Configuration,
    dtype: torch.dtype,
    device: torch.device,
    operations: Operations,
    with_prediction: bool,
) -> Model:
    """The model; the prediction layer only if it is asked for."""
    builder = _Builder(source, configuration, dtype, device, operations.arrange)
    vocabulary, size = configuration.vocab_size, configuration.hidden_size
    embedding = builder.placed(source.matrix("embed_tokens", vocabulary, size))
    lm_head = embedding
    if not configuration.tie_word_embeddings:
        lm_head = builder.placed(source.matrix("lm_head", vocabulary, size))
    layers = tuple(
        builder.layer(f"layers.{number}.", kind == "full_attention")
        for number, kind in enumerate(configuration.layer_types)
    )
    return Model(
        configuration=configuration,
        embedding=embedding,
        layers=layers,
        norm=builder.norm("norm"),
        lm_head=lm_head,
        prediction=builder.prediction() if with_prediction else None,
        dtype=dtype,
        device=device,
        operations=operations,
    )


class _Builder:
    """What every part of a model is built with."""

    def __init__(
        self,
        source: Source,
        configuration: Configuration,
        dtype: torch.dtype,
        device: torch.device,
        arrange: Callable[[QuantizedWeight], QuantizedWeight] | None,
    ) -> None:
        self.source, self.configuration, self.dtype, self.device = source, configuration, dtype, device
        self.arrange = arrange

    def layer(self, prefix: str, is_full: bool) -> Layer:
        return Layer(
            input_norm=self.norm(prefix + "input_layernorm"),
            attention=self.full_attention(prefix + "self_attn.")
            if is_full
            else self.linear_attention(prefix + "linear_attn."),
            post_norm=self.norm(prefix + "post_attention_layernorm"),
            mlp=self.experts(prefix + "mlp.")
            if self.source.has(prefix + "mlp.gate")
            else self.mlp(prefix + "mlp.", self.configuration.intermediate_size),
        )

    def linear_attention(self, prefix: str) -> LinearAttention:
        config, source = self.configuration, self.source
        heads, keys, values, size = (
            config.linear_num_value_heads,
            config.key_dim,
            config.value_dim,
            config.hidden_size,
        )
        if source.has(prefix + "in_proj_qkvz"):
            mixed = source.matrix(prefix + "in_proj_qkvz", 2 * keys + 2 * values, size)
            in_proj: Stacked = (take_rows(mixed, sorted_rows(config, values // heads)),)
            mixed = source.matrix(prefix + "in_proj_ba", 2 * heads, size)
            in_proj_ba: Stacked = (take_rows(mixed, sorted_ba(config)),)
        else:
            qkv = source.matrix(prefix + "in_proj_qkv", config.conv_dim, size)
            in_proj = stack_rows((qkv, source.matrix(prefix + "in_proj_z", values, size)))
            in_proj_ba = stack_rows([source.matrix(prefix + f"in_proj_{name}", heads, size) for name in "ba"])
        conv1d = source.tensor(prefix + "conv1d.weight", (config.conv_dim, 1, config.linear_conv_kernel_dim))
        return LinearAttention(
            in_proj=self.all_placed(in_proj),
            in_proj_ba=self.all_placed(in_proj_ba),
            conv1d=self.plain(conv1d[:, 0]).to(self.dtype),
            A_log=self.plain(source.tensor(prefix + "A_log", (heads,))).float(),
            dt_bias=self.plain(source.tensor(prefix + "dt_bias", (heads,))).float(),
            norm=self.plain(source.tensor(prefix + "norm.weight", (config.linear_value_head_dim,))),
            out_proj=self.placed(source.matrix(prefix + "out_proj", size, values)),
        )

    def full_attention(self, prefix: str) -> FullAttention:
        config, source = self.configuration, self.source
        heads, head_dim, size = config.num_attention_heads, config.head_dim, config.hidden_size
        queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
        mixed = source.matrix(prefix + "q_proj", 2 * queries, size)
        parts = [take_rows(mixed, _queries_then_gates(heads, head_dim))]
        parts += [source.matrix(prefix + f"{name}_proj", keys, size) for name in "kv"]
        return FullAttention(
            in_proj=self.all_placed(stack_rows(parts)),
            q_norm=self.norm(prefix + "q_norm", head_dim),
            k_norm=self.norm(prefix + "k_norm", head_dim),
            out_proj=self.placed(source.matrix(prefix + "o_proj", size, queries)),
        )

    def mlp(self, prefix: str, inner: int) -> MLP:
        size = self.configuration.hidden_size
        gate_up = stack_rows([self.source.matrix(prefix + f"{name}_proj", inner, size) for name in ("gate", "up")])
        down = self.source.matrix(prefix + "down_proj", size, inner)
        return MLP(self.all_placed(gate_up), self.placed(down))

    def experts(self, prefix: str) -> Experts:
        config, source = self.configuration, self.source
        count, inner, size = config.num_experts, config.moe_intermediate_size, config.hidden_size
        if source.has(prefix + "experts.gate_up_proj"):
            gate_up: Stacked = (source.stack(prefix + "experts.gate_up_proj", count, 2 * inner, size),)
        else:
            gate_up = stack_rows(
                [source.stack(prefix + f"experts.{name}_proj", count, inner, size) for name in ("gate", "up")]
            )
        router, shared_gate = (
            self.plain(source.tensor(prefix + name, (rows, size))).to(self.dtype)
            for name, rows in (("gate.weight", count), ("shared_expert_gate.weight", 1))
        )
        return Experts(
            router=router,
            gate_up=self.all_placed(gate_up),
            down=self.placed(source.stack(prefix + "experts.down_proj", count, size, inner)),
            shared=self.mlp(prefix + "shared_expert.", config.shared_expert_intermediate_size),
            shared_gate=shared_gate,
            per_token=config.num_experts_per_tok,
        )

    def prediction(self) -> Prediction:
        count, size = self.configuration.mtp_num_hidden_layers, self.configuration.hidden_size
        if count != 1:
            raise ValueError(
                f"the model has {count} prediction layers, and drafts need one: "
                + ("run it without --mtp" if count else "this checkpoint was saved without it; leave out --mtp")
            )
        return Prediction(
            embedding_norm=self.norm("mtp.pre_fc_norm_embedding"),
            hidden_norm=self.norm("mtp.pre_fc_norm_hidden"),
            fc=self.placed(self.source.matrix("mtp.fc", size, 2 * size)),
            layer=self.layer("mtp.layers.0.", is_full=True),
            norm=self.norm("mtp.norm"),
        )

    def norm(self, module: str, size: int | None = None) -> Tensor:
        return self.plain(self.source.tensor(module + ".weight", (size or self.configuration.hidden_size,)))

    def plain(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device).contiguous()

    def placed(self, weight: Weight) -> Weight:
        """On the device, and as its operations want it; a plain matrix in the dtype that the model computes in."""
        if isinstance(weight, QuantizedWeight):
            tensors = {name: getattr(weight, name) for name in ("codes", "scales", "zeros", "order")}
            moved = {name: tensor.to(self.device) for name, tensor in tensors.items() if tensor is not None}
            placed = replace(weight, **moved)
            return self.arrange(placed) if self.arrange else placed
        return weight.to(self.device, self.dtype).contiguous()

    def all_placed(self, weights: Iterable[Weight]) -> Stacked:
        return tuple(self.placed(weight) for weight in weights)


def _queries_then_gates(heads: int, head_dim: int) -> list[int]:
    """Rows of q_proj, head by head a query and its gate, as all queries and then all gates."""
    first = [2 * head * head_dim + row for head in range(heads) for row in range(head_dim)]
    return first + [row + head_dim for row in first]


def sorted_rows(config: Configuration, value_dim: int) -> list[int]:
    """Rows of in_proj_qkvz, key head by key head q, k, v, z, as all of q, of k, of v, of z."""
    per_key = config.linear_num_value_heads // config.linear_num_key_heads * value_dim
    key_dim = config.linear_key_head_dim
    return _regrouped(config.linear_num_key_heads, (key_dim, key_dim, per_key, per_key))


def sorted_ba(config: Configuration) -> list[int]:
    per_key = config.linear_num_value_heads // config.linear_num_key_heads
    return _regrouped(config.linear_num_key_heads, (per_key, per_key))


def _regrouped(heads: int, widths: tuple[int, ...]) -> list[int]:
    """Rows that come head by head in parts of `widths`, as part by part."""
    stride = sum(widths)
    return [
        head * stride + sum(widths[:part]) + row
        for part, width in enumerate(widths)
        for head in range(heads)
        for row in range(width)
    ]
