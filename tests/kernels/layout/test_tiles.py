"""The layout in tiles of 16 rows, entry by entry against its picture, and there and back."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize, quantize_rtn, unpack_int4
from qwenfit.kernels.layout.tiles import gather_rows, tile, untile

QUICK = settings(max_examples=40, deadline=None)


def weight_of(*shape: int, bits: int = 4, group: int = 64, symmetric: bool = False, seed: int = 0) -> QuantizedWeight:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return quantize_rtn(matrix, bits, group, symmetric)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    tensors = ((one.codes, other.codes), (one.scales, other.scales), (one.zeros, other.zeros))
    return all(
        (a is None and b is None)
        or (a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
        for a, b in tensors
    )


def test_a_step_of_int4_is_two_columns_of_each_quarter_of_16_rows() -> None:
    """The picture in the module's docstring, entry by entry."""
    weight = weight_of(40, 300)
    codes, tiled = unpack_int4(weight.codes).int(), tile(weight).codes
    assert tiled.shape == (3, 3, 16, 1, 16) and tiled.dtype == torch.int32
    for quarter in range(4):
        for step in range(16):
            for column in range(2):
                found = tiled[:, :, step, 0] >> (16 * column + 4 * quarter) & 15
                expected = codes.view(3, 16, 3, 128)[..., 32 * quarter + 2 * step + column]
                assert torch.equal(found, expected.transpose(1, 2))


def test_a_step_of_int8_is_two_lines_of_bytes() -> None:
    weight = weight_of(40, 300, bits=8)
    tiled = tile(weight).codes
    assert tiled.shape == (3, 3, 16, 2, 16)
    bytes_of = tiled.unsqueeze(-1).view(torch.int8)
    rows = weight.codes.view(3, 16, 3, 128)
    for step in range(16):
        for line in range(2):
            first = 64 * line + 2 * step
            for place, column in enumerate((first, 32 + first, first + 1, 33 + first)):
                assert torch.equal(bytes_of[:, :, step, line, :, place], rows[..., column].transpose(1, 2))


def test_16_rows_of_scales_and_zero_points_are_neighbours() -> None:
    weight = weight_of(40, 300)
    tiled = tile(weight)
    for before, after in ((weight.scales, tiled.scales), (weight.zeros, tiled.zeros)):
        assert before is not None and after is not None and after.shape == (3, 6, 16) and after.is_contiguous()
        for row in (0, 15, 16, 47):
            assert torch.equal(after[row // 16, :, row % 16], before[:, row])


@QUICK
@given(
    stack=st.lists(st.integers(1, 3), max_size=1),
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 96, 128, -1]),
    symmetric=st.booleans(),
)
def test_tiles_lose_nothing(stack: list[int], rows: int, columns: int, bits: int, group: int, symmetric: bool) -> None:
    weight = weight_of(*stack, rows, columns, bits=bits, group=group, symmetric=symmetric)
    tiled = tile(weight)
    assert same(untile(tiled), weight) and tiled.bytes == weight.bytes and tiled.stack == weight.stack == tuple(stack)
    assert torch.equal(dequantize(tiled), dequantize(weight))
    if not stack:
        index = torch.tensor([rows - 1, 0, rows // 2])
        one, other = gather_rows(weight, index), gather_rows(tiled, index)
        assert same(one, replace(other, scales=other.scales.contiguous()))
        assert torch.equal(dequantize(one), dequantize(weight)[index])


def test_large_matrices_are_moved_piece_by_piece() -> None:
    weight = weight_of(1040, 2304)  # 1.2 MB: two pieces, the second one smaller
    assert same(untile(tile(weight)), weight)


def test_what_lies_so_already_is_not_copied() -> None:
    weight = weight_of(20, 256)
    tiled = tile(weight)
    assert tile(tiled) is tiled and untile(weight) is weight
    assert torch.equal(weight.codes, weight_of(20, 256).codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_room_is_what_the_caller_gives(bits: int) -> None:
    given: list[torch.Tensor] = []

    def room(size: int) -> torch.Tensor:
        given.append(torch.empty(size, dtype=torch.uint8))
        return given[-1]

    tiled = tile(weight_of(20, 256, bits=bits), room)
    assert tiled.zeros is not None
    tensors = (tiled.codes, tiled.scales, tiled.zeros)
    assert {tensor.data_ptr() for tensor in tensors} == {memory.data_ptr() for memory in given}
    assert sum(memory.numel() for memory in given) == tiled.bytes
