"""Group sizes from shapes, and orders of columns from g_idx."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.kernels.layout.column_groups import group_index, group_size_of, order_of


def test_the_hint_is_believed_only_where_it_fits() -> None:
    assert group_size_of(512, 4, None, "x") == 128
    assert group_size_of(512, 4, 128, "x") == 128
    assert group_size_of(512, 8, 128, "x") == 64  # a module of its own size in a mixed checkpoint
    assert group_size_of(192, 2, 128, "x") == 128  # the second group is half as long
    assert group_size_of(192, 2, None, "x") == 96
    assert group_size_of(512, 1, 128, "x") == -1
    with pytest.raises(ValueError, match="x: 512 columns do not fall into 3 equal groups"):
        group_size_of(512, 3, 128, "x")


@given(st.integers(1, 6), st.sampled_from([32, 64]), st.integers(0, 31), st.integers(0, 99))
def test_an_order_puts_groups_together_and_gives_g_idx_back(groups: int, size: int, missing: int, seed: int) -> None:
    columns = groups * size - missing
    sorted_index = torch.arange(columns, dtype=torch.int32) // size
    g_idx = sorted_index[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    order, found = order_of(g_idx, columns, groups, -1, "x")
    expected_size = size if groups > 1 else columns
    assert found == expected_size
    assert (order is None) == torch.equal(g_idx, sorted_index)
    if order is not None:
        assert torch.equal(g_idx[order.long()], sorted_index)
        assert all(a < b for a, b in pairwise(order.tolist()) if g_idx[a] == g_idx[b])
    assert torch.equal(group_index(columns, found, order, torch.device("cpu")), g_idx)


def test_an_index_that_nobody_filled_in_says_nothing() -> None:
    assert order_of(torch.full((64,), -1), 64, 2, 32, "x") == (None, 32)


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        (torch.zeros(63).int(), r"g_idx is int32 \[63\], not int32 \[64\]"),
        (torch.zeros(64), r"g_idx is float32 \[64\]"),
        (torch.arange(64).int() // 16, "g_idx names groups 0 to 3, but 2 have scales"),
        (torch.arange(64).int() // 32 - 1, "g_idx names groups -1 to 0"),
        (torch.arange(64).int() // 40 * 0, "g_idx makes groups of different sizes"),
        (1 - torch.arange(64).int() // 40, "g_idx makes groups of different sizes"),
    ],
)
def test_an_index_that_makes_no_groups_is_refused(g_idx: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="x: " + message):
        order_of(g_idx, 64, 2, 32, "x")
