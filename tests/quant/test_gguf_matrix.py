"""GPTQ on GGML's blocks: less error on the inputs than rounding, in whatever order the file has the columns."""

import pytest
import torch

from qwenfit.quant.cholesky import factorize
from qwenfit.quant.gguf_blocks import KINDS, decode
from qwenfit.quant.gguf_matrix import round_matrix, solve_matrix
from qwenfit.quant.hessian import output_error

ROWS, COLUMNS, TOKENS = 48, 512, 2048


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [O, I] and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    x = torch.randn(TOKENS, COLUMNS, generator=generator) @ (mixing + 0.5 * torch.eye(COLUMNS))
    return weight, x.t() @ x / TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_solving_beats_rounding(kind: str) -> None:
    """At 4 bits by a quarter and more; with the Hessian's diagonal alone (llama.cpp's imatrix) it cannot."""
    weight, hessian = problem()
    factor = factorize(hessian)
    plain = output_error(weight, round_matrix(weight, kind).dequantize(), hessian)
    informed = output_error(weight, round_matrix(weight, kind, None, hessian.diagonal()).dequantize(), hessian)
    solved = output_error(weight, solve_matrix(weight, kind, factor).dequantize(), hessian)
    assert solved < 0.75 * informed and solved < 0.75 * plain, (solved, informed, plain)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_columns_in_another_order_in_the_file(kind: str) -> None:
    """What comes back is in the checkpoint's order, what is stored in the file's, and the error is no larger."""
    weight, hessian = problem()
    order = torch.arange(COLUMNS).view(4, -1, 32).transpose(0, 1).flatten()
    factor = factorize(hessian)
    for found in (solve_matrix(weight, kind, factor, order), round_matrix(weight, kind, order)):
        assert torch.equal(decode(found.blocks, kind), found.dequantize()[:, order])
    solved = solve_matrix(weight, kind, factor, order)
    straight = output_error(weight, solve_matrix(weight, kind, factor).dequantize(), hessian)
    assert output_error(weight, solved.dequantize(), hessian) < 1.1 * straight
    part = solved.rows(slice(0, None, 7))
    assert torch.equal(part.dequantize(), solved.dequantize()[::7]) and len(part) == 7


def test_an_empty_group_stays_empty() -> None:
    weight, hessian = problem()
    weight[3, 64:96] = 0
    found = solve_matrix(weight, "Q4_K", factorize(hessian)).dequantize()
    assert bool(torch.isfinite(found).all()) and output_error(weight[3:4], found[3:4], hessian) < 0.05
