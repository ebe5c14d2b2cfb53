"""Norms, rope and convolution of the CPU path against their twins in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenfit.kernels.cpu import norm as cpu_norm
from qwenfit.kernels.cpu.library import available_isas
from qwenfit.kernels.reference import attention as reference_attention
from qwenfit.kernels.reference import dense as reference

pytestmark = pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")
FEW = settings(max_examples=40, deadline=None)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
dtypes = st.sampled_from(DTYPES)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_rounded_once(y: Tensor, exact: Tensor) -> None:
    """Relative RMS error no more than 1.5 times that of rounding the exact result, and float32's own 2e-7."""
    least = (exact.to(y.dtype).double() - exact).norm()
    assert (y.double() - exact).norm() <= 1.5 * least + 2e-7 * exact.norm()


@FEW
@given(rows=st.integers(1, 5), columns=st.integers(1, 300), dtype=dtypes, weight_dtype=dtypes)
def test_norms(rows: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, other, weight = (
        randn(rows, columns, dtype=dtype),
        randn(rows, columns, seed=1, dtype=dtype),
        randn(columns, seed=2) * 0.2,
    )
    weight = weight.to(weight_dtype)
    wide = (x.double(), weight.double(), 1e-6)
    assert_rounded_once(cpu_norm.rms_norm(x, weight, 1e-6), reference.rms_norm(*wide))
    gated = cpu_norm.gated_rms_norm(x, other, weight, 1e-6)
    assert_rounded_once(gated, reference.gated_rms_norm(x.double(), other.double(), weight.double(), 1e-6))
    y, total = cpu_norm.add_rms_norm(x, other, weight, 1e-6)
    assert torch.equal(total, (x.float() + other.float()).to(dtype))
    assert_rounded_once(y, reference.rms_norm(total.double(), weight.double(), 1e-6))


def test_arguments_stay_as_they_were_and_views_are_read() -> None:
    x, residual, weight = randn(3, 2, 128).float()[..., ::2], randn(3, 2, 64, seed=1).float(), randn(64, seed=2).float()
    before = residual.clone()
    y, _ = cpu_norm.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(y, reference.add_rms_norm(x, residual, weight, 1e-6)[0])
    assert torch.equal(residual, before)
    assert cpu_norm.rms_norm(x.double(), weight.double(), 1e-6).dtype == torch.float64


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(size: int, dtype: torch.dtype) -> None:
    x, angle = randn(7, 3, size, dtype=dtype), randn(7, size // 8, seed=1)
    y = cpu_norm.rope(x, angle.cos().float(), angle.sin().float())
    assert_rounded_once(
        y, reference_attention.rope(x.double(), angle.cos().float().double(), angle.sin().float().double())
    )
    assert torch.equal(y[..., size // 4 :], x[..., size // 4 :])


@FEW
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    channels=st.integers(1, 600),
    taps=st.integers(2, 4),
    dtype=dtypes,
)
def test_convolution_of_prompts(lengths: list[int], channels: int, taps: int, dtype: torch.dtype) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    slots = torch.arange(len(lengths), 0, -1).int()
    x, weight = randn(int(ends[-1]), channels, dtype=dtype), randn(channels, taps, seed=1, dtype=dtype)
    state = randn(len(lengths) + 2, channels, taps - 1, seed=2, dtype=dtype)
    wide = state.double()
    y = cpu_norm.causal_conv1d_prefill(x, weight, state, slots, ends)
    assert_rounded_once(y, reference.causal_conv1d_prefill(x.double(), weight.double(), wide, slots, ends))
    assert torch.equal(state.double(), wide)  # columns are copied, in slots that no sequence has nothing moves


@FEW
@given(batch=st.integers(1, 3), steps=st.integers(1, 8), channels=st.integers(1, 300), dtype=dtypes)
def test_convolution_of_a_step(batch: int, steps: int, channels: int, dtype: torch.dtype) -> None:
    x, weight = randn(batch, steps, channels, dtype=dtype), randn(channels, 4, seed=1, dtype=dtype)
    state = randn(batch * (steps + 1), channels, 3, seed=2, dtype=dtype)
    source = torch.arange(batch).int() * (steps + 1)
    target = source[:, None] + torch.arange(1, steps + 1).int() % (steps + 1)
    wide = state.double()
    y = cpu_norm.causal_conv1d_update(x, weight, state, source, target)
    assert_rounded_once(y, reference.causal_conv1d_update(x.double(), weight.double(), wide, source, target))
    assert torch.equal(state.double(), wide)
