"""The interpreter that the kernel tests stand on computes bfloat16 as torch does, to the bit."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
import triton.language as tl  # noqa: E402


@triton.jit
def arithmetic(x, y, total, product, narrowed, wide, size: tl.constexpr):
    at = tl.arange(0, size)
    a, b = tl.load(x + at), tl.load(y + at, mask=at < size, other=0.0)
    tl.store(total + at, a + b)
    tl.store(product + at, a * b)
    tl.store(narrowed + at, tl.load(wide + at).to(tl.bfloat16))


@triton.jit
def matmul(x, y, out, size: tl.constexpr):
    at = tl.arange(0, size)
    square = at[:, None] * size + at[None, :]
    tl.store(out + square, tl.dot(tl.load(x + square), tl.load(y + square)))


def test_sums_products_and_casts_round_to_nearest_even() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1024, generator=generator).bfloat16() for _ in range(2))
    wide = torch.randn(1024, generator=generator)
    total, product, narrowed = (torch.zeros_like(x) for _ in range(3))
    arithmetic[(1,)](x, y, total, product, narrowed, wide, 1024)
    assert torch.equal(total, x + y)
    assert torch.equal(product, x * y)
    assert torch.equal(narrowed, wide.bfloat16())


def test_a_dot_accumulates_bfloat16_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    out = torch.zeros(64, 64)
    matmul[(1,)](x, y, out, 64)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)
