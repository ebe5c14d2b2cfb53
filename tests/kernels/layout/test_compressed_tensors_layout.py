"""compressed-tensors written here by the formula of the format and read back: same matrix, same bytes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenfit.kernels.layout.compressed_tensors_layout import (
    from_int_quantized,
    from_pack_quantized,
    to_int_quantized,
    to_pack_quantized,
)
from qwenfit.kernels.layout.packing import dequantize, quantize_rtn

QUICK = settings(max_examples=40, deadline=None)


def packed(codes: Tensor, bits: int, dimension: int) -> Tensor:
    """Element j of each run of 32 / bits along a dimension to bits [j b, (j + 1) b) of one int32; zeros at the end."""
    codes = codes.long().movedim(dimension, -1)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (32 // bits)))
    words = (codes.unflatten(-1, (-1, 32 // bits)) << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, dimension).contiguous()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


@QUICK
@given(
    st.integers(2, 40),
    st.integers(1, 12),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128, -1]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 999),
)
def test_packed_the_same_matrix_and_the_same_bytes(
    rows: int,
    column_runs: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    size = group_size if group_size > 0 else 32 * column_runs
    columns = size * column_runs if group_size > 0 else size
    groups, generator = columns // size, torch.Generator().manual_seed(seed)
    signed = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator)
    z = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, groups), generator=generator)
    z = torch.zeros_like(z) if symmetric else z
    scales, offset = (torch.rand(rows, groups, generator=generator) + 0.1).to(dtype), 2 ** (bits - 1)
    g_idx = torch.arange(columns, dtype=torch.int32) // size
    tensors: dict[str, Any] = {
        "weight_packed": packed(signed + offset, bits, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed(z + offset, bits, 0)
    if act_order and groups > 1:
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
        tensors["weight_g_idx"] = g_idx
    group = g_idx.long()
    weight = from_pack_quantized(**tensors)
    assert (weight.zeros is None) == symmetric and weight.bits == bits
    assert torch.equal(dequantize(weight), (signed - z[:, group]).double() * scales.double()[:, group])
    if not bool((g_idx[1:] >= g_idx[:-1]).all()) or "weight_g_idx" not in tensors:
        assert same(to_pack_quantized(weight), tensors)


def test_zero_points_that_are_stored_are_kept_even_if_all_are_zero() -> None:
    weight = quantize_rtn(torch.randn(24, 64), 4, 32, False)
    assert weight.zeros is not None
    weight.zeros.fill_(8)
    tensors: dict[str, Any] = to_pack_quantized(weight)
    assert same(to_pack_quantized(from_pack_quantized(**tensors)), tensors)
    assert (tensors["weight_zero_point"].long() % (1 << 32) == 0x88888888).all()


@QUICK
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 999))
def test_int8_the_same_matrix_and_the_same_bytes(
    rows: int, columns: int, groups: int, symmetric: bool, seed: int
) -> None:
    """A scale per row and any number of columns; or three groups of 64 whose columns are shuffled."""
    generator = torch.Generator().manual_seed(seed)
    columns = columns if groups == 1 else 192
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).bfloat16()
    tensors: dict[str, Any] = {"weight": codes, "weight_scale": scales}
    zeros = torch.zeros(rows, groups, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-128, 128, (rows, groups), generator=generator, dtype=torch.int8)
        tensors["weight_zero_point"] = zeros
    group = torch.zeros(columns, dtype=torch.long)
    if groups > 1:
        group = (torch.arange(columns) // 64)[torch.randperm(columns, generator=generator)]
        tensors["weight_g_idx"] = group.int()
    weight = from_int_quantized(**tensors)
    assert torch.equal(dequantize(weight), (codes.double() - zeros.double()[:, group]) * scales.double()[:, group])
    assert groups > 1 or torch.equal(weight.codes[:rows, :columns], codes)
    assert same(to_int_quantized(weight), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": torch.zeros(32, 32).byte()}, "weight_packed is uint8"),
        ({"weight_packed": torch.zeros(31, 32).int()}, "are not of a matrix 32 x 256"),
        ({"weight_packed": torch.zeros(32, 33).int()}, "33 words of 32 bits do not hold 256 codes"),
        ({"weight_scale": torch.zeros(31, 2)}, "are not of a matrix"),
        ({"weight_scale": torch.zeros(32, 3)}, "3 equal groups"),
        ({"weight_scale": torch.zeros(32)}, "weight_scale is"),
        ({"weight_shape": torch.zeros(3).long()}, r"weight_shape is \[3\]"),
        ({"weight_shape": torch.tensor([32.0, 256.0])}, "weight_shape is"),
        ({"weight_shape": torch.tensor([32, -256])}, "weight_shape says 32 x -256"),
        ({"weight_zero_point": torch.zeros(5, 2).int()}, "weight_zero_point"),
        ({"weight_zero_point": torch.zeros(4, 2).char()}, "weight_zero_point is int8"),
        ({"weight_g_idx": torch.zeros(9).int()}, "g_idx is"),
    ],
)
def test_packed_tensors_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = to_pack_quantized(quantize_rtn(torch.randn(32, 256), 4, 128, False))
    with pytest.raises(ValueError, match="layer 3: .*" + message):
        from_pack_quantized(**{**tensors, **change}, what="layer 3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(32, 256)}, "weight is float32"),
        ({"weight_scale": torch.zeros(1)}, "weight_scale is float32"),
        ({"weight_scale": torch.zeros(1, 1)}, "a scale per row"),
        ({"weight_zero_point": torch.zeros(32, 2).char()}, "weight_zero_point is not"),
        ({"weight_zero_point": torch.zeros(32, 1)}, "weight_zero_point is float32"),
    ],
)
def test_int8_tensors_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = to_int_quantized(quantize_rtn(torch.randn(32, 256), 8, -1, False))
    with pytest.raises(ValueError, match="layer 3: .*" + message):
        from_int_quantized(**{**tensors, **change}, what="layer 3")


def test_what_the_formats_cannot_hold_is_refused() -> None:
    stack = quantize_rtn(torch.randn(2, 32, 128), 8, 128)
    with pytest.raises(ValueError, match="one by one"):
        to_pack_quantized(stack)
    for weight in (stack, quantize_rtn(torch.randn(32, 128), 4, 128)):
        with pytest.raises(ValueError, match="store it as pack-quantized"):
            to_int_quantized(weight)
