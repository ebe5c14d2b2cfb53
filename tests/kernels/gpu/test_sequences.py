"""Blocks of sequences found on the device are those that a loop over cu_seqlens finds."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
import itertools  # noqa: E402

import triton.language as tl  # noqa: E402

from qwenfit.kernels.gpu.sequences import (  # noqa: E402
    check_sequences,
    check_step_slots,
    count_blocks,
    locate_block,
    most_blocks,
    power_of_two,
    token_stride,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def write_blocks(cu_seqlens, found, batch, BATCH: tl.constexpr, ROWS: tl.constexpr, LEAST: tl.constexpr):
    index = tl.program_id(0)
    sequence, start, first, rows = locate_block(cu_seqlens, index, batch, BATCH, ROWS, LEAST)
    tl.store(found + index * 4, sequence)
    tl.store(found + index * 4 + 1, start)
    tl.store(found + index * 4 + 2, first)
    tl.store(found + index * 4 + 3, rows)


@triton.jit
def write_counts(cu_seqlens, found, BATCH: tl.constexpr, ROWS: tl.constexpr, LEAST: tl.constexpr):
    sequence = tl.program_id(0)
    first, start, end = count_blocks(cu_seqlens, sequence, BATCH, ROWS, LEAST)
    tl.store(found + sequence * 3, first)
    tl.store(found + sequence * 3 + 1, start)
    tl.store(found + sequence * 3 + 2, end)


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    rows=st.sampled_from((7, 16, 32)),
    least=st.sampled_from((1, 10)),
)
@example(lengths=[9, 10, 40, 3, 33], rows=16, least=10)
def test_blocks_are_those_of_a_loop(lengths: list[int], rows: int, least: int) -> None:
    """least: sequences of fewer rows have no blocks."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    expected, counts = [], []
    for sequence, (start, end) in enumerate(itertools.pairwise(bounds)):
        counts.append([len(expected), start, end])
        if end - start >= least:
            expected += [[sequence, start, first, min(rows, end - first)] for first in range(start, end, rows)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    programs = most_blocks(bounds[-1], len(lengths), rows)
    assert len(expected) <= programs and (least > 1 or programs <= len(expected) + len(lengths))
    found = torch.full((programs + 2, 4), -7, dtype=torch.int32, device=DEVICE)
    batch = power_of_two(len(lengths))
    write_blocks[(programs + 1,)](cu_seqlens, found, len(lengths), BATCH=batch, ROWS=rows, LEAST=least)
    assert found[: len(expected)].tolist() == expected
    assert (found[len(expected) : programs + 1, 3] <= 0).all() and (found[-1] == -7).all()
    found = torch.zeros(len(lengths), 3, dtype=torch.int32, device=DEVICE)
    write_counts[(len(lengths),)](cu_seqlens, found, BATCH=batch, ROWS=rows, LEAST=least)
    assert found.tolist() == counts


def test_most_blocks_is_reached() -> None:
    """Sequences of one token more than a block need a block each for it; one token makes one block at most."""
    assert most_blocks(3 * 65, 3, 64) == 6
    assert most_blocks(2048, 1, 64) == 32 and most_blocks(2049, 1, 64) == 33
    assert most_blocks(5, 4, 64) == 3 + 1
    assert most_blocks(2, 4, 64) == 2


def test_what_the_kernels_cannot_read_is_refused() -> None:
    slots = torch.zeros(2, dtype=torch.int32)
    good = torch.tensor([0, 3, 9], dtype=torch.int32)
    assert check_sequences(good, slots, slots.device) == 2
    with pytest.raises(ValueError, match=r"cu_seqlens is torch.int64 \[3\] on cpu: give contiguous int32 \[B \+ 1\]"):
        check_sequences(good.long(), slots, slots.device)
    with pytest.raises(ValueError, match="cu_seqlens has 3 entries for 1 slots"):
        check_sequences(good, slots[:1], slots.device)
    with pytest.raises(ValueError, match="0 sequences in one call"):
        check_sequences(good[:1], slots[:0], slots.device)
    with pytest.raises(ValueError, match=r"target is torch.int32 \[2, 2\] on cpu: give contiguous int32 \[2, 3\]"):
        check_step_slots(slots, torch.zeros(2, 2, dtype=torch.int32), 2, 3, slots.device)


def test_rows_may_lie_apart_but_equally() -> None:
    x = torch.zeros(4, 3, 10)
    assert token_stride("x", x[..., :5]) == 10
    assert token_stride("x", x[:, 1, :5]) == 30
    assert token_stride("x", x[:0]) == 10
    with pytest.raises(ValueError, match=r"the rows of x \[4, 2, 5\] have no common stride"):
        token_stride("x", x[:, :2, :5])
    with pytest.raises(ValueError, match="x has a stride of 10 inside a row"):
        token_stride("x", x.mT)
