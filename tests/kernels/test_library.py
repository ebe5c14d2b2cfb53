"""`torch.ops.qwenfit.*` on CPU tensors: schemas, fakes and mutations hold, the compiler traces through them.

`torch.library.opcheck` compares each operation with its schema (nothing else is changed, nothing aliased), with its
fake (shapes, dtypes, strides) and under aot_autograd with dynamic shapes. What they compute is tested where it is
written; here it is what the functions behind them compute.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenfit.kernels import library
from qwenfit.kernels.layout.kv_cache import KVCache, allocate_kv_cache
from qwenfit.kernels.layout.packing import quantize_rtn
from qwenfit.kernels.reference import attention as reference_attention
from qwenfit.kernels.reference import delta as reference_delta
from qwenfit.kernels.reference import dense as reference

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def of_cache(cache: KVCache) -> tuple[Tensor | None, ...]:
    return cache.keys, cache.values, cache.key_scales, cache.value_scales


def filled_cache(dtype: torch.dtype) -> KVCache:
    cache = allocate_kv_cache(2, 2, 64, 16, dtype)
    tokens = (random(6, 2, 16), random(6, 2, 16), indices(0, 0, 0, 1, 1, 1), indices(0, 1, 2, 0, 1, 2))
    reference_attention.store_kv(cache, *tokens)
    return cache


WEIGHT = quantize_rtn(random(24, 160), 4, 32, symmetric=False)
SYMMETRIC = quantize_rtn(random(24, 160), 8, 160)
STACK = quantize_rtn(random(3, 24, 160), 4, 32)
PARTS, PLAIN_PARTS, STACK_PARTS = ((*library._parts(weight),) for weight in (WEIGHT, SYMMETRIC, STACK))
DELTA = (random(5, 96), random(5, 2), random(5, 2), random(2), random(2))  # NK = 1, NV = 2, DK = 32, DV = 16
STEP = (random(2, 2, 96), random(2, 2, 2), random(2, 2, 2), random(2), random(2))
QUERIES = (random(5, 4, 16), random(5, 4, 16))


def cases() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Name -> operation and arguments, made anew: operations change some of them."""
    states = [torch.zeros(4, 2, 16, 32) + 0.1 for _ in range(2)]
    columns = [random(4, 8, 3) for _ in range(2)]
    lengths = indices(0, 2, 5)
    return {
        "matmul": ("quantized_matmul", (random(3, 160), *PARTS, random(24))),
        "matmul in three dimensions": ("quantized_matmul", (random(2, 3, 160).bfloat16(), *PLAIN_PARTS, None)),
        "experts": ("expert_matmul", (random(4, 160), *STACK_PARTS, indices(0, 1, 1, 4))),
        "plain experts": ("plain_expert_matmul", (random(4, 8), random(3, 6, 8), indices(0, 1, 1, 4))),
        "conv": ("causal_conv1d_prefill", (random(5, 8), random(8, 4), columns[0], indices(1, 3), lengths)),
        "conv step": (
            "causal_conv1d_update",
            (random(2, 2, 8), random(8, 4), columns[1], indices(0, 2), indices(0, 1, 2, 3).view(2, 2)),
        ),
        "delta": ("gated_delta_rule_prefill", (*DELTA, states[0], indices(1, 3), lengths, 1)),
        "delta step": (
            "gated_delta_rule_step",
            (*STEP, states[1], indices(0, 2), indices(0, 1, 2, 3).view(2, 2), 1),
        ),
        "gated norm": ("gated_rms_norm", (random(3, 16), random(3, 16), random(16), 1e-6)),
        "norm": ("rms_norm", (random(3, 16).bfloat16(), random(16).bfloat16(), 1e-6)),
        "norm of a sum": ("add_rms_norm", (random(3, 16), random(3, 16), random(16), 1e-6)),
        "rope": ("rope", (random(3, 2, 16), random(3, 4), random(3, 4))),
        "store": (
            "store_kv",
            (*of_cache(filled_cache(torch.float32)), random(2, 2, 16), random(2, 2, 16), indices(0, 1), indices(3, 3)),
        ),
        "store as int8": (
            "store_kv",
            (*of_cache(filled_cache(torch.int8)), random(2, 2, 16), random(2, 2, 16), indices(0, 1), indices(3, 3)),
        ),
        "prefill": (
            "attention_prefill",
            (*QUERIES, *of_cache(filled_cache(torch.float32)), indices(0, 1), lengths, indices(0, 0)),
        ),
        "decode": (
            "attention_decode",
            (
                random(2, 1, 4, 16),
                random(2, 1, 4, 16),
                *of_cache(filled_cache(torch.int8)),
                indices(0, 1),
                indices(2, 2),
            ),
        ),
    }


def test_every_operation_is_here() -> None:
    from qwenfit.kernels.dispatch import OPERATIONS

    assert {operation for operation, _ in cases().values()} == set(library.SCHEMAS)
    assert set(library.SCHEMAS) == {*OPERATIONS, "plain_expert_matmul"}


@pytest.mark.parametrize("name", cases())
def test_schemas_fakes_and_mutations_hold(name: str) -> None:
    operation, arguments = cases()[name]
    torch.library.opcheck(library.OPS[operation], arguments)


TWINS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_prefill": reference.causal_conv1d_prefill,
    "causal_conv1d_update": reference.causal_conv1d_update,
    "gated_delta_rule_prefill": reference_delta.gated_delta_rule_prefill,
    "gated_delta_rule_step": reference_delta.gated_delta_rule_step,
    "gated_rms_norm": reference.gated_rms_norm,
    "rms_norm": reference.rms_norm,
    "add_rms_norm": reference.add_rms_norm,
    "rope": reference_attention.rope,
}


@pytest.mark.parametrize("name", [name for name, (operation, _) in cases().items() if operation in TWINS])
def test_operations_take_the_arguments_of_their_twins(name: str) -> None:
    """In their order, with the same results and the same changes in place (to float32's or bfloat16's rounding)."""
    operation, arguments = cases()[name]
    copies = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    results, expected = library.OPS[operation](*arguments), TWINS[operation](*copies)
    tolerance = 1e-2 if arguments[0].dtype == torch.bfloat16 else 2e-4
    torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(list(arguments), copies, rtol=tolerance, atol=tolerance)


def test_functions_unpack_weights_and_caches() -> None:
    operations = library.library_operations()
    x, q, gate = random(3, 160), random(2, 1, 4, 16), random(2, 1, 4, 16)
    torch.testing.assert_close(
        operations.linear(x, WEIGHT), reference.quantized_matmul(x, WEIGHT), rtol=1e-3, atol=1e-3
    )
    plain = random(7, 160)
    torch.testing.assert_close(operations.linear(x, plain), x @ plain.T)
    offsets = indices(0, 1, 1, 3)
    expected = reference.expert_matmul(x, STACK, offsets)
    torch.testing.assert_close(operations.expert_matmul(x, STACK, offsets), expected, rtol=1e-3, atol=1e-3)
    stack = random(3, 5, 160)
    expected = reference.expert_matmul(x, stack, offsets)
    torch.testing.assert_close(operations.expert_matmul(x, stack, offsets), expected, rtol=1e-3, atol=1e-3)
    cache = filled_cache(torch.float32)
    twin = KVCache(cache.keys.clone(), cache.values.clone())
    tokens = (random(2, 2, 16), random(2, 2, 16), indices(0, 1), indices(3, 3))
    operations.store_kv(cache, *tokens)
    reference_attention.store_kv(twin, *tokens)
    assert torch.equal(cache.keys, twin.keys) and torch.equal(cache.values, twin.values)
    where = (indices(0, 1), indices(3, 3))
    expected = reference_attention.attention_decode(q, gate, twin, *where)
    torch.testing.assert_close(operations.attention_decode(q, gate, cache, *where), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_a_layer_compiles_in_one_graph(backend: str) -> None:
    """Norm, matmul, a state changed in place and its result, without a break in the graph."""
    operations = library.library_operations()
    norm, conv = random(160), random(24, 4)

    def layer(x: Tensor, state: Tensor) -> Tensor:
        projected = operations.linear(operations.rms_norm(x, norm, 1e-6), WEIGHT)
        return operations.causal_conv1d_prefill(projected, conv, state, indices_of_slots, ends) * 2

    indices_of_slots, ends = indices(0), indices(0, 5)
    x, states = random(5, 160), [torch.zeros(1, 24, 3) for _ in range(2)]
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, states[0]), layer(x, states[1]))
    torch.testing.assert_close(*states)
    assert states[0].abs().sum() > 0
