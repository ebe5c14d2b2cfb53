"""Bytes of single tensors, by hand and by property."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.profiles.storage import (
    WHOLE_ROW,
    Storage,
    awq,
    fitted,
    fp8_blocks,
    fp8_per_tensor,
    gptq,
    int8_per_channel,
    mlx_affine,
    nvfp4,
    packed_integers,
    plain,
    storage_bytes,
)

# [512, 1024]: weight 512 x 1024 codes, 8 groups of 128 per row
BY_HAND = [
    (plain("BF16"), 512 * 1024 * 2),
    (plain("F4"), 512 * 1024 // 2),
    (plain("F6_E2M3"), 512 * 1024 * 3 // 4),
    (plain("Q4_K"), 512 * 4 * 144),
    (packed_integers(4, 128, symmetric=True), 512 * 512 + 512 * 8 * 2 + 16),
    (packed_integers(4, 128, symmetric=False), 512 * 512 + 512 * 8 * 2 + 16 + 512 // 8 * 8 * 4),
    (packed_integers(8, 128, symmetric=False), 512 * 1024 + 512 * 8 * 2 + 16 + 512 // 4 * 8 * 4),
    (packed_integers(4, WHOLE_ROW, symmetric=True), 512 * 512 + 512 * 2 + 16),
    (int8_per_channel(), 512 * 1024 + 512 * 2),
    (gptq(4, 128), 512 * 512 + 8 * 512 * 2 + 8 * 64 * 4 + 1024 * 4),
    (awq(4, 128), 512 * 512 + 8 * 512 * 2 + 8 * 64 * 4),
    (fp8_blocks(), 512 * 1024 + 4 * 8 * 2),
    (fp8_per_tensor(), 512 * 1024 + 8),
    (nvfp4(scalars=2), 512 * 512 + 512 * 64 + 8),
    (mlx_affine(4, 64), 512 * 512 + 512 * 16 * 4),
    (mlx_affine(5, 64), 512 * 640 + 512 * 16 * 4),
]


@pytest.mark.parametrize(("storage", "expected"), BY_HAND, ids=lambda value: getattr(value, "name", None))
def test_matrix_by_hand(storage: Storage, expected: int) -> None:
    assert storage_bytes((512, 1024), storage) == expected


def test_shapes_other_than_matrices() -> None:
    assert storage_bytes((128,), plain("F32")) == 512
    assert storage_bytes((8192, 1, 4), plain("BF16")) == 8192 * 4 * 2
    assert storage_bytes((1152, 3, 2, 16, 16), plain("F16")) == 1152 * 1536 * 2
    assert storage_bytes((256, 512, 1024), fp8_blocks()) == 256 * (512 * 1024 + 4 * 8 * 2)


def test_last_block_is_paid_in_full() -> None:
    assert storage_bytes((3, 257), plain("Q4_K")) == 3 * 2 * 144
    assert storage_bytes((129, 200), fp8_blocks()) == 129 * 200 + 2 * 2 * 2
    assert storage_bytes((3, 9), packed_integers(4, 128, symmetric=True)) == 3 * 2 * 4 + 3 * 2 + 16


def test_gate_and_up_side_by_side_are_two_matrices() -> None:
    """GPTQ keeps a g_idx, compressed-tensors a weight_shape and NVFP4 its scalars for each of the two."""
    for storage in (gptq(4, 128), packed_integers(4, 128, symmetric=False), nvfp4(scalars=2), fp8_blocks()):
        both = fitted(storage, 2048, 2, kept=plain("BF16"))
        assert storage_bytes((256, 1024, 2048), both) == 2 * storage_bytes((256, 512, 2048), storage)


def test_group_that_does_not_divide() -> None:
    """The vision tower's 4304 = 16 x 269: integers take a scale per row, MLX leaves the matrix, NVFP4's 16 divides."""
    bf16 = plain("BF16")
    assert fitted(packed_integers(8, 128, symmetric=True), 4304, 1, bf16).group_columns == WHOLE_ROW
    assert fitted(mlx_affine(4, 64), 4304, 1, bf16) is bf16
    assert fitted(nvfp4(scalars=1), 4304, 1, bf16).group_columns == 16
    assert fitted(packed_integers(8, 128, symmetric=True), 4096, 1, bf16).group_columns == 128


def test_unknown_dtype() -> None:
    with pytest.raises(KeyError):
        plain("Q9_K")


shapes = st.tuples(st.integers(1, 600), st.integers(1, 5000))
group_sizes = st.sampled_from([16, 32, 64, 128, 256, 512, WHOLE_ROW])


@settings(deadline=None)
@given(shapes, group_sizes, st.booleans())
def test_more_bits_never_take_less(shape: tuple[int, int], group_size: int, symmetric: bool) -> None:
    four, eight = (packed_integers(bits, group_size, symmetric) for bits in (4, 8))
    assert storage_bytes(shape, four) <= storage_bytes(shape, eight)
    assert storage_bytes(shape, mlx_affine(4, 64)) <= storage_bytes(shape, mlx_affine(5, 64))
    assert storage_bytes(shape, mlx_affine(6, 64)) <= storage_bytes(shape, mlx_affine(8, 64))


@settings(deadline=None)
@given(shapes, group_sizes, group_sizes, st.sampled_from([4, 8]), st.booleans())
def test_finer_groups_never_take_less(shape: tuple[int, int], one: int, other: int, bits: int, symmetric: bool) -> None:
    fine, coarse = sorted((one, other))
    for make in (lambda size: packed_integers(bits, size, symmetric), lambda size: gptq(bits, size)):
        assert storage_bytes(shape, make(fine)) >= storage_bytes(shape, make(coarse))


@settings(deadline=None)
@given(shapes, st.integers(1, 16), st.sampled_from([storage for storage, _ in BY_HAND]))
def test_shards_together_never_take_less_than_the_whole(shape: tuple[int, int], ranks: int, storage: Storage) -> None:
    rows, columns = shape
    whole = storage_bytes(shape, storage)
    assert ranks * storage_bytes((-(-rows // ranks), columns), storage) >= whole
    assert ranks * storage_bytes((rows, -(-columns // ranks)), storage) >= whole


@settings(deadline=None)
@given(shapes, st.integers(1, 300), st.sampled_from([storage for storage, _ in BY_HAND]))
def test_experts_multiply(shape: tuple[int, int], experts: int, storage: Storage) -> None:
    assert storage_bytes((experts, *shape), storage) == experts * storage_bytes(shape, storage)


def test_asymmetric_costs_the_zero_points_alone() -> None:
    symmetric, asymmetric = (packed_integers(4, 128, symmetric=kind) for kind in (True, False))
    assert replace(asymmetric, zero_bits=0) == symmetric
