"""The gated delta rule in plain torch: token by token, in chunks, and as the model calls it. Twin of the delta kernels.

Per value head, with a state S [DV, DK] that maps a key to a value, a decay e^g <= 1 and a strength beta:

    S <- e^g S;    d = beta (v - S k);    S <- S + d k^T;    o = S q

(Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv 2412.06464, equation 10, transposed.) The state is V-major,
[.., DV, DK], so that the products with k and q run along neighbouring elements.

In chunks of C tokens the same is two triangular solves and a few matmuls. With c_i = g_1 + ... + g_i inside a chunk and
G_ij = e^(c_i - c_j) for i >= j:

    A_ij = beta_i G_ij (k_i . k_j) for i > j         (I + A) d = beta (v - e^c S k), the rows of d at once
    O = e^c (Q S^T) + (G * Q K^T) d                  S <- e^c_C S + d^T (e^(c_C - c) K)

Every exponent is a sum of g over a stretch of tokens and is summed as such, never as a difference of two long sums: so
no digits are lost after a reset (g very negative), and g = -inf gives 0, not inf - inf.

Letters: T tokens, NK key heads, NV value heads, DK and DV their sizes; others as in `dense.py`. Value head j uses
key head j // (NV // NK).
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .dense import accumulation_dtype, spans

L2_EPS = 1e-6
CHUNK_TOKENS = 64


def gated_delta_rule_prefill(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    key_heads: int,
) -> Tensor:
    """The delta rule over T tokens of several sequences -> [T, NV, DV] in qkv's dtype.

    qkv: [T, 2 NK DK + NV DV], the convolution's output: queries, keys, values. a, b: [T, NV]. A_log, dt_bias: [NV].
    state: [slots, NV, DV, DK] float32 or bfloat16, read from slots[b] and replaced there. Between chunks it stays in
    the accumulation dtype, and is rounded once, at the end of the sequence.
    """
    q, k, v, g, beta = delta_inputs(qkv, a, b, A_log, dt_bias, state.shape[-1], state.shape[-2], key_heads)
    result = torch.empty(v.shape, dtype=qkv.dtype, device=qkv.device)
    for slot, (begin, end) in zip(slots.tolist(), spans(cu_seqlens), strict=True):
        part = slice(begin, end)
        out, after = gated_delta_rule_chunked(q[part], k[part], v[part], g[part], beta[part], state[slot])
        result[part], state[slot] = out.to(qkv.dtype), after.to(state.dtype)
    return result


def gated_delta_rule_step(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    source: Tensor,
    target: Tensor,
    key_heads: int,
) -> Tensor:
    """The delta rule for S new tokens of each of B sequences -> [B, S, NV, DV] in qkv's dtype.

    qkv [B, S, 2 NK DK + NV DV], a and b [B, S, NV]; the state of sequence b comes from state[source[b]], and after
    token s goes to state[target[b, s]]. From token to token it stays in the accumulation dtype, unrounded.
    """
    q, k, v, g, beta = delta_inputs(qkv, a, b, A_log, dt_bias, state.shape[-1], state.shape[-2], key_heads)
    result = torch.empty(v.shape, dtype=qkv.dtype, device=qkv.device)
    for i, (slot, targets) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        running = state[slot].to(v.dtype)
        for s, goal in enumerate(targets):
            token = (i, slice(s, s + 1))
            out, running = gated_delta_rule_recurrent(q[token], k[token], v[token], g[token], beta[token], running)
            result[token], state[goal] = out.to(qkv.dtype), running.to(state.dtype)
    return result


def delta_inputs(
    qkv: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, key_dim: int, value_dim: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k [..., NV, DK] (normalized, q scaled, repeated), v [..., NV, DV], g, beta [..., NV], accumulation dtype.

    l2norm x / sqrt(sum x^2 + 1e-6), q times DK^-0.5, g = -e^A_log softplus(a + dt_bias), beta = sigmoid(b)
    (transformers 5.23 `modeling_qwen3_5.py`, Qwen3_5GatedDeltaNet.forward and l2norm).
    """
    wide, value_heads = accumulation_dtype(qkv), a.shape[-1]
    keys, values = key_heads * key_dim, value_heads * value_dim
    if qkv.shape[-1] != 2 * keys + values or value_heads % key_heads:
        raise ValueError(
            f"qkv has {qkv.shape[-1]} channels, but {key_heads} key heads of {key_dim} and "
            f"{value_heads} value heads of {value_dim} make {2 * keys + values}"
        )
    q, k, v = qkv.to(wide).split((keys, keys, values), dim=-1)
    q, k = (_l2_normalized(x.unflatten(-1, (key_heads, key_dim))) for x in (q, k))
    q, k = (x.repeat_interleave(value_heads // key_heads, dim=-2) for x in (q * key_dim**-0.5, k))
    g = -A_log.to(wide).exp() * softplus(a.to(wide) + dt_bias.to(wide))
    return q, k, v.unflatten(-1, (value_heads, value_dim)), g, torch.sigmoid(b.to(wide))


def gated_delta_rule_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence, token by token: q, k [T, NV, DK], v [T, NV, DV], g, beta [T, NV], state [NV, DV, DK].

    Returns the outputs [T, NV, DV] and the state after them, both in v's dtype (float32 or float64). q and k come
    normalized, scaled and repeated (`delta_inputs`).
    """
    state, result = state.to(v.dtype), torch.empty_like(v)
    for t in range(v.shape[0]):
        state = state * g[t].exp()[:, None, None]
        correction = beta[t, :, None] * (v[t] - (state @ k[t, :, :, None]).squeeze(-1))
        state = state + correction[:, :, None] * k[t, :, None, :]
        result[t] = (state @ q[t, :, :, None]).squeeze(-1)
    return result, state


def gated_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """The same as `gated_delta_rule_recurrent`, `chunk` tokens at a time; the last chunk may be shorter."""
    state, result = state.to(v.dtype), torch.empty_like(v)
    for begin in range(0, v.shape[0], chunk):
        part = slice(begin, begin + chunk)
        q_part, k_part, v_part, g_part, beta_part = (x[part].transpose(0, 1) for x in (q, k, v, g, beta))
        out, state = _delta_rule_chunk(q_part, k_part, v_part, g_part, beta_part, state)
        result[part] = out.transpose(0, 1)
    return result, state


def _delta_rule_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk, heads first: q, k [NV, C, DK], v [NV, C, DV], g, beta [NV, C], state [NV, DV, DK]."""
    tokens = g.shape[1]
    after = torch.ones(tokens, tokens, dtype=torch.bool, device=g.device).tril(-1)  # token i comes after token j
    stretches = g[:, :, None].expand(-1, -1, tokens).where(after, 0).cumsum(1)  # [NV, i, j]: g_j+1 + ... + g_i
    decay = stretches.exp().tril()
    since_start, until_end = g.cumsum(1).exp()[..., None], decay[:, -1, :, None]
    system = (beta[..., None] * decay * (k @ k.mT)).tril(-1)
    wanted = beta[..., None] * (v - since_start * (k @ state.mT))
    corrections = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = since_start * (q @ state.mT) + (decay * (q @ k.mT)) @ corrections
    return out, since_start[:, -1:] * state + corrections.mT @ (until_end * k)


def _l2_normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
