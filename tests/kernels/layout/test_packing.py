"""The runtime layout bit by bit, and round-to-nearest onto it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.kernels.layout.packing import (
    QuantizedWeight,
    dequantize,
    empty,
    pack_int4,
    quantize_rtn,
    read_codes,
    read_scales,
    read_zeros,
    row_chunks,
    runtime_group_size,
    unpack_int4,
    write_codes,
    write_groups,
)

QUICK = settings(max_examples=40, deadline=None)


def random_codes(*shape: int, bits: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_nibble_j_of_word_w_is_column_w_plus_32_j() -> None:
    """The picture in the module's docstring, entry by entry."""
    codes = random_codes(3, 256)
    words = pack_int4(codes).int()
    assert words.shape == (3, 64)
    for block in range(2):
        for word in range(32):
            for nibble in range(4):
                found = words[:, 32 * block + word] >> 4 * nibble & 15
                assert torch.equal(found, codes[:, 128 * block + word + 32 * nibble].int())


@QUICK
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
def test_unpacking_is_the_inverse(stack: list[int], rows: int, blocks: int, seed: int) -> None:
    codes = random_codes(*stack, rows, 128 * blocks, seed=seed)
    words = pack_int4(codes)
    assert words.dtype == torch.uint16 and words.shape == (*stack, rows, 32 * blocks)
    assert torch.equal(unpack_int4(words), codes)
    assert torch.equal(unpack_int4(words[..., ::2, :]), codes[..., ::2, :])


def test_columns_that_fill_no_block_are_refused() -> None:
    with pytest.raises(ValueError, match="100 columns do not fill blocks of 128"):
        pack_int4(random_codes(2, 100))


shapes = st.tuples(st.integers(1, 40), st.integers(1, 12).map(lambda count: 32 * count))


@QUICK
@given(
    shapes,
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128, -1]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_what_is_written_is_read_and_padding_stands_for_nothing(
    shape: tuple[int, int], bits: int, group_size: int, symmetric: bool, ordered: bool, seed: int
) -> None:
    (rows, columns), generator = shape, torch.Generator().manual_seed(seed)
    order = torch.randperm(columns, generator=generator).int() if ordered else None
    weight = empty(rows, columns, bits, group_size, torch.float16, not symmetric, order)
    codes, scales = random_codes(rows, columns, bits=bits, seed=seed), torch.rand(weight.groups, rows).half()
    zeros = None if symmetric else random_codes(weight.groups, rows, bits=bits, seed=seed + 1)
    write_codes(codes, weight.codes, bits)
    write_groups(weight, scales, zeros)
    assert torch.equal(read_codes(weight, slice(0, rows)), codes)
    assert torch.equal(read_codes(weight, slice(rows // 2, rows)), codes[rows // 2 :])
    assert torch.equal(read_scales(weight), scales)
    middle = torch.full((weight.groups, rows), 2 ** (bits - 1), dtype=torch.uint8)
    assert torch.equal(read_zeros(weight), middle if zeros is None else zeros)

    group = torch.arange(columns) // weight.group_size
    wanted = codes.double() - (middle if zeros is None else zeros).double().T[:, group]
    wanted = wanted * scales.double().T[:, group]
    if order is not None:
        wanted[:, order.long()] = wanted.clone()
    assert torch.equal(dequantize(weight), wanted)

    padded_rows, padded_columns = -(-rows // 16) * 16, -(-columns // 128) * 128
    everything = unpack_int4(weight.codes) if bits == 4 else weight.codes
    assert everything.shape == (padded_rows, padded_columns)
    assert (everything[rows:] == weight.zero_point).all() and (everything[:, columns:] == weight.zero_point).all()
    assert (weight.scales[:, rows:] == 0).all() and (weight.scales[weight.groups :] == 0).all()
    assert weight.scales.shape == (-(-padded_columns // weight.group_size), padded_rows)


@QUICK
@given(
    st.lists(st.integers(1, 3), max_size=1),
    st.tuples(st.integers(1, 20), st.integers(1, 300)),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128, -1]),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 99),
)
def test_rounding_is_to_the_nearest_point_of_the_grid(
    stack: list[int],
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    """No entry is farther off than half a step, but for those that the rounding of the scale has put off the grid."""
    matrix = torch.randn(*stack, *shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    matrix[..., 0, :] = 0
    weight = quantize_rtn(matrix, bits, group_size, symmetric, scale_dtype)
    assert isinstance(weight, QuantizedWeight) and weight.scales.dtype == scale_dtype
    assert (weight.zeros is None) == symmetric
    back, group = dequantize(weight), torch.arange(shape[1]) // weight.group_size
    steps = weight.scales.double().mT[..., : shape[0], group]
    # A scale rounded down leaves the ends of the grid short by at most half a unit in its last place per code; a zero
    # point that had to be rounded moves the grid by half a step.
    slack = 0.5 + (0 if symmetric else 0.5) + 2 ** (bits - 1) * torch.finfo(scale_dtype).eps
    assert ((back - matrix.double()).abs() <= steps * slack + 1e-30).all()
    assert (back[..., 0, :] == 0).all()


def test_the_grid_of_a_known_group() -> None:
    """By hand: the largest of 32 weights is 1.5, so the symmetric int4 step is 3 / 15 = 0.2."""
    matrix = torch.tensor([[1.5, -1.5, 0.3, 0.29, -0.1, *[0.0] * 27]])
    codes = read_codes(quantize_rtn(matrix, 4, 32, True, torch.float32), slice(0, 1))
    assert codes[0, :6].tolist() == [15, 0, 10, 9, 8, 8]  # 7.5 and -7.5 round to even and are cut to 0..15
    weight = quantize_rtn(matrix, 4, 32, False, torch.float32)
    assert read_zeros(weight).tolist() == [[8]]
    eight = quantize_rtn(matrix, 8, 32, True, torch.float32)
    assert eight.codes[0, :2].tolist() == [127, -128]


def test_group_sizes() -> None:
    assert [runtime_group_size(size, 300) for size in (-1, 0, 300, 512, 32, 128)] == [384, 384, 384, 384, 32, 128]
    for size in (-2, 16, 100):
        with pytest.raises(ValueError, match=f"groups of {size} columns have no runtime layout"):
            runtime_group_size(size, 300)
    with pytest.raises(ValueError, match="3-bit codes"):
        empty(16, 128, 3, 32, torch.float16, False)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        empty(16, 128, 4, 32, torch.float64, False)


def test_row_chunks_cover_every_row_once() -> None:
    chunks = list(row_chunks(4100, 12288))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(4100))
    assert all(chunk.start % 64 == 0 for chunk in chunks) and len(chunks) > 10
    assert list(row_chunks(5, 10**9)) == [slice(0, 5)]
