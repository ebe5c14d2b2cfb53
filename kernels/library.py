"""The operations as torch's own, `torch.ops.qwenfit.*`: they can be compiled around, traced and captured.

Each has a schema that says which tensors it changes in place (caches and recurrent states), an implementation per
device (CUDA and ROCm: the Triton hosts; CPU: the C kernels or torch, `cpu/library.py`) and a fake one that knows shapes
only. A quantized weight travels as its tensors and four integers. The functions below have the signatures of the twins
and unpack such values; `library_operations` is all of them, for a model that is to be compiled.

A call takes 5 CPU microseconds more than the function behind it, and 11 with a quantized weight (15 as a
`torch.library.custom_op`; tests/bench/operation_calls.py). A model that runs eagerly takes `gpu/path.py` or
`cpu/path.py` and spares them; behind a compiler or in a graph they are not spent again.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout.kv_cache import KVCache
from .layout.packing import QuantizedWeight
from .operations import Operations

_LIBRARY = torch.library.Library("qwenfit", "DEF")
_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, int bits, int group_size, int rows, int columns"
_CACHE = "Tensor key_cache, Tensor value_cache, Tensor? key_scales, Tensor? value_scales"
_CHANGED_CACHE = "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!)? key_scales, Tensor(d!)? value_scales"
_DELTA = "Tensor qkv, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(s!) state"
SCHEMAS = {
    "quantized_matmul": f"(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor",
    "expert_matmul": f"(Tensor x, {_WEIGHT}, Tensor offsets) -> Tensor",
    "plain_expert_matmul": "(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    "causal_conv1d_prefill": "(Tensor x, Tensor weight, Tensor(s!) state, Tensor slots, Tensor cu_seqlens) -> Tensor",
    "causal_conv1d_update": "(Tensor x, Tensor weight, Tensor(s!) state, Tensor source, Tensor target) -> Tensor",
    "gated_delta_rule_prefill": f"({_DELTA}, Tensor slots, Tensor cu_seqlens, int key_heads) -> Tensor",
    "gated_delta_rule_step": f"({_DELTA}, Tensor source, Tensor target, int key_heads) -> Tensor",
    "gated_rms_norm": "(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rope": "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    "store_kv": f"({_CHANGED_CACHE}, Tensor keys, Tensor values, Tensor slots, Tensor positions) -> ()",
    "attention_prefill": f"(Tensor q, Tensor gate, {_CACHE}, Tensor slots, Tensor cu_seqlens, Tensor starts) -> Tensor",
    "attention_decode": f"(Tensor q, Tensor gate, {_CACHE}, Tensor slots, Tensor lengths) -> Tensor",
}


@cache
def hosts(device_type: str) -> Mapping[str, Callable[..., Any]]:
    """The functions that compute on a device, by the names of SCHEMAS; imported when they are first needed."""
    if device_type == "cuda":
        from .gpu.matmul import quantized_matmul
        from .gpu.path import triton_path

        operations = triton_path(torch.device("cuda"))
    else:
        from .cpu.matmul import quantized_matmul
        from .cpu.path import cpu_path

        operations = cpu_path()
    by_name = {name: getattr(operations, name) for name in SCHEMAS if hasattr(operations, name)}
    return {**by_name, "quantized_matmul": quantized_matmul}


def _run(name: str, device_type: str, *arguments: Any) -> Any:
    return hosts(device_type)[name](*arguments)


def _run_quantized_matmul(device_type: str, x: Tensor, *rest: Any) -> Tensor:
    return hosts(device_type)["quantized_matmul"](x, _weight(*rest[:8]), rest[8])


def _run_expert_matmul(device_type: str, x: Tensor, *rest: Any) -> Tensor:
    return hosts(device_type)["expert_matmul"](x, _weight(*rest[:8]), rest[8])


def _run_plain_expert_matmul(device_type: str, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return hosts(device_type)["expert_matmul"](x, weight, offsets)


def _run_store_kv(device_type: str, *arguments: Any) -> None:
    hosts(device_type)["store_kv"](KVCache(*arguments[:4]), *arguments[4:])


def _run_attention(name: str, device_type: str, q: Tensor, gate: Tensor, *rest: Any) -> Tensor:
    return hosts(device_type)[name](q, gate, KVCache(*rest[:4]), *rest[4:])


def _weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bits: int,
    group_size: int,
    rows: int,
    columns: int,
) -> QuantizedWeight:
    return QuantizedWeight(codes, scales, zeros, bits, group_size, rows, columns, order)


_RUNS: dict[str, Callable[..., Any]] = {
    "quantized_matmul": _run_quantized_matmul,
    "expert_matmul": _run_expert_matmul,
    "plain_expert_matmul": _run_plain_expert_matmul,
    "store_kv": _run_store_kv,
    "attention_prefill": partial(_run_attention, "attention_prefill"),
    "attention_decode": partial(_run_attention, "attention_decode"),
}


def _fake_matmul(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[6]))


def _fake_alike(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_delta(qkv: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], *state.shape[1:3]))


def _fake_attention(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-2], q.shape[-2] * q.shape[-1]))


_FAKES: dict[str, Callable[..., Any]] = {
    "quantized_matmul": _fake_matmul,
    "expert_matmul": _fake_matmul,
    "plain_expert_matmul": lambda x, weight, offsets: x.new_empty((x.shape[0], weight.shape[1])),
    "gated_delta_rule_prefill": _fake_delta,
    "gated_delta_rule_step": _fake_delta,
    "add_rms_norm": lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    "store_kv": lambda *_: None,
    "attention_prefill": _fake_attention,
    "attention_decode": _fake_attention,
}
for _name, _schema in SCHEMAS.items():
    # The kernels read rows by their strides: a compiler may fuse around an operation, not transpose what it is given.
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    for _device_type in ("cuda", "cpu"):
        _compute = _RUNS.get(_name, partial(_run, _name))
        _LIBRARY.impl(_name, partial(_compute, _device_type), _device_type.upper())
    torch.library.register_fake(f"qwenfit::{_name}", _FAKES.get(_name, _fake_alike), lib=_LIBRARY)

OPS: Any = {name: getattr(torch.ops.qwenfit, name).default for name in SCHEMAS}


def quantized_matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the matrix [N, K], plus bias [N] -> [..., N]."""
    return OPS["quantized_matmul"](x, *_parts(weight), bias)


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """x [..., K] times a matrix of either kind [N, K] -> [..., N]."""
    return quantized_matmul(x, weight) if isinstance(weight, QuantizedWeight) else F.linear(x, weight)


def expert_matmul(x: Tensor, weight: QuantizedWeight | Tensor, offsets: Tensor) -> Tensor:
    """Rows offsets[e]:offsets[e+1] of x [R, K] times matrix e of the stack [E, N, K] -> [R, N]."""
    if isinstance(weight, QuantizedWeight):
        return OPS["expert_matmul"](x, *_parts(weight), offsets)
    return OPS["plain_expert_matmul"](x, weight, offsets)


def store_kv(cache: KVCache, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
    """keys, values [T, KV, D] into the cache, which is changed in place."""
    OPS["store_kv"](cache.keys, cache.values, cache.key_scales, cache.value_scales, keys, values, slots, positions)


def attention_prefill(
    q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, cu_seqlens: Tensor, starts: Tensor
) -> Tensor:
    """q, gate [T, H, D] against the cache -> [T, H D]."""
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return OPS["attention_prefill"](q, gate, *tensors, slots, cu_seqlens, starts)


def attention_decode(q: Tensor, gate: Tensor, cache: KVCache, slots: Tensor, lengths: Tensor) -> Tensor:
    """q, gate [B, S, H, D] against the cache -> [B, S, H D]."""
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return OPS["attention_decode"](q, gate, *tensors, slots, lengths)


def library_operations() -> Operations:
    """All operations through torch's dispatcher, for a model that is compiled or traced, on whatever device it is."""
    plain = ("causal_conv1d_prefill", "causal_conv1d_update", "gated_delta_rule_prefill", "gated_delta_rule_step")
    norms = ("gated_rms_norm", "rms_norm", "add_rms_norm", "rope")
    return Operations(
        linear=linear,
        expert_matmul=expert_matmul,
        store_kv=store_kv,
        attention_prefill=attention_prefill,
        attention_decode=attention_decode,
        **{name: OPS[name] for name in (*plain, *norms)},
        choices={"everything": "torch.ops.qwenfit: by the device of the tensors"},
    )


def _parts(weight: QuantizedWeight) -> tuple[Any, ...]:
    return (
        *(weight.codes, weight.scales, weight.zeros, weight.order),
        *(weight.bits, weight.group_size, weight.rows, weight.columns),
    )
