"""Rows taken in another order, and matrices on top of each other: the same numbers, one matrix where it can be."""

import torch

from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize, quantize_rtn
from qwenfit.kernels.layout.rows import rows_of, stack_rows, take_rows


def made(rows: int, bits: int = 4, group: int = 32, symmetric: bool = True, columns: int = 160) -> QuantizedWeight:
    return quantize_rtn(torch.randn(rows, columns), bits, group, symmetric)


def test_rows_in_another_order() -> None:
    """21 rows, so the layout has 11 of padding, which stay behind; symmetric and with zero points."""
    order = torch.randperm(21).tolist()
    for symmetric in (True, False):
        for bits in (4, 8):
            weight = made(21, bits, symmetric=symmetric)
            taken = take_rows(weight, order)
            assert isinstance(taken, QuantizedWeight) and taken.codes.shape == weight.codes.shape
            assert torch.equal(dequantize(taken), dequantize(weight)[order])
            assert not taken.scales[:, 21:].any()
    matrix = torch.randn(21, 5)
    assert torch.equal(torch.as_tensor(take_rows(matrix, order)), matrix[order])


def test_matrices_on_top_of_each_other() -> None:
    """Blocks of 16 rows join, the last may be short; a stack of experts joins expert by expert."""
    for symmetric in (True, False):
        parts = [made(32, symmetric=symmetric), made(16, symmetric=symmetric), made(7, symmetric=symmetric)]
        (joined,) = stack_rows(parts)
        assert isinstance(joined, QuantizedWeight) and rows_of(joined) == 55
        assert torch.equal(dequantize(joined), torch.cat([dequantize(part) for part in parts]))
    stacks = [quantize_rtn(torch.randn(3, 16, 64), 8, 64) for _ in range(2)]
    (joined,) = stack_rows(stacks)
    assert isinstance(joined, QuantizedWeight)
    assert torch.equal(dequantize(joined), torch.cat([dequantize(part) for part in stacks], dim=1))
    (plain,) = stack_rows([torch.ones(3, 4), torch.zeros(2, 4)])
    assert rows_of(plain) == 5


def test_what_is_stored_differently_stays_apart() -> None:
    order = torch.arange(160, dtype=torch.int32)
    codes = made(16).codes
    weights = (
        [made(16), made(16, bits=8)],
        [made(16), made(16, group=64)],
        [made(16), made(16, symmetric=False)],
        [made(16), torch.randn(16, 160)],
        [made(7), made(16)],  # padding would come to lie between them
        [QuantizedWeight(codes, made(16).scales, None, 4, 32, 16, 160, order), made(16)],
        [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)],
    )
    for pair in weights:
        apart = stack_rows(pair)
        assert len(apart) == 2 and all(one is other for one, other in zip(apart, pair, strict=True))
