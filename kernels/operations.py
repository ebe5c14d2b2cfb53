"""The operations that the model is built on, as one value per device: the twins, Triton, or the CPU path.

A model calls `operations.rms_norm(...)` and does not know who answers. What each computes, with shapes and dtypes,
stands at its twin in `reference/dense.py`, `reference/delta.py` and `reference/attention.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout.packing import QuantizedWeight
from .reference import attention as reference_attention
from .reference import delta as reference_delta
from .reference import dense as reference


@dataclass(frozen=True, slots=True, eq=False)
class Operations:
    """One function per operation, all with the signatures of their twins; `linear` takes either kind of matrix.

    decode: None, or the forward pass of a decode step as one program, in place of the operations one by one:
        decode(model, tokens int64 [B S], step, buffers) -> hidden states after the final norm [B S, E]. It may keep
        what it compiles, with the addresses of weights and buffers in it, in `buffers.programs`.
    arrange: None, or how a quantized matrix should lie in memory for these operations (`layout/tiles.py`). Called once
        for each, when a model is put together.
    choices: which path each operation takes, and why, for people.
    """

    linear: Callable[..., Tensor]
    expert_matmul: Callable[..., Tensor]
    causal_conv1d_prefill: Callable[..., Tensor]
    causal_conv1d_update: Callable[..., Tensor]
    gated_delta_rule_prefill: Callable[..., Tensor]
    gated_delta_rule_step: Callable[..., Tensor]
    gated_rms_norm: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope: Callable[..., Tensor]
    store_kv: Callable[..., None]
    attention_prefill: Callable[..., Tensor]
    attention_decode: Callable[..., Tensor]
    decode: Callable[..., Tensor] | None = None
    arrange: Callable[[QuantizedWeight], QuantizedWeight] | None = None
    choices: Mapping[str, str] = field(default_factory=dict)


def reference_linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """x [..., K] times weight [N, K] -> [..., N]."""
    if isinstance(weight, QuantizedWeight):
        return reference.quantized_matmul(x, weight)
    return F.linear(x, weight)


REFERENCE = Operations(
    linear=reference_linear,
    expert_matmul=reference.expert_matmul,
    causal_conv1d_prefill=reference.causal_conv1d_prefill,
    causal_conv1d_update=reference.causal_conv1d_update,
    gated_delta_rule_prefill=reference_delta.gated_delta_rule_prefill,
    gated_delta_rule_step=reference_delta.gated_delta_rule_step,
    gated_rms_norm=reference.gated_rms_norm,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rope=reference_attention.rope,
    store_kv=reference_attention.store_kv,
    attention_prefill=reference_attention.attention_prefill,
    attention_decode=reference_attention.attention_decode,
)


def operations_for(device: torch.device | str) -> Operations:
    """The operations for a device: Triton's on CUDA and ROCm, those of the CPU path on a CPU."""
    if torch.device(device).type == "cuda":
        from .gpu.path import triton_path

        return triton_path(device)
    from .cpu.path import cpu_path

    return cpu_path()
