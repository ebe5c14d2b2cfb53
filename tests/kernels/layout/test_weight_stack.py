"""Experts in one stack are the experts one by one."""

from typing import Any

import pytest
import torch

from qwenfit.kernels.layout.gptq_layout import from_gptq, to_gptq
from qwenfit.kernels.layout.packing import dequantize, quantize_rtn
from qwenfit.kernels.layout.weight_stack import expert_of, stack_weights


def matrix(seed: int, rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, 160, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stack_holds_its_matrices(bits: int) -> None:
    """Experts 1 and 3 have zero points, 0 and 2 have none: the stack has them, and says the same."""
    experts = [quantize_rtn(matrix(seed), bits, 32, symmetric=seed % 2 == 0) for seed in range(4)]
    stack = stack_weights(iter(experts), 4)
    assert stack.zeros is not None
    assert torch.equal(dequantize(stack), torch.stack([dequantize(expert) for expert in experts]))
    for number, expert in enumerate(experts):
        assert torch.equal(dequantize(expert_of(stack, number)), dequantize(expert))
    plain = stack_weights(experts[::2], 2)
    assert plain.zeros is None
    assert torch.equal(dequantize(plain)[1], dequantize(experts[2]))


def test_one_order_of_columns_is_kept_and_two_are_refused() -> None:
    tensors: list[dict[str, Any]] = [
        to_gptq(quantize_rtn(matrix(seed), 4, 32, True, torch.float16)) for seed in range(2)
    ]
    mixed = torch.arange(160).int() % 5
    experts = [from_gptq(**{**one, "g_idx": mixed}) for one in tensors]
    stack = stack_weights(experts, 2)
    assert torch.equal(dequantize(stack)[1], dequantize(experts[1]))
    with pytest.raises(ValueError, match="x: experts with columns in different orders"):
        stack_weights([experts[0], from_gptq(**tensors[1])], 2, "x")


def test_experts_that_do_not_belong_together_are_refused() -> None:
    first = quantize_rtn(matrix(0), 4, 32)
    for other in (
        quantize_rtn(matrix(1), 8, 32),
        quantize_rtn(matrix(1), 4, 64),
        quantize_rtn(matrix(1, rows=25), 4, 32),
        quantize_rtn(matrix(1), 4, 32, scale_dtype=torch.float16),
    ):
        with pytest.raises(ValueError, match=r"x: expert 1 is .* unlike expert 0"):
            stack_weights([first, other], 2, "x")
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"x: there are not {count} experts"):
            stack_weights([first, first], count, "x")
    with pytest.raises(ValueError, match="x: there are not 2 experts"):
        stack_weights([], 2, "x")
