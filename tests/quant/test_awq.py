"""AWQ: what the scales gain, and that every fold leaves the model's function as it was."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from qwenfit.quant.awq import (
    awq,
    fold_into_norm,
    fold_into_rows,
    head_channels,
    scale_columns,
    search_smoothing,
)
from qwenfit.quant.gptq import gptq
from qwenfit.quant.grid import Grid, rtn
from qwenfit.quant.hessian import Hessian, output_error
from qwenfit.quant.quantized import Quantized


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, columns: int, seed: int = 0) -> Tensor:
    """Some channels are much larger than others, as behind a norm of a trained model."""
    channels = randn(columns, seed=50).mul(0.3).exp()
    channels[:: columns // 4] *= 20
    return (randn(count, columns, seed=seed) + randn(count, 16, seed=seed + 1) @ randn(16, columns, seed=51)) * channels


def hessian_of(x: Tensor) -> Tensor:
    sums = Hessian(x.shape[-1])
    sums.add(x)
    return sums.mean()


@pytest.mark.parametrize("bits", [3, 4])
def test_rtn_errs_more_than_awq_and_awq_more_than_gptq(bits: int) -> None:
    grid, x = Grid(bits, 128), tokens(2048, 256)
    hessian, unseen = hessian_of(x), hessian_of(tokens(2048, 256, seed=9))
    readers = [randn(150, 256, seed=3) * 0.02, randn(60, 256, seed=4) * 0.02]
    found = search_smoothing(readers, hessian, grid)
    assert found.error < 0.9 * found.plain_error
    for reader in readers:
        smoothed = awq(reader, hessian, grid, found.scales).dequantize() / found.scales
        codes, scales, zeros = gptq(reader, hessian, bits, 128)
        errors = [
            output_error(reader, rounded, unseen)
            for rounded in (
                rtn(reader, grid).dequantize(),
                smoothed,
                Quantized(codes, scales, zeros, bits, 128, True).dequantize(),
            )
        ]
        assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]


def test_clip_search_knows_that_inputs_shrink_as_columns_grow() -> None:
    hessian, weight, grid = torch.eye(128), randn(64, 128) * 0.02, Grid(3, 128)
    scales = randn(128, seed=1).exp()
    done, blind = (q.dequantize() / scales for q in (awq(weight, hessian, grid, scales), rtn(weight * scales, grid)))
    assert output_error(weight, done, hessian) < 0.9 * output_error(weight, blind, hessian)


def test_nothing_to_gain_leaves_scales_at_one() -> None:
    found = search_smoothing([torch.ones(4, 64)], torch.eye(64), Grid(8, 32))
    assert torch.equal(found.scales, torch.ones(64))
    assert found.error == found.plain_error


@pytest.mark.parametrize("offset", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_and_readers_stay_exact_after_the_norm_is_rounded(offset: float, dtype: torch.dtype) -> None:
    norm = (randn(512) * 0.3 + 1 - offset).to(dtype)
    norm[3] = -offset  # a gain of zero
    norm[4] = -offset - 0.5  # a negative one
    wanted = randn(512, seed=1).exp()
    folded, exact = fold_into_norm(norm, wanted, offset=offset)
    assert folded.dtype == dtype
    gain, new_gain = norm.double() + offset, folded.double() + offset
    torch.testing.assert_close(new_gain * exact.double(), gain, rtol=1e-6, atol=0)
    assert exact[3] == 1
    near = torch.arange(512) != 3
    assert (exact / wanted - 1).abs()[near].median() < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    if dtype == torch.bfloat16:  # were the scales taken as asked for, this would be the error of every reader
        assert (wanted.double() * new_gain / gain - 1).abs()[near].max() > 1e-3


def test_channels_whose_gain_would_vanish_keep_it() -> None:
    norm = torch.tensor([-0.995, 0.0, 0.5]).bfloat16()  # gain 0.0039 in bfloat16: /8 needs bits that -1 + x has not
    folded, exact = fold_into_norm(norm, torch.tensor([8.0, 1e8, 2.0]), offset=1.0)
    assert torch.equal(folded[:2], norm[:2])
    assert torch.equal(exact[:2], torch.ones(2))
    assert exact[2] == 2.0
    folded, exact = fold_into_norm(torch.zeros(2), torch.tensor([1e5, 1e-5]), offset=1.0)
    assert not folded.any()  # float32 could hold them, the readers' bfloat16 not
    assert torch.equal(exact, torch.ones(2))


def test_unquantized_readers_are_compensated() -> None:
    x, reader = randn(20, 64), randn(4, 64, seed=1).bfloat16()
    folded, exact = fold_into_norm(torch.zeros(64).bfloat16(), randn(64, seed=2).exp(), offset=1.0)
    compensated = scale_columns(reader, exact).to(reader.dtype)
    wanted = x @ reader.float().t()
    got = (x * (1 + folded.float())) @ compensated.float().t()
    assert (got - wanted).norm() < 3e-3 * wanted.norm()  # bfloat16's rounding of the reader, 2^-9 per weight
    assert ((x * (1 + folded.float())) @ reader.float().t() - wanted).norm() > 0.3 * wanted.norm()


def test_fold_of_a_norm_that_heads_share() -> None:
    # linear_attn.norm: plain w, 128 channels for all heads, then the gate, then out_proj.
    heads, dim = 4, 32
    x, gate, norm = randn(10, heads, dim), randn(10, heads, dim, seed=1), randn(dim, seed=2).exp()
    out = randn(24, heads * dim, seed=3)
    channels = torch.arange(dim).repeat(heads)
    inputs = (x * norm * silu(gate)).flatten(1)
    found = search_smoothing([out], hessian_of(inputs), Grid(3, 32), channels)
    assert found.scales.shape == (dim,)
    folded, exact = fold_into_norm(norm, found.scales, offset=0.0)
    got = (x * folded * silu(gate)).flatten(1) @ scale_columns(out, exact, channels).t()
    torch.testing.assert_close(got, inputs @ out.t(), rtol=1e-4, atol=1e-4)


def test_folds_into_the_projections_before() -> None:
    scales = randn(64, seed=5).exp()
    x, up, gate, down = randn(9, 32), randn(64, 32, seed=1), randn(64, 32, seed=2), randn(16, 64, seed=3)
    wanted = (silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    got = (silu(x @ gate.t()) * (x @ fold_into_rows(up, scales).t())) @ scale_columns(down, scales).t()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    # Attention: 4 query heads on 2 KV heads of 32; the output gate is a product per element.
    channels = head_channels(4, 2, 32)
    assert channels.tolist() == [*range(32), *range(32), *range(32, 64), *range(32, 64)]
    values, weights = randn(7, 64, seed=6), randn(4, 5, 7, seed=7).softmax(-1)
    output_gate, o_proj = randn(5, 128, seed=8).sigmoid(), randn(16, 128, seed=9)

    def attention(values: Tensor, o_proj: Tensor) -> Tensor:
        per_head = values.unflatten(1, (2, 32)).repeat_interleave(2, dim=1)
        mixed = torch.einsum("hqk,khd->qhd", weights, per_head).flatten(1)
        return (mixed * output_gate) @ o_proj.t()

    got = attention(values / scales, scale_columns(o_proj, scales, channels))
    torch.testing.assert_close(got, attention(values, o_proj), rtol=1e-4, atol=1e-4)
