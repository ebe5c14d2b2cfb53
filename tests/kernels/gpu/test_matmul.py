"""`quantized_matmul` in Triton against float64, in the interpreter: every way of multiplying, and what none may touch.

The bound is that of the issue: relative RMS error against float64 no more than 1.5 times that of torch with the
dequantized matrix in x's dtype. Shapes are small because an interpreted program costs about a millisecond per line;
what the configurations of `gpu/matmul_paths.py` compile to is held by the compile matrix.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu import matmul  # noqa: E402
from qwenfit.kernels.gpu.matmul_paths import GemvConfiguration, TileConfiguration, tile_configuration  # noqa: E402
from qwenfit.kernels.gpu.target import INTERPRETED, TARGETS, target  # noqa: E402
from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize, quantize_rtn  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS = (32, 64, 128, -1)
WIDE_GEMV = GemvConfiguration(rows=2, columns=64, blocks=4)  # fewer and larger programs: quicker to interpret


@pytest.fixture(autouse=True)
def no_path_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("QWENFIT_MATMUL_PATH", raising=False)
    yield


def random_weight(
    rows: int,
    columns: int,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> QuantizedWeight:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize_rtn(matrix, bits, group, symmetric, scale_dtype)


def random_x(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


def multiply(
    path: str,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    splits: int = 0,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """One way of multiplying, with what the host would have chosen itself."""
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype) if out is None else out
    if path == "gemv":
        matmul.multiply_by_gemv(x, weight, bias, out, splits, options.get("use", WIDE_GEMV))
    elif path == "tiles":
        matmul.multiply_by_tiles(x, weight, bias, out, options.pop("where", INTERPRETED), splits, **options)
    else:
        matmul.multiply_unpacked(x, weight, bias, out)
    return out


@st.composite
def problems(draw: Callable[[Any], Any]) -> tuple[str, Tensor, QuantizedWeight, Tensor | None, int]:
    path = draw(st.sampled_from(("gemv", "tiles", "unpack")))
    dtype = draw(st.sampled_from(DTYPES if path != "tiles" else DTYPES[:2]))
    rows, columns = draw(st.integers(1, 80)), draw(st.integers(1, 9)) * 32 + draw(st.sampled_from((0, 0, 0, 5, 31)))
    weight = random_weight(
        rows,
        columns,
        draw(st.sampled_from((4, 8))),
        draw(st.sampled_from(GROUPS)),
        draw(st.booleans()),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )
    x = random_x(draw(st.integers(1, 3 if path == "gemv" else 40)), columns, dtype)
    bias = random_x(1, rows, dtype)[0] if draw(st.booleans()) else None
    return path, x, weight, bias, draw(st.integers(0, 3))


@settings(max_examples=25, deadline=None)
@given(problems())
def test_errors_stay_within_those_of_the_dtype(
    problem: tuple[str, Tensor, QuantizedWeight, Tensor | None, int],
) -> None:
    path, x, weight, bias, splits = problem
    truth = x.double() @ dequantize(weight).T + (0 if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    # A handful of numbers has no statistics, and torch may hit one of them closely: there the rounding of each is
    # allowed for, and half a float32 ulp of the magnitudes that were summed.
    lost = 2**-24 * (x.double().abs() @ dequantize(weight).T.abs()).norm() / truth.norm() / truth.numel() ** 0.5
    slack = torch.finfo(x.dtype).eps * (0.05 if truth.numel() > 64 else 0.5) + lost.item()
    assert relative_error(multiply(path, x, weight, bias, splits), truth) <= 1.5 * relative_error(plain, truth) + slack


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("bits", (4, 8))
def test_tiles_never_round_weights(bits: int, dtype: torch.dtype) -> None:
    """The sums before they are rounded to x's dtype are float32's: 1e-6 at most, where rounded weights leave 2e-3."""
    weight, x = random_weight(48, 512, bits, 128, symmetric=False), random_x(5, 512, dtype)
    truth = x.double() @ dequantize(weight).T
    assert relative_error(multiply("tiles", x, weight, splits=2, out=torch.empty(5, 48)), truth) < 1e-6


@pytest.mark.parametrize("path", ("gemv", "tiles"))
def test_splits_agree_and_repeat_their_bits(path: str) -> None:
    weight, x = random_weight(40, 1024, symmetric=False), random_x(2, 1024, torch.bfloat16)
    whole = multiply(path, x, weight, splits=1, out=torch.empty(2, 40))
    for splits in range(2, 9):
        first, second = (multiply(path, x, weight, splits=splits, out=torch.empty(2, 40)) for _ in range(2))
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ("gemv", "tiles", "unpack"))
@pytest.mark.parametrize("bits", (4, 8))
def test_a_one_hot_x_returns_the_column(bits: int, path: str) -> None:
    """Exactly: (code - zero) * scale in float32, rounded to x's dtype once."""
    weight = random_weight(20, 288, bits, 32, symmetric=False)
    columns = torch.tensor([0, 37, 129, 287]) if path != "gemv" else torch.tensor([38, 287])
    x = torch.zeros(len(columns), 288, dtype=torch.bfloat16)
    x[range(len(columns)), columns] = 1
    assert torch.equal(multiply(path, x, weight), dequantize(weight, torch.float32)[:, columns].T.bfloat16())


@pytest.mark.parametrize("path", ("gemv", "tiles", "unpack"))
@pytest.mark.parametrize("bits", (4, 8))
def test_nothing_around_the_tensors_matters_or_changes(bits: int, path: str) -> None:
    """NaN between the rows of x and around scales, padding rows scaled by NaN, a canary around the result."""
    rows, columns, count = 37, 416, 3
    weight, x = random_weight(rows, columns, bits, 64, symmetric=False), random_x(count, columns, torch.bfloat16)
    expected = multiply(path, x, weight)

    def amid_nan(tensor: Tensor) -> Tensor:
        room = torch.full((tensor.numel() + 128,), torch.nan, dtype=tensor.dtype)
        room[64 : 64 + tensor.numel()] = tensor.flatten()
        return room[64 : 64 + tensor.numel()].view(tensor.shape)

    spaced = torch.full((count + 2, columns + 16), torch.nan, dtype=x.dtype)
    spaced[1 : count + 1, :columns] = x
    scales = amid_nan(weight.scales)
    scales[:, rows:] = torch.nan
    assert weight.zeros is not None
    weight = replace(weight, scales=scales, zeros=amid_nan(weight.zeros))
    canary = torch.full((count * rows + 200,), 7.0, dtype=x.dtype)
    out = canary[100 : 100 + count * rows].view(count, rows)
    assert torch.equal(multiply(path, spaced[1 : count + 1, :columns], weight, out=out), expected)
    assert canary[:100].eq(7).all() and canary[100 + count * rows :].eq(7).all()


@pytest.mark.parametrize("path", ("gemv", "tiles"))
def test_shifting_codes_and_zero_points_together_changes_nothing(path: str) -> None:
    weight, x = random_weight(32, 256, 4, 64, symmetric=False), random_x(2, 256, torch.bfloat16)
    low = replace(weight, codes=(weight.codes.view(torch.int16) & 0x7777).view(torch.uint16))
    assert low.zeros is not None
    high = replace(low, codes=(low.codes.view(torch.int16) + 0x1111).view(torch.uint16), zeros=low.zeros + 1)
    first, second = (multiply(path, x, one, splits=1, out=torch.empty(2, 32)) for one in (low, high))
    if path == "tiles":
        assert torch.equal(first, second)  # differences of codes are exact before they are multiplied
    else:
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ("gemv", "tiles", "unpack"))
def test_a_doubled_scale_doubles_the_result(path: str) -> None:
    weight, x = random_weight(24, 160, 4, 32), random_x(2, 160, torch.bfloat16)
    assert torch.equal(multiply(path, x, replace(weight, scales=weight.scales * 2)), multiply(path, x, weight) * 2)


@pytest.mark.parametrize("weight_first", (False, True))
@pytest.mark.parametrize("bits", (4, 8))
def test_the_operands_may_be_swapped(bits: int, weight_first: bool) -> None:
    weight, x = random_weight(70, 256, bits, 32, symmetric=False), random_x(18, 256, torch.bfloat16)
    use = TileConfiguration(16, 32, weight_first, 4, 2)
    truth = x.double() @ dequantize(weight).T
    assert relative_error(multiply("tiles", x, weight, use=use, splits=2, out=torch.empty(18, 70)), truth) < 1e-6


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rocm_takes_zero_points_off_without_bfloat16_arithmetic(dtype: torch.dtype, bits: int) -> None:
    """Its second dot cancels 128 times the sum of x in float32: 1e-5, far below what rounding to bfloat16 costs."""
    x = random_x(3, 256, dtype)
    for symmetric in (True, False):
        weight = random_weight(30, 256, bits, 128, symmetric)
        out = multiply("tiles", x, weight, where=target("gfx942"), splits=2, out=torch.empty(3, 30))
        assert relative_error(out, x.double() @ dequantize(weight).T) < 1e-5


@pytest.mark.parametrize("path", ("gemv", "tiles", "unpack"))
def test_columns_in_another_order_gather_x(path: str) -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3)).int()
    weight = replace(random_weight(20, 256), order=order)
    x = random_x(2, 256, torch.bfloat16)
    result = matmul.quantized_matmul(x, weight, path=path)
    assert relative_error(result, x.double() @ dequantize(weight).T) < 4e-3


def test_leading_dimensions_bias_and_empty_inputs() -> None:
    weight, bias = random_weight(20, 128), random_x(1, 20, torch.bfloat16)[0]
    x = random_x(6, 128, torch.bfloat16)
    flat = matmul.quantized_matmul(x, weight, bias)
    assert torch.equal(matmul.quantized_matmul(x.view(2, 3, 128), weight, bias), flat.view(2, 3, 20))
    truth = x.double() @ dequantize(weight).T + bias.double()
    assert relative_error(flat, truth) < 4e-3
    assert matmul.quantized_matmul(x[:0], weight).shape == (0, 20)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", (True, False))
def test_unpacking_gives_the_bits_of_packing(bits: int, group: int, symmetric: bool) -> None:
    weight = random_weight(20, 300, bits, group, symmetric)
    for dtype in DTYPES:
        assert torch.equal(matmul.unpack(weight, dtype), dequantize(weight, dtype))


def test_what_the_kernels_rely_on_is_checked() -> None:
    weight, x = random_weight(20, 128), random_x(2, 128, torch.bfloat16)
    refused = {
        "the kernels take": (x.double(), weight),
        "the last must be equal": (x[:, :64], weight),
        "int4 lies in uint16": (x, replace(weight, codes=weight.codes.view(torch.int16))),
        "pack them by `packing.py`": (x, replace(weight, rows=12)),
        "do not fit groups": (x, replace(weight, scales=weight.scales[:, :16])),
        "must have one shape": (x, replace(weight, zeros=weight.scales[:, :16])),
        "must be contiguous": (x, replace(weight, scales=weight.scales.repeat(1, 2)[:, ::2])),
        "use expert_matmul": (x, random_stack()),
    }
    for sentence, (given_x, given_weight) in refused.items():
        with pytest.raises(ValueError, match=sentence):
            matmul.quantized_matmul(given_x, given_weight)
    with pytest.raises(ValueError, match="bias is"):
        matmul.quantized_matmul(x, weight, x[0, :19])
    with pytest.raises(ValueError, match="no path 'fast'"):
        matmul.quantized_matmul(x, weight, path="fast")
    with pytest.raises(ValueError, match="has no tiles"):
        matmul.quantized_matmul(x.float(), weight, path="tiles")


def random_stack() -> QuantizedWeight:
    return quantize_rtn(torch.randn(2, 20, 128), 4, 128)


def test_every_target_has_cases_to_compile() -> None:
    """sm_75 none that needs a matrix unit; everywhere else tiles of the configurations that rows lead to."""
    for where in TARGETS:
        names = [case.name for case in matmul.compile_cases(where)]
        assert len(names) == len(set(names))
        assert any(name.startswith("w4a16_gemv") for name in names)
        assert any("tiles" in name for name in names) == (where.matrix_instruction is not None)


HEIGHTS = [(rows, 128) for rows in (1, 4, 5, 16, 17, 33, 64, 65, 129, 300)]
HEIGHTS += [(rows, group) for rows in (5, 64, 129) for group in (32, 64, -1)]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "group"), HEIGHTS)
@pytest.mark.parametrize("bits", (4, 8))
def test_every_height_of_tiles(bits: int, rows: int, group: int) -> None:
    """With the launch's own configurations, of every maker's targets."""
    weight = random_weight(150, 320, bits, group, symmetric=group == 128)
    x = random_x(rows, 320, torch.bfloat16)
    truth = x.double() @ dequantize(weight).T
    plain = relative_error(x @ dequantize(weight, torch.bfloat16).T, truth)
    uses = {tile_configuration(where, rows, bits, matmul.group_of(weight)): where for where in TARGETS[1:]}
    for use, where in uses.items():
        assert relative_error(multiply("tiles", x, weight, where=where, use=use), truth) <= 1.5 * plain


@pytest.mark.slow
@pytest.mark.parametrize("rows", (1, 2, 3, 4, 7))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("group", (*GROUPS, 96))
def test_every_height_of_gemv(group: int, bits: int, rows: int) -> None:
    weight = random_weight(50, 320, bits, group, symmetric=group == 128)
    x = random_x(rows, 320, torch.float32)
    truth = x.double() @ dequantize(weight).T
    plain = relative_error(x @ dequantize(weight, torch.float32).T, truth)
    assert relative_error(multiply("gemv", x, weight, use=None), truth) <= 1.5 * plain + 1e-7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the interpreter's tests stand for it")
@pytest.mark.parametrize("path", ("gemv", "tiles", "unpack"))
@pytest.mark.parametrize("bits", (4, 8))
def test_on_a_device(bits: int, path: str) -> None:
    assert "TRITON_INTERPRET" not in os.environ
    device = torch.device("cuda")
    weight = random_weight(4096, 4096, bits, 128, symmetric=False)
    parts = {name: getattr(weight, name).to(device) for name in ("codes", "scales", "zeros")}
    for rows in (1, 4, 16, 64, 300):
        x = random_x(rows, 4096, torch.float16)
        truth = x.double() @ dequantize(weight).T
        result = matmul.quantized_matmul(x.to(device), replace(weight, **parts), path=path)
        plain = relative_error(x @ dequantize(weight, torch.float16).T, truth)
        assert relative_error(result.cpu(), truth) <= 1.5 * plain
