"""The layers of Qwen3.5: their weights, as frozen values, and what they compute with the operations of `operations.py`.

Letters as in `reference/dense.py`: T tokens laid end to end, B sequences, S new tokens of each (a decode step has T = B
S), E hidden size; H, KV, D of full attention; NK, NV, DK, DV, C of linear attention; I inner size of an MLP.

Matrices that share an input lie in one, so that one kernel launch serves them: "in_proj" of linear attention is
queries, keys, values and z; of full attention queries, gates, keys and values; gate and up of an MLP. Their rows are in
this order whatever the checkpoint's is (`loading.py`). Where a checkpoint quantizes such neighbours differently they
stay apart: so a `Stacked` is a tuple of one or more weights, whose outputs are laid side by side.

Every tensor is a plain attribute that never moves: a compiled program (the CPU's decode in C, a CUDA graph) may keep
its address as long as it keeps the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout.kv_cache import KVCache
from ..layout.rows import Stacked, Weight
from ..operations import Operations
from .configuration import Configuration


@dataclass(frozen=True, slots=True, eq=False)
class PrefillStep:
    """Chunks of B prompts, laid end to end.

    sequences int32 [B]: their rows in the caches; slots int32 [B]: where their states are, read and written.
    cu_seqlens int32 [B + 1]; starts int32 [B]: tokens of each that are in the cache already.
    token_sequences, positions int32 [T]: of every token; cos, sin float32 [T, R / 2].
    """

    sequences: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    starts: Tensor
    token_sequences: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStep:
    """S new tokens of each of B sequences, as [B, S] in sequence order.

    sequences int32 [B]: their rows in the caches; lengths int32 [B]: tokens in the cache before these.
    source int32 [B], target int32 [B, S]: slots that states are read from, and written to after every token.
    token_sequences, positions int32 [B S]; cos, sin float32 [B S, R / 2].
    """

    sequences: Tensor
    lengths: Tensor
    source: Tensor
    target: Tensor
    token_sequences: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor


Step = PrefillStep | DecodeStep


@dataclass(frozen=True, slots=True, eq=False)
class LinearAttention:
    """Gated DeltaNet.

    in_proj: rows [C + NV DV] of queries, keys, values, z; in_proj_ba: rows [2 NV] of b, then a.
    conv1d [C, W]; A_log, dt_bias float32 [NV]; norm [DV], a plain weight; out_proj [E, NV DV].
    """

    in_proj: Stacked
    in_proj_ba: Stacked
    conv1d: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    out_proj: Weight


@dataclass(frozen=True, slots=True, eq=False)
class FullAttention:
    """Attention with an output gate.

    in_proj: rows [2 H D + 2 KV D] of all queries, all gates, all keys, all values; q_norm, k_norm [D]; out_proj [E, H
    D].
    """

    in_proj: Stacked
    q_norm: Tensor
    k_norm: Tensor
    out_proj: Weight


@dataclass(frozen=True, slots=True, eq=False)
class MLP:
    """gate_up: rows [2 I] of gate, then up; down [E, I]."""

    gate_up: Stacked
    down: Weight


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A mixture of experts beside one that all tokens share.

    router [experts, E]; gate_up: stacks [experts, 2 I, E], or two of [experts, I, E]; down: a stack [experts, E, I];
    shared_gate [1, E]; per_token: experts that a token is routed to.
    """

    router: Tensor
    gate_up: Stacked
    down: Weight
    shared: MLP
    shared_gate: Tensor
    per_token: int


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A decoder layer: input_norm, attention, post_norm, mlp. Norm weights [E] are stored around 0."""

    input_norm: Tensor
    attention: LinearAttention | FullAttention
    post_norm: Tensor
    mlp: MLP | Experts


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The layer of multi-token prediction: fc [E, 2 E] of [embedding, hidden], one full-attention layer, a norm."""

    embedding_norm: Tensor
    hidden_norm: Tensor
    fc: Weight
    layer: Layer
    norm: Tensor


def project(x: Tensor, weights: Stacked, operations: Operations) -> Tensor:
    """x [T, K] times every weight [N, K] -> [T, N of all together]."""
    if len(weights) == 1:
        return operations.linear(x, weights[0])
    return torch.cat([operations.linear(x, weight) for weight in weights], dim=-1)


def attend_linearly(
    layer: LinearAttention,
    x: Tensor,
    step: Step,
    state: Tensor,
    conv_state: Tensor,
    configuration: Configuration,
    operations: Operations,
) -> Tensor:
    """Gated DeltaNet of normed x [T, E] -> [T, E]; `state` and `conv_state` are read and written at its slots."""
    tokens, channels, heads = x.shape[0], configuration.conv_dim, configuration.linear_num_value_heads
    projected = project(x, layer.in_proj, operations)
    b, a = project(x, layer.in_proj_ba, operations).chunk(2, dim=-1)
    qkv, z = projected[:, :channels], projected[:, channels:].contiguous()
    per_rule = (layer.A_log, layer.dt_bias, state)
    if isinstance(step, PrefillStep):
        qkv = operations.causal_conv1d_prefill(qkv, layer.conv1d, conv_state, step.slots, step.cu_seqlens)
        del projected  # before the delta rule, which holds more than anything else
        where = (step.slots, step.cu_seqlens, configuration.linear_num_key_heads)
        out = operations.gated_delta_rule_prefill(qkv, a, b, *per_rule, *where)
    else:
        qkv, a, b = (_by_sequence(tensor, step) for tensor in (qkv, a, b))
        qkv = operations.causal_conv1d_update(qkv, layer.conv1d, conv_state, step.source, step.target)
        where = (step.source, step.target, configuration.linear_num_key_heads)
        out = operations.gated_delta_rule_step(qkv, a, b, *per_rule, *where)
    del qkv
    out, z = out.view(tokens, heads, -1), z.unflatten(-1, (heads, -1))
    out = operations.gated_rms_norm(out, z, layer.norm, configuration.rms_norm_eps)
    del z
    return operations.linear(out.view(tokens, -1), layer.out_proj)


def attend(
    layer: FullAttention, x: Tensor, step: Step, cache: KVCache, configuration: Configuration, operations: Operations
) -> Tensor:
    """Gated attention of normed x [T, E] -> [T, E]; keys and values of the tokens are stored in `cache` first."""
    heads, kv_heads, size = configuration.num_attention_heads, configuration.num_key_value_heads, configuration.head_dim
    eps = configuration.rms_norm_eps
    projected = project(x, layer.in_proj, operations)
    widths = (heads * size, heads * size, kv_heads * size, kv_heads * size)
    q, gate, k, v = (part.unflatten(-1, (-1, size)) for part in projected.split(widths, dim=-1))
    k = operations.rope(operations.rms_norm(k.contiguous(), layer.k_norm, eps), step.cos, step.sin)
    operations.store_kv(cache, k, v, step.token_sequences, step.positions)
    del k, v
    q = operations.rope(operations.rms_norm(q.contiguous(), layer.q_norm, eps), step.cos, step.sin)
    if isinstance(step, PrefillStep):
        out = operations.attention_prefill(q, gate, cache, step.sequences, step.cu_seqlens, step.starts)
    else:
        q, gate = (_by_sequence(tensor, step) for tensor in (q, gate))
        out = operations.attention_decode(q, gate, cache, step.sequences, step.lengths).flatten(0, 1)
    del projected, q, gate
    return operations.linear(out, layer.out_proj)


def feed_forward(layer: MLP | Experts, x: Tensor, operations: Operations) -> Tensor:
    """The MLP or the mixture of experts of normed x [T, E] -> [T, E]."""
    if isinstance(layer, MLP):
        return operations.linear(_gated(project(x, layer.gate_up, operations)), layer.down)
    routed = route(layer, x, operations)
    shared = feed_forward(layer.shared, x, operations)
    shared *= torch.sigmoid(F.linear(x, layer.shared_gate))
    return routed.add_(shared)


def route(layer: Experts, x: Tensor, operations: Operations) -> Tensor:
    """The routed experts of x [T, E] -> [T, E], weighted by the softmax over the chosen ones.

    Rows are sorted by expert and taken back by the inverse order, so nothing is added atomically and nothing waits for
    the host. Weights are float32 until they are rounded to x's dtype, as in transformers' Qwen3_5MoeTopKRouter.
    """
    tokens, experts = x.shape[0], layer.router.shape[0]
    shares = F.linear(x, layer.router).softmax(-1, dtype=torch.float32)
    shares, chosen = shares.topk(layer.per_token, dim=-1)
    shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
    by_expert, order = chosen.flatten().sort(stable=True)
    offsets = torch.searchsorted(by_expert, torch.arange(experts + 1, device=x.device), out_int32=True)
    rows = x[order // layer.per_token]
    inner = [operations.expert_matmul(rows, weight, offsets) for weight in layer.gate_up]
    inner = _gated(inner[0] if len(inner) == 1 else torch.cat(inner, dim=-1))
    out = operations.expert_matmul(inner, layer.down, offsets)
    del inner
    torch.index_select(out, 0, order.argsort(), out=rows)
    return torch.bmm(shares[:, None], rows.unflatten(0, (tokens, -1)))[:, 0]


def _by_sequence(x: Tensor, step: DecodeStep) -> Tensor:
    """x [B S, ...] as [B, S, ...]; a view would give a dimension of one token any stride, and kernels look at it."""
    batch, tokens = step.target.shape
    return x.as_strided((batch, tokens, *x.shape[1:]), (tokens * x.stride(0), *x.stride()))


def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) times up of [T, 2 I] -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
