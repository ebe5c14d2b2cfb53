"""AWQ tensors written here by the formula of the format and read by the library: same matrix, and same bytes back."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenfit.kernels.layout.awq_layout import from_awq, to_awq
from qwenfit.kernels.layout.packing import dequantize, quantize_rtn

INTERLEAVE = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}


def packed(codes: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R, C / n]: code j of word w is column n w + INTERLEAVE[j]."""
    runs = codes.long().unflatten(1, (-1, 32 // bits))[..., INTERLEAVE[bits]]
    words = (runs << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128, -1]),
    st.booleans(),
    st.integers(0, 999),
)
def test_the_same_matrix_and_the_same_bytes(
    row_words: int, column_runs: int, bits: int, group_size: int, symmetric: bool, seed: int
) -> None:
    size = group_size if group_size > 0 else 32 * column_runs
    rows, columns = 8 * row_words, size * column_runs if group_size > 0 else size
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    z = torch.randint(0, 2**bits, (columns // size, rows), generator=generator)
    z = torch.full_like(z, 2 ** (bits - 1)) if symmetric else z
    scales = (torch.rand(columns // size, rows, generator=generator) + 0.1).half()
    tensors: dict[str, Any] = {"qweight": packed(q.T, bits), "qzeros": packed(z, bits), "scales": scales}
    group = torch.arange(columns) // size
    matrix = (q.double() - z.double().T[:, group]) * scales.double().T[:, group]
    weight = from_awq(**tensors)
    assert weight.bits == bits and weight.order is None and (weight.zeros is None or not symmetric)
    assert torch.equal(dequantize(weight), matrix)
    back = to_awq(weight)
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)


def test_a_word_by_hand() -> None:
    """Outputs 0 to 7 with codes 0 to 7: nibbles 0, 2, 4, 6, 1, 3, 5, 7 from the lowest on."""
    tensors: dict[str, Any] = {
        "qweight": torch.full((32, 1), 0x75316420, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8).half(),
    }
    assert torch.equal(dequantize(from_awq(**tensors)), torch.arange(8.0).double()[:, None].expand(8, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(256, 4)}, "qweight is float32"),
        ({"qweight": torch.zeros(256, 5).int()}, "5 words of 32 bits do not hold 32 codes"),
        ({"qzeros": torch.zeros(2, 3).int()}, "are not of one matrix"),
        ({"qzeros": torch.zeros(4).int()}, "qzeros is int32"),
        ({"scales": torch.zeros(3, 32).half()}, "are not of one matrix"),
        ({"scales": torch.zeros(3, 32).half(), "qzeros": torch.zeros(3, 4).int()}, "3 equal groups"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = to_awq(quantize_rtn(torch.randn(32, 256), 4, 128, False, torch.float16))
    with pytest.raises(ValueError, match="layer 3: ?.*" + message):
        from_awq(**{**tensors, **change}, what="layer 3")


def test_what_awq_cannot_hold_is_refused() -> None:
    for matrix in (torch.randn(2, 32, 128), torch.randn(30, 128)):
        with pytest.raises(ValueError, match="cannot be stored as AWQ"):
            to_awq(quantize_rtn(matrix, 4, 128))
