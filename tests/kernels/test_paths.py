"""Every path's operations (Triton's kernels in the interpreter, the C kernels) against the twins in float64.

The bound is that of the same twin in the path's own dtype: 1.5 times its relative error, and one rounding of the
result. Sizes do not divide by any tile; the files of the single kernels go deeper.
"""

from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, signature
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenfit.kernels.cpu.path import cpu_path
from qwenfit.kernels.layout.kv_cache import KVCache
from qwenfit.kernels.layout.packing import quantize_rtn
from qwenfit.kernels.operations import REFERENCE, Operations

DTYPES = {torch.bfloat16: 2**-9, torch.float32: 2e-7}  # and half a unit in the last place, or some sums of float32


def triton_operations() -> Operations:
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    from qwenfit.kernels.gpu.path import triton_path

    return triton_path("cpu")


PATHS = {"triton": triton_operations, "cpu": cpu_path}
cases = [
    pytest.param(path, dtype, id=f"{path}-{str(dtype).removeprefix('torch.')}") for path in PATHS for dtype in DTYPES
]
every_path = pytest.mark.parametrize(("path", "dtype"), cases)


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def whole_numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("path", PATHS)
def test_every_operation_is_called_as_its_twin_is(path: str) -> None:
    """Names, order and defaults; what a path takes besides (a workspace, a forced choice) has a default."""
    own = PATHS[path]()
    operations = [part.name for part in fields(Operations) if callable(getattr(REFERENCE, part.name))]
    assert len(operations) == 13
    for name in operations:
        wanted, found = (
            [
                (parameter.name, parameter.kind, parameter.default)
                for parameter in signature(function).parameters.values()
            ]
            for function in (getattr(REFERENCE, name), getattr(own, name))
        )
        assert found[: len(wanted)] == wanted, name
        assert all(default is not Parameter.empty for _, _, default in found[len(wanted) :]), name


def hold(operation: str, path: str, dtype: torch.dtype, *inputs: Any, changes: tuple[int, ...] = ()) -> None:
    """The path's result, and the inputs that it changes in place, within the bound."""
    exact, plain, own = ([wide(x) for x in inputs], list(map(copied, inputs)), list(map(copied, inputs)))
    truth = getattr(REFERENCE, operation)(*exact)
    twin = getattr(REFERENCE, operation)(*plain)
    found = getattr(PATHS[path](), operation)(*own)
    triples = [(found, twin, truth)] if isinstance(found, Tensor) else list(zip(found, twin, truth, strict=True))
    triples += [(own[at], plain[at], exact[at]) for at in changes]
    for own_result, twin_result, true_result in triples:
        assert own_result.dtype == twin_result.dtype and own_result.shape == twin_result.shape
        assert error(own_result, true_result) <= 1.5 * error(twin_result, true_result) + DTYPES[dtype]


@every_path
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_linear(path: str, dtype: torch.dtype, rows: int) -> None:
    random = draw(rows)
    x, weight = random(rows, 256).to(dtype), quantize_rtn(random(80, 256), 4, 64, symmetric=False)
    truth = REFERENCE.linear(x.double(), weight)
    own, twin = (error(operations.linear(x, weight), truth) for operations in (PATHS[path](), REFERENCE))
    assert own <= 1.5 * twin + DTYPES[dtype]


@every_path
def test_norms(path: str, dtype: torch.dtype) -> None:
    random = draw(1)
    x, other, weight = random(5, 96).to(dtype), random(5, 96).to(dtype), random(96)
    hold("rms_norm", path, dtype, x, weight, 1e-6)
    hold("add_rms_norm", path, dtype, x, other, weight, 1e-6)
    hold("gated_rms_norm", path, dtype, x.view(5, 3, 32), other.view(5, 3, 32), weight[:32], 1e-6)


@every_path
def test_convolution(path: str, dtype: torch.dtype) -> None:
    random = draw(2)
    weight, state = random(96, 4).to(dtype), random(6, 96, 3).to(dtype)
    prompt = (random(71, 96).to(dtype), weight, state, whole_numbers(4, 1), whole_numbers(0, 2, 71))
    hold("causal_conv1d_prefill", path, dtype, *prompt, changes=(2,))
    slots = (whole_numbers(0, 3), torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32))
    hold("causal_conv1d_update", path, dtype, random(2, 3, 96).to(dtype), weight, state, *slots, changes=(2,))


@every_path
def test_delta_rule(path: str, dtype: torch.dtype) -> None:
    random = draw(3)
    heads, key_heads, size = 4, 2, 32
    channels = (2 * key_heads + heads) * size
    per_head = (random(heads), random(heads))
    state = random(6, heads, size, size)

    def inputs(*shape: int) -> tuple[Tensor, ...]:
        return tuple(random(*shape, width).to(dtype) for width in (channels, heads, heads))

    prompts = (whole_numbers(5, 2), whole_numbers(0, 66, 97), key_heads)
    hold("gated_delta_rule_prefill", path, dtype, *inputs(97), *per_head, state, *prompts, changes=(5,))
    slots = (whole_numbers(0, 3), torch.tensor([[1, 2, 0], [4, 5, 3]], dtype=torch.int32), key_heads)
    hold("gated_delta_rule_step", path, dtype, *inputs(2, 3), *per_head, state, *slots, changes=(5,))


@every_path
@pytest.mark.parametrize("int8", [False, True])
def test_attention(path: str, dtype: torch.dtype, int8: bool) -> None:
    random = draw(4)
    heads, kv_heads, size, tokens = 4, 2, 64, 128
    shape = (2, kv_heads, tokens, size)
    caches = {}
    for name in ("own", "twin", "exact"):
        stored = dtype if name != "exact" else torch.float64
        kind = torch.int8 if int8 else stored
        scales = [torch.zeros(shape[:-1]) if int8 else None for _ in range(2)]
        caches[name] = KVCache(torch.zeros(shape, dtype=kind), torch.zeros(shape, dtype=kind), *scales)
    owners, positions = whole_numbers(*[0] * 70, *[1] * 9), whole_numbers(*range(70), *range(9))
    keys, values = (random(79, kv_heads, size).to(dtype) for _ in range(2))
    operations = {"own": PATHS[path](), "twin": REFERENCE, "exact": REFERENCE}
    q, gate = (random(13, heads, size).to(dtype) for _ in range(2))
    step_q, step_gate = (random(2, 2, heads, size).to(dtype) for _ in range(2))
    prefilled, decoded = {}, {}
    for name, cache in caches.items():
        to = torch.float64 if name == "exact" else dtype
        use = operations[name]
        use.store_kv(cache, keys.to(to), values.to(to), owners, positions)
        # 9 new tokens of the first sequence behind 61, 4 of the second behind 5
        where = (cache, whole_numbers(0, 1), whole_numbers(0, 9, 13), whole_numbers(61, 5))
        prefilled[name] = use.attention_prefill(q.to(to), gate.to(to), *where)
        where = (cache, whole_numbers(0, 1), whole_numbers(68, 7))
        decoded[name] = use.attention_decode(step_q.to(to), step_gate.to(to), *where)
    if int8:
        assert torch.equal(caches["own"].keys, caches["twin"].keys)
    for results in (prefilled, decoded):
        twin = error(results["twin"], results["exact"])
        assert error(results["own"], results["exact"]) <= 1.5 * twin + DTYPES[dtype]


@every_path
def test_rope(path: str, dtype: torch.dtype) -> None:
    random = draw(5)
    angles = random(7, 8)
    hold("rope", path, dtype, random(7, 3, 64).to(dtype), angles.cos(), angles.sin())


@every_path
def test_experts(path: str, dtype: torch.dtype) -> None:
    random = draw(6)
    x, stack = random(23, 128).to(dtype), random(5, 48, 128)
    offsets = whole_numbers(0, 9, 9, 10, 22, 23)
    truth = REFERENCE.expert_matmul(x.double(), quantize_rtn(stack, 8, 128), offsets)
    for weight, is_exact in ((quantize_rtn(stack, 8, 128), True), (stack.to(dtype), False)):
        goal = truth if is_exact else REFERENCE.expert_matmul(x.double(), stack.to(dtype).double(), offsets)
        own, twin = (error(use.expert_matmul(x, weight, offsets), goal) for use in (PATHS[path](), REFERENCE))
        assert own <= 1.5 * twin + DTYPES[dtype]
