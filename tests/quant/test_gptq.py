"""GPTQ against the textbook in float64, against rounding, and against itself: threads, paths, shared factors."""

import pytest
import torch
from torch import Tensor

from qwenfit.kernels.cpu.library import available_isas
from qwenfit.quant.cholesky import factorize
from qwenfit.quant.gptq import gptq, strip_rows
from qwenfit.quant.grid import Grid, rtn, search_scales
from qwenfit.quant.hessian import Cross, Hessian, output_error
from qwenfit.quant.quantized import Quantized


def tokens(count: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated: a spectrum that falls as a power, channels of unlike size, the same for every seed."""
    make = torch.Generator().manual_seed(99)
    mix = torch.randn(columns, columns, generator=make) * columns**-0.5
    channels = torch.randn(columns, generator=make).mul_(0.5).exp()
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    return (x * torch.arange(1, columns + 1).pow(-0.6)) @ mix * channels


def hessian_of(x: Tensor) -> Tensor:
    sums = Hessian(x.shape[-1])
    sums.add(x)
    return sums.mean()


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def dequantized(parts: tuple[Tensor, Tensor, Tensor], bits: int, symmetric: bool) -> Tensor:
    codes, scales, zeros = parts
    return Quantized(codes, scales, zeros, bits, codes.shape[1] // scales.shape[1], symmetric).dequantize()


def textbook(
    weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, bits: int, damping: float, order: Tensor
) -> Tensor:
    """Codes by the paper's own recursion (algorithm 1 of arXiv 2210.17323): inverse, its Cholesky factor, column by
    column, all in float64."""
    w, h = weight.double()[:, order], hessian.double()[order][:, order].clone()
    size = weight.shape[1] // scales.shape[1]
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).mT
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for j, column in enumerate(order.tolist()):
        scale, zero = scales[:, column // size].double(), zeros[:, column // size].double()
        code = (w[:, j] / scale).round().add(zero).clamp(0, 2**bits - 1)
        codes[:, column] = code.to(torch.uint8)
        error = (w[:, j] - (code - zero) * scale) / upper[j, j]
        w[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    return codes


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 128, True), (3, 32, False), (8, -1, True)])
def test_codes_are_the_textbooks(bits: int, group_size: int, symmetric: bool, activation_order: bool) -> None:
    # 640 columns: three blocks, the last of half a block; 40 rows: no multiple of 16.
    weight, hessian = weight_of(40, 640), hessian_of(tokens(1500, 640))
    factor = factorize(hessian, activation_order=activation_order)
    codes, scales, zeros = gptq(weight, factor, bits, group_size, symmetric=symmetric)
    expected = textbook(weight, hessian, scales, zeros, bits, 0.01, factor.order.flip(0))
    # float32 decides a few ties the other way (and what follows then differs, too).
    assert (codes == expected).float().mean() > 0.995
    ours = output_error(weight, dequantized((codes, scales, zeros), bits, symmetric), hessian)
    theirs = output_error(weight, dequantized((expected, scales, zeros), bits, symmetric), hessian)
    assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_errs_less_than_rounding_on_seen_and_unseen_tokens(bits: int) -> None:
    weight, hessian, unseen = weight_of(96, 512), hessian_of(tokens(4096, 512)), hessian_of(tokens(4096, 512, seed=7))
    done = dequantized(gptq(weight, hessian, bits, 128), bits, True)
    plain = rtn(weight, Grid(bits, 128)).dequantize()
    assert output_error(weight, done, hessian) < 0.2 * output_error(weight, plain, hessian)
    assert output_error(weight, done, unseen) < 0.25 * output_error(weight, plain, unseen)


def test_searched_scales_err_less_than_the_full_range() -> None:
    # What llm-compressor and GPTQModel start from: the largest magnitude on the outermost level.
    weight, hessian = weight_of(96, 512), hessian_of(tokens(4096, 512))
    factor = factorize(hessian)
    codes, scales, zeros = gptq(weight, factor, 4, 128)
    full = (weight.unflatten(1, (-1, 128)).abs().amax(2) * 2 / 15).bfloat16().float()
    theirs = textbook(weight, hessian, full, zeros, 4, 0.01, factor.order.flip(0))
    ours = output_error(weight, dequantized((codes, scales, zeros), 4, True), hessian)
    assert ours < 0.92 * output_error(weight, dequantized((theirs, full, zeros), 4, True), hessian)


def test_scales_are_those_of_the_search_and_exact() -> None:
    weight, factor = weight_of(20, 256), factorize(hessian_of(tokens(600, 256)))
    _, scales, zeros = gptq(weight, factor, 4, 64, symmetric=False, scale_dtype=torch.float16)
    found = search_scales(weight, Grid(4, 64, False, torch.float16), factor.importance)
    assert torch.equal(scales, found[0])
    assert torch.equal(zeros, found[1])
    assert torch.equal(scales.half().float(), scales)


def test_same_bytes_for_any_number_of_threads_and_either_path(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = weight_of(strip_rows(1) + 40, 384), hessian_of(tokens(800, 384))
    threads, results = torch.get_num_threads(), []
    try:
        for path, count in (("", 1), ("", 2), ("torch", 1), ("torch", 2)):
            monkeypatch.setenv("QWENFIT_CPU_PATH", path)
            torch.set_num_threads(count)
            results.append(gptq(weight, hessian, 4, 128, symmetric=False))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_same_bytes_for_every_instruction_set(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor = weight_of(33, 256), factorize(hessian_of(tokens(600, 256)))
    results = []
    for isa in available_isas():
        monkeypatch.setenv("QWENFIT_CPU_ISA", isa)
        results.append(gptq(weight, factor, bits, 64, symmetric=bits == 4)[0])
    monkeypatch.setenv("QWENFIT_CPU_PATH", "torch")
    monkeypatch.delenv("QWENFIT_CPU_ISA")
    plain = gptq(weight, factor, bits, 64, symmetric=bits == 4)[0]
    assert plain.max() == 2**bits - 1
    assert all(torch.equal(codes, plain) for codes in results)


def test_a_shared_factor_gives_what_the_hessian_gives() -> None:
    weight, hessian = weight_of(24, 256).bfloat16(), hessian_of(tokens(600, 256))
    whole = gptq(weight, hessian, 4, 128, damping=0.02)
    shared = gptq(weight, factorize(hessian, damping=0.02), 4, 128)
    assert all(torch.equal(a, b) for a, b in zip(whole, shared, strict=True))
    assert not torch.equal(whole[0], gptq(weight, hessian, 4, 128, damping=0.2)[0])


def test_singular_hessians_and_dead_columns() -> None:
    x = tokens(10, 256)  # far fewer tokens than columns
    x[:, 200] = 0
    weight = weight_of(16, 256)
    codes, scales, zeros = gptq(weight, hessian_of(x), 4, 128)
    nearest = (weight[:, 200] / scales[:, 1]).round().add(8).clamp(0, 15)
    assert torch.equal(codes[:, 200].float(), nearest)  # a column that no token used is rounded, not lost
    assert output_error(weight, dequantized((codes, scales, zeros), 4, True), hessian_of(x)) < 0.01
    codes, scales, zeros = gptq(weight, torch.zeros(256, 256), 4, 128)
    assert torch.equal(codes, rtn(weight, Grid(4, 128)).codes)


def test_asymmetric_calibration_comes_nearer_to_the_full_precision_outputs() -> None:
    reference = tokens(4096, 384)
    x = reference + 0.15 * tokens(4096, 384, seed=3).roll(1, 1) + 0.05 * reference.roll(2, 1)
    weight = weight_of(64, 384)
    sums = Hessian(384, cross=True)
    sums.add(x, reference)
    hessian, cross = sums.mean(), sums.cross_mean()
    wanted = reference @ weight.t()

    def error(strength: float) -> float:
        parts = gptq(weight, hessian, 4, 128, cross=cross, cross_strength=strength)
        return float((x @ dequantized(parts, 4, True).t() - wanted).square().sum() / wanted.square().sum())

    plain, half, full = error(0.0), error(0.5), error(1.0)
    # The least squares solution itself, unrounded: what is left then cannot be had.
    solution = torch.linalg.lstsq(x.double(), wanted.double()).solution
    floor = float((x.double() @ solution - wanted).square().sum() / wanted.double().square().sum())
    assert floor < full < half < plain
    assert full - floor < 0.6 * (plain - floor)
    without = gptq(weight, hessian, 4, 128)[0]
    assert torch.equal(gptq(weight, hessian, 4, 128, cross=Cross(torch.zeros(384, 384)))[0], without)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="a weight of 128 columns with a Hessian of 64"):
        gptq(weight_of(2, 128), torch.eye(64), 4, 64)
    with pytest.raises(ValueError, match="do not fall into groups"):
        gptq(weight_of(2, 96), torch.eye(96), 4, 128)
    weight = weight_of(2, 128)
    weight[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        gptq(weight, torch.eye(128), 4, 128)
