# pyright: reportCallIssue=false
# Arguments travel as lists here, whose lengths pyright does not know.
"""The norms in Triton against float64: errors at most 1.5 times those of the twins in plain torch, nothing else
touched."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu import norm  # noqa: E402
from qwenfit.kernels.reference import dense as reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("walls")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

UNIT = 2.0**-24
"""A rounding of float32: where both errors are of that size their ratio is chance."""


def rms_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def rows_among_nan(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[rows, columns] of a wider tensor of NaN, so that a read outside shows."""
    x = torch.full((rows + 1, columns + 24), torch.nan, dtype=dtype)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3
    x[:rows, :columns] = values.to(dtype)
    return x.to(DEVICE)[:rows, :columns]


@QUICK
@given(
    rows=st.integers(1, 40),
    columns=st.one_of(st.integers(2, 300), st.sampled_from((128, 256, 1024, 2560))),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_errors_are_those_of_torch(
    rows: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype, seed: int
) -> None:
    x, other = rows_among_nan(rows, columns, dtype, seed), rows_among_nan(rows, columns, dtype, seed + 1)
    weight = rows_among_nan(1, columns, weight_dtype, seed + 2)[0]
    wide = [tensor.double() for tensor in (x, other, weight)]

    found, twin = norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
    truth = reference.rms_norm(wide[0], wide[2], 1e-6)
    assert rms_error(found, truth) <= 1.5 * rms_error(twin, truth) + UNIT

    found, twin = norm.gated_rms_norm(x, other, weight, 1e-6), reference.gated_rms_norm(x, other, weight, 1e-6)
    truth = reference.gated_rms_norm(*wide, 1e-6)
    assert rms_error(found, truth) <= 1.5 * rms_error(twin, truth) + UNIT

    found, total = norm.add_rms_norm(x, other, weight, 1e-6)
    assert torch.equal(total, other + x)
    truth = reference.rms_norm(total.double(), wide[2], 1e-6)
    assert rms_error(found, truth) <= 1.5 * rms_error(reference.rms_norm(total, weight, 1e-6), truth) + UNIT
    assert torch.equal(found, norm.rms_norm(total, weight, 1e-6))


def test_zero_rows_and_huge_rows_are_numbers() -> None:
    """eps keeps a row of zeros from 0/0, and float32 squares hold 1e15."""
    x = torch.tensor([[0.0] * 64, [1e15] * 64], device=DEVICE)
    found = norm.rms_norm(x, torch.zeros(64, device=DEVICE), 1e-6)
    torch.testing.assert_close(found[0], torch.zeros(64, device=DEVICE))
    torch.testing.assert_close(found[1], torch.ones(64, device=DEVICE))
    gate = torch.full((2, 64), -1e4, device=DEVICE)
    assert (norm.gated_rms_norm(x, gate, torch.ones(64, device=DEVICE), 1e-6) == 0).all()


def test_shapes_are_kept_and_nothing_may_come() -> None:
    x = torch.randn(2, 3, 5, 64).to(DEVICE)
    weight = torch.randn(64).to(DEVICE)
    assert norm.rms_norm(x, weight, 1e-6).shape == x.shape
    torch.testing.assert_close(norm.rms_norm(x[:, :, 1], weight, 1e-6), norm.rms_norm(x, weight, 1e-6)[:, :, 1])
    assert norm.gated_rms_norm(x[:0], x[:0], weight, 1e-6).shape == (0, 3, 5, 64)
    assert norm.rms_norm(x[:0], weight, 1e-6).shape == (0, 3, 5, 64)


def test_what_the_kernels_cannot_read_is_refused() -> None:
    x, weight = torch.randn(4, 64), torch.randn(64)
    with pytest.raises(ValueError, match=r"x is torch.int32: the norms take bfloat16, float16 and float32"):
        norm.rms_norm(x.int(), weight, 1e-6)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \[32\]: give contiguous \[64\] floats"):
        norm.rms_norm(x, weight[:32], 1e-6)
    with pytest.raises(ValueError, match=r"x has a stride of 4 inside a row"):
        norm.rms_norm(torch.randn(64, 4).T, weight, 1e-6)
    with pytest.raises(ValueError, match=r"gate is torch.float32 .* give them alike"):
        norm.gated_rms_norm(x, x[:2], weight, 1e-6)
    with pytest.raises(ValueError, match=r"residual is torch.bfloat16 .* give them alike"):
        norm.add_rms_norm(x, x.bfloat16(), weight, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the interpreter's tests stand for it")
def test_real_shapes_on_a_gpu() -> None:
    for rows, columns in ((2048, 4096), (2048, 5120), (1, 4096), (65536, 128)):
        x, other = (torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in range(2))
        weight = torch.randn(columns, device=DEVICE).bfloat16()
        found, twin = norm.add_rms_norm(x, other, weight, 1e-6), reference.add_rms_norm(x, other, weight, 1e-6)
        truth = reference.rms_norm(twin[1].double(), weight.double(), 1e-6)
        assert torch.equal(found[1], twin[1])
        assert rms_error(found[0], truth) <= 1.5 * rms_error(twin[0], truth) + UNIT
