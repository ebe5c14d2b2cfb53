"""`expert_matmul` in Triton against its twin in float64: rows by expert, found on the device."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu import experts  # noqa: E402
from qwenfit.kernels.gpu.target import INTERPRETED, TARGETS  # noqa: E402
from qwenfit.kernels.layout.packing import QuantizedWeight, quantize_rtn  # noqa: E402
from qwenfit.kernels.reference import dense as reference  # noqa: E402

EXPERTS, ROWS, COLUMNS = 5, 40, 200


def stacks(dtype: torch.dtype) -> dict[str, QuantizedWeight | Tensor]:
    matrices = torch.randn(EXPERTS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return {
        "int4": quantize_rtn(matrices, 4, 64, symmetric=False),
        "int8": quantize_rtn(matrices, 8, 128),
        "plain": matrices.to(dtype),
    }


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


def relative_error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("counts", ((0, 2, 0, 1, 1), (0, 0, 0, 0, 3), (1, 17, 1, 1, 17)))
@pytest.mark.parametrize("storage", ("int4", "int8", "plain"))
@pytest.mark.parametrize("path", ("gemv", "tiles", "unpack"))
def test_errors_stay_within_those_of_the_dtype(path: str, storage: str, counts: tuple[int, ...]) -> None:
    """1.5 times those of matrices in bfloat16. The last counts need every tile that is launched: 5 + 37 // 16."""
    if path == "gemv" and sum(counts) > 8:
        counts = (1, 3, 0, 0, 1)  # a program per row: minutes in the interpreter
    weight, offsets = stacks(torch.bfloat16)[storage], offsets_of(*counts)
    x = torch.randn(sum(counts), COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = reference.expert_matmul(x.double(), weight, offsets)
    plain = torch.cat(
        [
            x[begin:end] @ matrix.T
            for (begin, end), matrix in zip(
                reference.spans(offsets),
                weight if isinstance(weight, Tensor) else experts_in(weight, torch.bfloat16),
                strict=True,
            )
        ]
    )
    result = experts.expert_matmul(x, weight, offsets, path)
    assert relative_error(result, truth) <= 1.5 * relative_error(plain, truth) + 2e-4


def experts_in(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    from qwenfit.kernels.layout.packing import dequantize

    return dequantize(weight, dtype)


def test_float32_rows_and_columns_in_another_order() -> None:
    weight, offsets = stacks(torch.float32)["int4"], offsets_of(1, 0, 2, 0, 0)
    assert isinstance(weight, QuantizedWeight)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(2)).int()
    weight = replace(weight, order=order)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(3))
    truth = reference.expert_matmul(x.double(), weight, offsets)
    assert relative_error(experts.expert_matmul(x, weight, offsets), truth) < 5e-7


def test_nothing_beside_an_expert_matters() -> None:
    """NaN in all experts that have no rows, between the rows of x, and in padding rows of the scales."""
    weight, offsets = stacks(torch.bfloat16)["int8"], offsets_of(0, 2, 0, 3, 0)
    assert isinstance(weight, QuantizedWeight)
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(4)).bfloat16()
    spaced = torch.full((7, COLUMNS + 8), torch.nan, dtype=x.dtype)
    spaced[1:6, :COLUMNS] = x
    scales = weight.scales.clone()
    scales[[0, 2, 4]] = torch.nan
    scales[..., ROWS:] = torch.nan
    for path in ("gemv", "tiles"):
        result = experts.expert_matmul(spaced[1:6, :COLUMNS], replace(weight, scales=scales), offsets, path)
        assert torch.equal(result, experts.expert_matmul(x, weight, offsets, path))


def test_what_the_kernels_rely_on_is_checked() -> None:
    weight, offsets, x = stacks(torch.bfloat16)["plain"], offsets_of(1, 0, 1, 0, 0), torch.randn(2, COLUMNS).bfloat16()
    assert isinstance(weight, Tensor)
    refused = {
        "sorted by expert": (x[0], weight, offsets),
        "give a stack": (x, weight[0], offsets),
        "x's dtype and columns": (x.float(), weight, offsets),
        "offsets are torch.int64": (x, weight, offsets.long()),
        r"give int32 \[6\]": (x, weight, offsets[:5]),
    }
    for sentence, arguments in refused.items():
        with pytest.raises(ValueError, match=sentence):
            experts.expert_matmul(*arguments)
    with pytest.raises(ValueError, match="no path 'fast'"):
        experts.expert_matmul(x, weight, offsets, "fast")
    with pytest.raises(ValueError, match="has no tiles"):
        experts.expert_matmul(x.float(), weight.float(), offsets, "tiles")


def test_rows_of_no_expert_stay_as_they_are() -> None:
    """So no tile writes beyond its expert's rows: the interpreter would not notice two programs writing one row."""
    weight, offsets = stacks(torch.bfloat16)["int4"], offsets_of(0, 2, 0, 0, 1)
    x, out = torch.randn(8, COLUMNS).bfloat16(), torch.full((8, ROWS), 7.0, dtype=torch.bfloat16)
    experts._multiply_by_tiles(x, weight, offsets, out, INTERPRETED)
    assert out[3:].eq(7).all()
    assert torch.equal(out[:3], experts.expert_matmul(x[:3], weight, offsets, "tiles"))


def test_every_target_has_cases_to_compile() -> None:
    for where in TARGETS:
        names = [case.name for case in experts.compile_cases(where)]
        assert any("tiles" in name for name in names) == (where.matrix_instruction is not None)


@pytest.mark.slow
@pytest.mark.parametrize("count", (3, 12, 30, 60, 100))
@pytest.mark.parametrize("storage", ("int4", "int8", "plain"))
def test_every_height_of_tiles(storage: str, count: int) -> None:
    weight, offsets = stacks(torch.bfloat16)[storage], offsets_of(count, 0, 2 * count, 1, count)
    x = torch.randn(4 * count + 1, COLUMNS, generator=torch.Generator().manual_seed(5)).bfloat16()
    truth = reference.expert_matmul(x.double(), weight, offsets)
    assert relative_error(experts.expert_matmul(x, weight, offsets, "tiles"), truth) < 3e-3
