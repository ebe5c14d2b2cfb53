"""The delta rule, its convolution and the norms in the GPU bench."""

from typing import Any

import torch
from torch import Tensor

from ..gpu.conv import causal_conv1d_prefill, causal_conv1d_update
from ..gpu.delta_decode import gated_delta_rule_step
from ..gpu.delta_prefill import gated_delta_rule_prefill
from ..gpu.norm import add_rms_norm, gated_rms_norm, rms_norm
from ..reference import delta as reference_delta
from ..reference import dense as reference
from .bench_rivals import delta_rivals
from .bench_work import EPS, Setting, Work


def delta_work(
    setting: Setting,
    models: tuple[str, ...],
    tokens: int,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
) -> Work:
    """A step of as many sequences, or one prompt; the state is float32, and lives on from call to call."""
    sequences = setting.sequences(tokens)
    state_bytes = 4 * sequences * value_heads * value_dim * key_dim
    copies = setting.copies_for(2 * state_bytes)
    state = 0.1 * torch.randn(copies, sequences, value_heads, value_dim, key_dim, device=setting.device)
    start, width = state[0].clone(), 2 * key_heads * key_dim + value_heads * value_dim
    qkv, a, b = (setting.random(tokens, columns) for columns in (width, value_heads, value_heads))
    A_log, dt_bias = torch.rand(value_heads, device=setting.device), torch.randn(value_heads, device=setting.device)
    slots = setting.int32(range(sequences))
    own: Any
    twin: Any
    rest: tuple[Tensor, ...]
    if tokens == sequences:
        own, twin, rest = gated_delta_rule_step, reference_delta.gated_delta_rule_step, (slots, slots[:, None])
        qkv, a, b = qkv[:, None], a[:, None], b[:, None]
    else:
        own, twin = gated_delta_rule_prefill, reference_delta.gated_delta_rule_prefill
        rest = (slots, setting.int32((0, tokens)))
    return Work(
        operation=own.__name__,
        shape=f"{key_heads}/{value_heads} heads of {key_dim} x {value_dim}",
        models=models,
        tokens=tokens,
        bytes=2 * state_bytes + qkv.element_size() * tokens * (width + value_heads * (value_dim + 2)),
        flops=7 * tokens * value_heads * value_dim * key_dim,
        copies=copies,
        run=lambda i: own(qkv, a, b, A_log, dt_bias, state[i], *rest, key_heads),
        twin=lambda dtype: twin(
            *(x.to(dtype) for x in (qkv, a, b)),
            *(x.to(_at_least_float32(dtype)) for x in (A_log, dt_bias)),
            start.to(_at_least_float32(dtype)).clone(),
            *rest,
            key_heads,
        ),
        rivals=delta_rivals((qkv, a, b, A_log, dt_bias), start, key_heads, copies, 2 * state_bytes),
    )


def conv_work(setting: Setting, models: tuple[str, ...], tokens: int, channels: int, taps: int) -> Work:
    """The depthwise convolution in front of the delta rule: a step of as many sequences, or one prompt."""
    sequences = setting.sequences(tokens)
    weight, x = setting.random(channels, taps), setting.random(tokens, channels)
    state_bytes = weight.element_size() * sequences * channels * (taps - 1)
    copies = setting.copies_for(2 * state_bytes + weight.element_size() * 2 * x.numel())
    inputs = [x, *(setting.random(tokens, channels) for _ in range(copies - 1))]
    state = [setting.random(sequences, channels, taps - 1) for _ in range(copies)]
    start, slots = state[0].clone(), setting.int32(range(sequences))
    if tokens == sequences:
        own, twin, rest = causal_conv1d_update, reference.causal_conv1d_update, (slots, slots[:, None])
        inputs = [rows[:, None] for rows in inputs]
    else:
        own, twin = causal_conv1d_prefill, reference.causal_conv1d_prefill
        rest = (slots, setting.int32((0, tokens)))
    return Work(
        operation=own.__name__,
        shape=f"{channels} channels, {taps} taps",
        models=models,
        tokens=tokens,
        bytes=2 * state_bytes + weight.element_size() * (weight.numel() + 2 * x.numel()),
        flops=2 * taps * x.numel(),
        copies=copies,
        run=lambda i: own(inputs[i], weight, state[i], *rest),
        twin=lambda dtype: twin(inputs[0].to(dtype), weight.to(dtype), start.to(dtype).clone(), *rest),
    )


def norm_work(setting: Setting, models: tuple[str, ...], tokens: int, hidden: int, kind: str) -> Work:
    """kind: rms_norm, or add_rms_norm with a residual."""
    passes = 4 if kind == "add_rms_norm" else 2
    copies = setting.copies_for(passes * 2 * tokens * hidden)
    rows = [setting.random(tokens, hidden) for _ in range(copies)]
    residual, weight = setting.random(tokens, hidden), setting.random(hidden, scale=0.1)

    def run(i: int) -> Tensor:
        return rms_norm(rows[i], weight, EPS) if passes == 2 else add_rms_norm(rows[i], residual, weight, EPS)[0]

    def twin(dtype: torch.dtype) -> Tensor:
        x, wide = rows[0].to(dtype), weight.to(dtype)
        if passes == 2:
            return reference.rms_norm(x, wide, EPS)
        # The sum is what the layer goes on with, rounded; the norm is of that.
        return reference.rms_norm((rows[0] + residual).to(dtype), wide, EPS)

    return Work(
        operation=kind,
        shape=str(hidden),
        models=models,
        tokens=tokens,
        bytes=passes * rows[0].element_size() * rows[0].numel(),
        flops=5 * rows[0].numel(),
        copies=copies,
        run=run,
        twin=twin,
    )


def gated_norm_work(setting: Setting, models: tuple[str, ...], tokens: int, heads: int, size: int) -> Work:
    """The norm behind the delta rule, per head, times silu(gate)."""
    copies = setting.copies_for(3 * 2 * tokens * heads * size)
    rows = [setting.random(tokens, heads, size) for _ in range(copies)]
    gate, weight = setting.random(tokens, heads, size), torch.rand(size, device=setting.device)
    return Work(
        operation="gated_rms_norm",
        shape=f"{heads} heads of {size}",
        models=models,
        tokens=tokens,
        bytes=3 * gate.element_size() * gate.numel(),
        flops=8 * gate.numel(),
        copies=copies,
        run=lambda i: gated_rms_norm(rows[i], gate, weight, EPS),
        twin=lambda dtype: reference.gated_rms_norm(rows[0].to(dtype), gate.to(dtype), weight, EPS),
    )


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What stays in float32 in a model of 16 bits: decay rates and state."""
    return torch.promote_types(dtype, torch.float32)
