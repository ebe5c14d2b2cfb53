"""The inverse of a chunk's triangle against float64, and products of float32 with 16-bit tensors."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
import triton.language as tl  # noqa: E402

from qwenfit.kernels.gpu.delta_solve import dot_wide, invert_unit_lower, precision, solve_configuration  # noqa: E402
from qwenfit.kernels.gpu.target import TARGETS  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EYE = torch.eye(64, dtype=torch.float64, device=DEVICE)


@triton.jit
def invert(below, inverse, PRECISION: tl.constexpr):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(inverse + at, invert_unit_lower(tl.load(below + at), PRECISION))


@triton.jit
def multiply(wide, narrow, product):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    zero = tl.zeros((32, 32), tl.float32)
    tl.store(product + at, dot_wide(tl.load(wide + at), tl.load(narrow + at), zero, "ieee"))


def inverse_of(below: Tensor) -> Tensor:
    inverse = torch.full((64, 64), torch.nan, device=DEVICE)
    invert[(1,)](below, inverse, PRECISION="tf32x3" if DEVICE.type == "cuda" else "ieee")
    return inverse.double()


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_random_triangles(size: float) -> None:
    """Within 1e-5 of the largest element: 1e-7 per product, and these inverses are sums of thousands."""
    generator = torch.Generator().manual_seed(1)
    below = (torch.randn(64, 64, generator=generator) * size).tril(-1).to(DEVICE)
    truth = torch.linalg.inv(EYE + below.double())
    assert (inverse_of(below) - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_a_full_triangle_is_exact() -> None:
    """Equal keys without decay: the inverse has -1 right below its diagonal and 0 elsewhere, to the bit."""
    below = torch.ones(64, 64, device=DEVICE).tril(-1)
    truth = EYE - torch.diag(torch.ones(63, dtype=torch.float64, device=DEVICE), -1)
    assert torch.equal(inverse_of(below), truth)


def test_every_block_is_reached() -> None:
    """One element below the diagonal at a time: its inverse has it negated and nothing else."""
    for row, column in ((1, 0), (15, 3), (16, 15), (31, 0), (33, 31), (47, 32), (50, 40), (63, 0), (63, 62)):
        below = torch.zeros(64, 64, device=DEVICE)
        below[row, column] = 0.75
        assert torch.equal(inverse_of(below), EYE - below.double())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 21), (torch.float32, 21)])
def test_two_terms_for_one_operand(dtype: torch.dtype, bits: int) -> None:
    """16 bits of the wide operand survive in bfloat16 (8 in each term), 22 in float16."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(32, 32, generator=generator).to(DEVICE)
    narrow = torch.randn(32, 32, generator=generator).to(dtype).to(DEVICE)
    product = torch.full((32, 32), torch.nan, device=DEVICE)
    multiply[(1,)](wide, narrow, product)
    truth = wide.double() @ narrow.double()
    error = (product.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error <= 2.0**-bits


def test_tf32_alone_is_nowhere_and_rocm_gets_what_it_knows() -> None:
    for where in TARGETS:
        for element_bytes in (2, 4):
            found = precision(where, element_bytes)
            assert found == "tf32x3" if where.backend == "cuda" else found in ("ieee", "bf16x3")
            assert where.backend == "cuda" or element_bytes == 2 or found == "ieee"
            use = solve_configuration(where, 16, 64, element_bytes)
            assert use.depth == 16 and use.columns == 16
