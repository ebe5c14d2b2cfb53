"""The Hessian against float64, however its tokens come; its factor, however singular it is; bytes for any threads."""

import pytest
import torch
from torch import Tensor

from qwenfit.quant.cholesky import factorize
from qwenfit.quant.hessian import Hessian, mirror, output_error, product_is_less


def tokens(count: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated: a spectrum that falls as a power, channels of unlike size."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=make) * torch.arange(1, columns + 1).pow(-0.7)
    x = x @ torch.randn(columns, columns, generator=make) * columns**-0.5
    return x * torch.randn(columns, generator=make).exp()


def hessian_of(x: Tensor) -> Tensor:
    sums = Hessian(x.shape[-1])
    sums.add(x)
    return sums.mean()


@pytest.mark.parametrize("columns", [16, 512, 700])
def test_mean_of_x_t_x(columns: int) -> None:
    x = tokens(300, columns)
    exact = x.double().t() @ x.double() / 300
    sums = Hessian(columns)
    sums.add(x[:100].reshape(2, 50, columns))
    sums.add(x[100:])
    assert sums.tokens == 300
    mean = sums.mean()
    assert torch.equal(mean, mean.t())
    assert (mean - exact).norm() < 1e-6 * exact.norm()


def test_half_precision_tokens_are_summed_in_float32() -> None:
    x = tokens(400, 96).bfloat16()
    exact = x.double().t() @ x.double() / 400
    assert (hessian_of(x) - exact).norm() < 1e-6 * exact.norm()


def test_cross_term() -> None:
    x, reference = tokens(200, 600), tokens(200, 600, seed=1)
    sums = Hessian(600, cross=True)
    sums.add(x, reference)
    exact = (reference - x).double().t() @ x.double() / 200
    assert (sums.cross_mean().matrix - exact).norm() < 1e-6 * exact.norm()
    assert torch.equal(sums.mean(), hessian_of(x))


def test_cross_term_of_fewer_tokens() -> None:
    x, reference = tokens(200, 600), tokens(120, 600, seed=1)
    sums = Hessian(600, cross=True)
    sums.add(x[:120], reference)
    sums.add(x[120:])
    exact = (reference - x[:120]).double().t() @ x[:120].double() / 120
    assert (sums.cross_mean(unmoved=40).matrix * 160 / 120 - exact).norm() < 1e-6 * exact.norm()
    assert (sums.mean() - hessian_of(x)).norm() < 1e-6 * hessian_of(x).norm()


@pytest.mark.parametrize("threads", [1, 3])
def test_cross_term_times_the_weight_that_reads_it(threads: int) -> None:
    """The same as with the product afterwards, of strips filled up to 16 rows, and for any number of threads."""
    x, reference = tokens(5000, 600), tokens(5000, 600, seed=1)
    weight = torch.randn(531, 600, generator=torch.Generator().manual_seed(5)).bfloat16()
    sums, apart = Hessian(600, cross=True, weight=weight), Hessian(600, cross=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        sums.add(x, reference)
    finally:
        torch.set_num_threads(before)
    apart.add(x, reference)
    again = Hessian(600, cross=True, weight=weight)
    again.add(x, reference)
    found, cross = sums.cross_mean(), apart.cross_mean()
    assert found.of_weight and torch.equal(found.matrix, again.cross_mean().matrix)
    for rows in (slice(0, 512), slice(512, 531)):
        padded = torch.nn.functional.pad(weight[rows].float().t(), (0, -len(weight[rows]) % 16))
        expected = cross.times(padded, rows)
        assert (found.times(padded, rows) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("rows", "columns", "expected"), [(4096, 12288, True), (4096, 4096, False), (12288, 4096, False)]
)
def test_down_proj_alone_is_multiplied_at_once(rows: int, columns: int, expected: bool) -> None:
    """Multiply-adds at 9B shapes and 6,144 tokens: 6.2e11 instead of 15.5e11 for down_proj."""
    assert product_is_less(rows, columns, 6144) is expected


@pytest.mark.parametrize("activation_order", [True, False])
def test_factor_times_its_transpose_is_the_damped_hessian(activation_order: bool) -> None:
    columns = 600  # more than two blocks, and not a multiple of one
    hessian = hessian_of(tokens(2000, columns))
    kept = hessian.clone()
    factor = factorize(hessian, damping=0.01, activation_order=activation_order)
    assert torch.equal(hessian, kept)
    assert factor.damping == 0.01
    taken = factorize(hessian, damping=0.01, activation_order=activation_order, overwrite=True)
    assert taken.lower.data_ptr() == hessian.data_ptr()
    assert torch.equal(taken.lower, factor.lower)
    lower = (factor.lower.tril(-1) + torch.eye(columns)).double() * factor.scale.double()
    damped = kept.double()[factor.order][:, factor.order]
    damped.diagonal().add_(0.01 * kept.diagonal().double().mean())
    assert (lower @ lower.t() - damped).norm() < 1e-6 * damped.norm()
    solved = factor.order.flip(0)  # from the first to the last
    wanted = kept.diagonal().sort(descending=True).values if activation_order else kept.diagonal()
    assert torch.equal(kept.diagonal()[solved], wanted)
    free = (damped.diagonal() * factor.scale.double().square()).sqrt()
    torch.testing.assert_close(factor.importance[factor.order], free.float())


def test_damping_is_raised_until_a_singular_hessian_has_a_factor() -> None:
    hessian = hessian_of(tokens(20, 600))
    hessian[:, 7] = hessian[7] = 0  # a channel that no token used
    hessian += 1e4 * torch.outer(hessian[3], hessian[3]) / hessian[3].square().mean()  # one direction above all others
    factor = factorize(hessian, damping=0.0)
    assert factor.damping > 0
    assert torch.isfinite(factor.lower.tril(-1)).all()
    assert (factor.scale > 0).all()
    lower = (factor.lower.tril(-1) + torch.eye(600)).double() * factor.scale.double()
    damped = hessian.double()[factor.order][:, factor.order]
    damped.diagonal().add_(factor.damping * hessian.diagonal().double().mean())
    assert (lower @ lower.t() - damped).norm() < 1e-5 * damped.norm()


def test_a_hessian_of_zeros_has_a_factor() -> None:
    factor = factorize(torch.zeros(64, 64))
    assert torch.allclose(factor.scale, torch.full((64,), 0.1))  # the root of 0.01 x 1


def test_same_bytes_for_any_number_of_threads() -> None:
    x = tokens(600, 1100)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            hessian = hessian_of(x)
            factor = factorize(hessian)
            results.append((hessian, factor.lower.tril(-1), factor.scale))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_output_error_is_that_of_the_outputs() -> None:
    x, weight = tokens(500, 128), torch.randn(700, 128, generator=torch.Generator().manual_seed(2))
    rounded = weight.bfloat16().float()
    exact = (x.double() @ (weight - rounded).double().t()).square().sum() / (x @ weight.t()).double().square().sum()
    assert output_error(weight, rounded, hessian_of(x)) == pytest.approx(float(exact), rel=1e-4)
    assert output_error(weight, rounded, hessian_of(x), most_rows=200) == pytest.approx(float(exact), rel=0.2)
    assert output_error(torch.zeros(2, 128), torch.zeros(2, 128), hessian_of(x)) == 0


def test_mirror() -> None:
    square = torch.randn(1030, 1030, generator=torch.Generator().manual_seed(3))
    lower = square.tril()
    assert torch.equal(mirror(square), lower + lower.tril(-1).t())


def test_wrong_calls_are_refused() -> None:
    sums = Hessian(8)
    with pytest.raises(ValueError, match="no mean"):
        Hessian(8).mean()
    with pytest.raises(ValueError, match="9 values for a Hessian of 8"):
        sums.add(torch.ones(3, 9))
    with pytest.raises(ValueError, match="cross term"):
        sums.add(torch.ones(3, 8), torch.ones(3, 8))
    with pytest.raises(ValueError, match="cross=True"):
        sums.cross_mean()
    with pytest.raises(ValueError, match="NaN or Inf"):
        sums.add(torch.full((3, 8), torch.nan))
    sums.add(torch.ones(3, 8))
    sums.mean()
    with pytest.raises(ValueError, match="finished"):
        sums.add(torch.ones(3, 8))
    for wrong in (torch.full((4, 4), torch.nan), -torch.eye(4)):
        with pytest.raises(ValueError, match="NaN, Inf or a negative"):
            factorize(wrong)
    with pytest.raises(ValueError, match="square float32"):
        factorize(torch.ones(4, 5))
    with pytest.raises(ValueError, match="not of any tokens"):
        factorize(torch.tensor([[1.0, 1e9], [1e9, 1.0]]))
