"""GPTQ tensors written here by the formula of the format, shift by shift, and read by the library: same matrix, and the
same bytes when written back.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenfit.kernels.layout.gptq_layout import from_gptq, to_gptq
from qwenfit.kernels.layout.packing import dequantize, quantize_rtn

QUICK = settings(max_examples=40, deadline=None)


def packed(codes: Tensor, bits: int, dimension: int) -> Tensor:
    """Element j of each run of 32 / bits along a dimension to bits [j b, (j + 1) b) of one int32."""
    runs = codes.long().movedim(dimension, -1).unflatten(-1, (-1, 32 // bits))
    words = (runs << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, dimension).contiguous()


def written(
    q: Tensor, z: Tensor, scales: Tensor, g_idx: Tensor, bits: int, version: int
) -> tuple[dict[str, Any], Tensor]:
    """The tensors of codes q [N, K], zero points z and scales [groups, N], and the matrix they stand for."""
    words = packed(z, bits, 1).long()
    if version == 1:
        words = words - (0x11111111 if bits == 4 else 0x01010101)
        words = (words + (1 << 31)) % (1 << 32) - (1 << 31)
    tensors: dict[str, Any] = {"qweight": packed(q.T, bits, 0), "qzeros": words.int(), "scales": scales, "g_idx": g_idx}
    group = g_idx.long()
    return tensors, (q.double() - z.double().T[:, group]) * scales.double().T[:, group]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


@QUICK
@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128, -1]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 999),
)
def test_the_same_matrix_and_the_same_bytes(
    row_words: int,
    column_runs: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    version: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    rows, columns = 8 * row_words, 32 * column_runs
    size = min(group_size, columns) if group_size > 0 else columns
    groups, generator = -(-columns // size), torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    z = torch.randint(0, 2**bits, (groups, rows), generator=generator)
    z = torch.full_like(z, 2 ** (bits - 1)) if symmetric else z
    scales = (torch.rand(groups, rows, generator=generator) + 0.1).to(dtype)
    g_idx = torch.arange(columns, dtype=torch.int32) // size
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
    tensors, matrix = written(q, z, scales, g_idx, bits, version)
    weight = from_gptq(**tensors, version=version)
    assert weight.bits == bits and weight.scales.dtype == dtype
    assert (weight.order is None) == bool((g_idx[1:] >= g_idx[:-1]).all())
    assert weight.zeros is None or not symmetric
    assert torch.equal(dequantize(weight), matrix)
    assert same(to_gptq(weight, version), tensors)
    without_index = {name: tensor for name, tensor in tensors.items() if name != "g_idx"}
    if not act_order:
        again = from_gptq(**without_index, version=version, group_size=size)
        assert torch.equal(dequantize(again), matrix)


def test_symmetric_words_are_those_that_loaders_know() -> None:
    """0x77777777 and 0x7f7f7f7f in version 1, 0x88888888 and 0x80808080 in version 2."""
    for bits, words in ((4, (0x77777777, 0x88888888)), (8, (0x7F7F7F7F, 0x80808080))):
        weight = quantize_rtn(torch.randn(32, 128), bits, 64, True, torch.float16)
        for version, word in zip((1, 2), words, strict=True):
            found = to_gptq(weight, version)["qzeros"]
            assert (found.long() % (1 << 32) == word).all()


def test_a_zero_point_of_zero_borrows_from_its_neighbour() -> None:
    """GPTQModel adds one to whole words: version 1 of the zero points 0, 5, 8, 8, ... is 0x88888850 - 0x11111111."""
    q, scales = torch.randint(0, 16, (8, 32)), torch.ones(1, 8).half()
    z = torch.tensor([[0, 5, 8, 8, 8, 8, 8, 8]])
    tensors, matrix = written(q, z, scales, torch.zeros(32).int(), 4, 1)
    assert tensors["qzeros"].item() == 0x7777773F
    assert torch.equal(dequantize(from_gptq(**tensors)), matrix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(32, 32)}, "qweight is float32"),
        ({"qweight": torch.zeros(32, 31).int()}, "are not of one matrix"),
        ({"qweight": torch.zeros(0, 32).int()}, "qweight is int32"),
        ({"qzeros": torch.zeros(3, 4).int()}, "are not of one matrix"),
        ({"qzeros": torch.zeros(2, 5).int()}, "5 words of 32 bits do not hold 32 codes"),
        ({"scales": torch.zeros(2, 32).double()}, "scales of torch.float64"),
        ({"scales": torch.zeros(2, 32).int()}, "scales of torch.int32"),
        ({"scales": torch.zeros(32)}, "scales is"),
        ({"scales": torch.zeros(3, 32), "qzeros": torch.zeros(3, 4).int(), "g_idx": None}, "3 equal groups"),
        ({"g_idx": torch.zeros(255).int()}, "g_idx is"),
        ({"g_idx": torch.arange(256).int() // 100}, "g_idx names groups"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = to_gptq(quantize_rtn(torch.randn(32, 256), 4, 128, True, torch.float16))
    with pytest.raises(ValueError, match="layer 3: .*" + message if "scales of" not in message else message):
        from_gptq(**{**tensors, **change}, what="layer 3")


def test_what_gptq_cannot_hold_is_refused() -> None:
    for matrix in (torch.randn(2, 32, 128), torch.randn(30, 128), torch.randn(32, 100)):
        with pytest.raises(ValueError, match="cannot be stored as GPTQ"):
            to_gptq(quantize_rtn(matrix, 4, 128))
