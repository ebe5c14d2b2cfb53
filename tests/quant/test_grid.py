"""Grids: the searched scale against brute force, dtypes of scales, rtn's codes, the C loop against its torch twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenfit.kernels.cpu.library import available_isas
from qwenfit.quant.grid import Grid, round_to_grid, rtn, search_scales


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def square_error(weight: Tensor, rounded: Tensor, cost: Tensor | float = 1.0) -> float:
    return float(((weight - rounded).double().square() * cost).sum())


def best_of_many(x: Tensor, v: Tensor, bits: int, symmetric: bool) -> float:
    """The better of both signs of the scale."""
    return min(best_of_one_sign(x, v, bits, symmetric), best_of_one_sign(-x, v, bits, symmetric))


def best_of_one_sign(x: Tensor, v: Tensor, bits: int, symmetric: bool) -> float:
    """The least weighted square error of one group over a fine sweep of steps and all zeros, in float64."""
    x, v, top = x.double(), v.double(), 2**bits - 1
    zeros = [2 ** (bits - 1)] if symmetric else range(top + 1)
    steps = torch.linspace(0.2, 1.2, 800, dtype=torch.float64) * (2 * x.abs().max() / top)
    best = float("inf")
    for zero in zeros:
        code = (x / steps.unsqueeze(1)).round().add(zero).clamp(0, top)
        best = min(best, float((((code - zero) * steps.unsqueeze(1) - x).square() * v).sum(1).min()))
    return best


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_comes_within_3_percent_of_brute_force(bits: int, symmetric: bool) -> None:
    # In the mean over 24 groups; a search of the full range alone misses by 10 % at 4 bits, by 30 % at 3.
    weight, cost = randn(24, 64), randn(64, seed=1).exp()
    rounded = rtn(weight, Grid(bits, 64, symmetric, torch.float32), cost).dequantize()
    best = sum(best_of_many(row, cost, bits, symmetric) for row in weight)
    assert square_error(weight, rounded, cost) < 1.03 * best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_exact_in_the_dtype_of_the_file(dtype: torch.dtype) -> None:
    weight = randn(8, 128) * 0.02
    scales, _ = search_scales(weight, Grid(4, 32, True, dtype))
    assert torch.equal(scales.to(dtype).float(), scales)
    if dtype == torch.float32:
        assert not torch.equal(scales.bfloat16().float(), scales)


def test_signed_scales_give_the_larger_side_one_level_more() -> None:
    weight = randn(64, 128, seed=8)
    signed, positive = rtn(weight, Grid(4, 32)), rtn(weight, Grid(4, 32, signed_scales=False))
    grouped = weight.unflatten(1, (-1, 32))
    assert torch.equal(signed.scales < 0, grouped.amax(2) > -grouped.amin(2))
    assert (positive.scales > 0).all()
    assert square_error(weight, signed.dequantize()) < 0.93 * square_error(weight, positive.dequantize())
    for grid in (Grid(4, 32, False), Grid(8, 32)):
        assert (rtn(weight, grid).scales > 0).all()


def test_codes_are_the_nearest_levels_and_costs_move_the_scale() -> None:
    weight = randn(16, 128, seed=3)
    grid = Grid(4, 32, False)
    done = rtn(weight, grid)
    levels = torch.arange(16.0).view(1, 1, 16)
    scale, zero = (t.repeat_interleave(32, 1).unsqueeze(2) for t in (done.scales, done.zeros.float()))
    distance = ((levels - zero) * scale - weight.unsqueeze(2)).abs()
    torch.testing.assert_close((done.dequantize() - weight).abs(), distance.amin(2))
    cost = torch.ones(128)
    cost[::4] = 100
    weighted = rtn(weight, grid, cost)
    assert square_error(weight, weighted.dequantize(), cost) < 0.95 * square_error(weight, done.dequantize(), cost)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_lose_less_than_a_hundredth_of_four(group_size: int, symmetric: bool) -> None:
    weight = randn(8, 256, seed=4)  # a 16th of the step: (1/16)^2 = 1/256 of the square error
    lost = [square_error(weight, rtn(weight, Grid(b, group_size, symmetric)).dequantize()) for b in (8, 4)]
    assert lost[0] < lost[1] / 100


def test_groups_that_are_zero_or_have_one_sign() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1 + randn(64).abs()
    weight[2] = -1 - randn(64).abs()
    for symmetric in (True, False):
        done = rtn(weight, Grid(4, 32, symmetric))
        assert torch.equal(done.dequantize()[0], weight[0])
        assert torch.isfinite(done.scales).all()
    assert done.zeros[1].max() <= 1  # zero stays a level, at the end of the range or next to it
    assert done.zeros[2].min() >= 14
    assert (done.dequantize() - weight).abs().max() < 0.3


def test_scales_below_the_dtype_of_the_file_round_to_nothing() -> None:
    done = rtn(randn(4, 32) * 1e-9, Grid(4, 32, True, torch.float16))
    assert not done.dequantize().any()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    size=st.sampled_from([32, 64, 128, 40]),
    bits=st.sampled_from([3, 4, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
@pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")
def test_every_instruction_set_and_torch_give_the_same_bits(
    rows: int, groups: int, size: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    grid = Grid(bits, size if size != 40 else -1, symmetric, dtype)
    columns = size * (groups if size != 40 else 1)
    weight, cost = randn(rows, columns, seed=rows) * 0.02, randn(columns, seed=5).exp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENFIT_CPU_PATH", "torch")
        plain = search_scales(weight, grid, cost)
        patch.setenv("QWENFIT_CPU_PATH", "c")
        for isa in available_isas():
            patch.setenv("QWENFIT_CPU_ISA", isa)
            assert all(torch.equal(a, b) for a, b in zip(search_scales(weight, grid, cost), plain, strict=True)), isa


def test_wrong_calls_are_refused() -> None:
    for wrong in ((5, 128), (4, 100)):
        with pytest.raises(ValueError, match=r"bits=5|group_size=100"):
            Grid(*wrong)
    with pytest.raises(ValueError, match="float64"):
        Grid(4, 32, True, torch.float64)
    with pytest.raises(ValueError, match="96 columns do not fall into groups of 64"):
        rtn(randn(2, 96), Grid(4, 64))
    for bad in (torch.nan, torch.inf):
        weight = randn(2, 32)
        weight[1, 7] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            search_scales(weight, Grid(4, 32))
        with pytest.raises(ValueError, match="NaN or Inf"):
            round_to_grid(weight, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="importance"):
        rtn(randn(2, 32), Grid(4, 32), torch.ones(31))


@pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_pass_in_c_gives_the_bits_of_search_and_rounding(monkeypatch, isa: str, bits: int, symmetric: bool) -> None:
    monkeypatch.setenv("QWENFIT_CPU_ISA", isa)
    weight = randn(300, 256, seed=11)
    weight[3], weight[4, :32], weight[5], weight[6] = 0, 0, weight[5] * 1e-30, weight[6] * 1e30
    weight[7], weight[8, ::2], weight[9] = 1.0, -0.0, weight[9].abs()
    for dtype, group_size in ((torch.bfloat16, 128), (torch.float32, 32), (torch.bfloat16, -1)):
        grid, matrix = Grid(bits, group_size, symmetric), weight.to(dtype)
        done, (scales, zeros) = rtn(matrix, grid), search_scales(matrix, grid)
        assert torch.equal(done.scales, scales) and torch.equal(done.zeros, zeros)
        assert torch.equal(done.codes, round_to_grid(matrix, scales, zeros, bits))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rtn_refuses_what_is_not_finite(value: float, dtype: torch.dtype) -> None:
    weight = randn(300, 128, seed=12).to(dtype)
    weight[290, 77] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        rtn(weight, Grid(8, 128))
