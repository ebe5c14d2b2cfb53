"""One decoder layer on the calibration tokens, in stages, so that each can be quantized before the next one runs.

    layer = DecoderLayer(weights, configuration, number)
    for stage in layer.stages:                    # "input", "core", "middle", "inner" (`modules.py`)
        x = layer.enter(stage, stream)            # what its matrices read, [N, columns]
        layer.weights["mlp.gate_proj"] = ...      # what they became
        layer.leave(stage, stream, x)             # goes on with those

Everything is float32, a sequence at a time on one thread each: the same bits come out whatever the number of threads,
and no padding or mask is needed. Weights stay in their own dtype and are widened some rows at a time; a quantized one
is put back as the float32 matrix that it stands for. Mixtures of experts have "experts" in place of the last two
stages: `quantize` walks through their experts by `route`.

The mathematics is that of `kernels/runtime/layers.py` with the operations of `kernels/operations.py`; attention within
whole sequences needs no cache, so it is torch's.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.operations import operations_for
from ..kernels.reference.attention import rope_tables
from ..kernels.runtime.assembly import sorted_ba, sorted_rows
from ..kernels.runtime.configuration import Configuration
from .activations import Activations
from .tasks import one_thread_each

ROW_BLOCK = 2048
EXPERTS = "experts"
_numbers = count()


@dataclass(slots=True, eq=False)
class Stream:
    """The calibration tokens on their way through the layers.

    hidden: float32 [N, E], N tokens of sequences of `length` laid end to end. inner: what the stage before left for the
    next, [N, ...]. folder: where activations go that are not to stay in memory; None keeps them there.
    """

    hidden: Activations
    length: int
    inner: Activations | None = None
    folder: str | None = None

    @property
    def spans(self) -> list[slice]:
        """One per sequence."""
        return [slice(at, at + self.length) for at in range(0, len(self.hidden), self.length)]

    def new(self, columns: int) -> Activations:
        """Room for what a stage computes, [N, columns]."""
        path = None if self.folder is None else os.path.join(self.folder, f"activations-{next(_numbers)}")
        return Activations(len(self.hidden), columns, self.hidden.device, path)


class DecoderLayer:
    """weights: by leaf, matrices without `.weight` (`mlp.gate_proj`), others by their whole name behind `layers.N.`."""

    def __init__(self, weights: Mapping[str, Tensor], configuration: Configuration, number: int) -> None:
        self.weights = dict(weights)
        self.configuration, self.number = configuration, number
        self.is_linear = configuration.layer_types[number] == "linear_attention"
        self.has_experts = "mlp.gate.weight" in self.weights
        self.stages = ("input", "core", "middle", EXPERTS) if self.has_experts else ("input", "core", "middle", "inner")
        device = next(iter(self.weights.values())).device
        self.operations = operations_for(device)

    def enter(self, stage: str, stream: Stream) -> Activations:
        """What the matrices of a stage read: float32 [N, columns]."""
        if stage in ("input", "middle"):
            name = "input_layernorm" if stage == "input" else "post_attention_layernorm"
            norm, eps = self.weights[f"{name}.weight"].float(), self.configuration.rms_norm_eps
            x = stream.new(stream.hidden.columns)
            _by_sequence(stream, x, lambda at: _rms_norm(stream.hidden[at], norm, eps))
            return x
        if stream.inner is None:
            raise ValueError(f"{stage} comes after the stage before it")
        return stream.inner

    def leave(self, stage: str, stream: Stream, x: Activations) -> None:
        """Go on behind the matrices of a stage, as they are now; x is freed, but for experts, who read it."""
        config = self.configuration
        if stage == "middle" and self.has_experts:
            stream.inner = x
            return
        if stage == "input":
            width = config.value_dim if self.is_linear else config.num_attention_heads * config.head_dim
            mix = self._linear_attention if self.is_linear else self._attention
            stream.inner = stream.new(width)
            _by_sequence(stream, stream.inner, lambda at: mix(x[at]))
        elif stage == "middle":
            stream.inner = stream.new(len(self.weights["mlp.up_proj"]))
            _by_sequence(stream, stream.inner, lambda at: self.gated(x[at], "mlp."))
        else:
            core = "linear_attn.out_proj" if self.is_linear else "self_attn.o_proj"
            leaf = core if stage == "core" else "mlp.down_proj"
            _by_sequence(stream, stream.hidden, lambda at: stream.hidden[at] + self.linear(x[at], leaf))
            stream.inner = None
        x.close()

    def linear(self, x: Tensor, leaf: str) -> Tensor:
        """x [T, K] times a matrix [N, K]: float32 [T, N]."""
        weight = self.weights[leaf]
        out = torch.empty(len(x), len(weight), device=x.device)
        for at in range(0, len(weight), ROW_BLOCK):
            out[:, at : at + ROW_BLOCK] = F.linear(x, weight[at : at + ROW_BLOCK].float())
        return out

    def gated(self, x: Tensor, prefix: str) -> Tensor:
        """silu(gate) times up of x [T, E]: [T, I]."""
        return F.silu(self.linear(x, f"{prefix}gate_proj")).mul_(self.linear(x, f"{prefix}up_proj"))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [N, k] that tokens go to, and their shares float32 [N, k] (transformers 5.23
        `modeling_qwen3_5_moe.py`, Qwen3_5MoeTopKRouter)."""
        shares = F.linear(x, self.weights["mlp.gate.weight"].float()).softmax(-1)
        top, chosen = shares.topk(self.configuration.num_experts_per_tok, dim=-1)
        return chosen, top / top.sum(-1, keepdim=True)

    def shared_gate(self, x: Tensor) -> Tensor:
        """How much of the shared expert a token takes, [N, 1]."""
        return torch.sigmoid(F.linear(x, self.weights["mlp.shared_expert_gate.weight"].float()))

    def _linear_attention(self, x: Tensor) -> Tensor:
        """Gated DeltaNet of one sequence of normed x [T, E], up to out_proj: [T, NV DV]."""
        config, operations = self.configuration, self.operations
        heads, value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        if "linear_attn.in_proj_qkvz" in self.weights:
            rows = torch.tensor(sorted_rows(config, config.value_dim // heads), device=x.device)
            mixed = self.linear(x, "linear_attn.in_proj_qkvz")[:, rows]
            qkv, z = mixed[:, : config.conv_dim].contiguous(), mixed[:, config.conv_dim :].contiguous()
            ba = self.linear(x, "linear_attn.in_proj_ba")[:, torch.tensor(sorted_ba(config), device=x.device)]
            b, a = (part.contiguous() for part in ba.chunk(2, dim=-1))
        else:
            qkv, z, a, b = (self.linear(x, f"linear_attn.in_proj_{name}") for name in ("qkv", "z", "a", "b"))
        slot = torch.zeros(1, dtype=torch.int32, device=x.device)
        bounds = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
        kernel = self.weights["linear_attn.conv1d.weight"][:, 0].float().contiguous()
        past = x.new_zeros(1, config.conv_dim, config.linear_conv_kernel_dim - 1)
        state = x.new_zeros(1, heads, value_dim, config.linear_key_head_dim)
        rates = (self.weights[f"linear_attn.{name}"].float() for name in ("A_log", "dt_bias"))
        qkv = operations.causal_conv1d_prefill(qkv, kernel, past, slot, bounds)
        out = operations.gated_delta_rule_prefill(qkv, a, b, *rates, state, slot, bounds, config.linear_num_key_heads)
        norm = self.weights["linear_attn.norm.weight"].float()
        out = operations.gated_rms_norm(
            out.view(len(x), heads, -1), z.view(len(x), heads, -1), norm, config.rms_norm_eps
        )
        return out.reshape(len(x), -1)

    def _attention(self, x: Tensor) -> Tensor:
        """Gated attention of one sequence of normed x [T, E], up to o_proj: [T, H D]."""
        config = self.configuration
        size, eps = config.head_dim, config.rms_norm_eps
        q, gate = self.linear(x, "self_attn.q_proj").view(len(x), -1, 2 * size).chunk(2, dim=-1)
        k, v = (self.linear(x, f"self_attn.{name}_proj").view(len(x), -1, size) for name in ("k", "v"))
        cos, sin = rope_tables(torch.arange(len(x), device=x.device), config.rope, size)
        q, k = (
            self.operations.rope(_rms_norm(heads, self.weights[f"self_attn.{name}_norm.weight"].float(), eps), cos, sin)
            for heads, name in ((q, "q"), (k, "k"))
        )
        q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        return (out * torch.sigmoid(gate)).reshape(len(x), -1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norms of the family multiply by 1 + weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def _by_sequence(stream: Stream, out: Activations, compute: Callable[[slice], Tensor]) -> None:
    """out[at] = compute(at) for every sequence, on one thread each."""

    def run(number: int) -> None:
        at = stream.spans[number]
        out[at] = compute(at)

    with one_thread_each(stream.hidden.device) as tasks:
        tasks.run(run, range(len(stream.spans)))
