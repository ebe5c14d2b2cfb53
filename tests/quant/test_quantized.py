"""A matrix of codes: what it stands for, by a loop over its elements; and what it refuses."""

import pytest
import torch

from qwenfit.quant.quantized import Quantized, Scheme, exact_scales


def made(bits: int = 4, rows: int = 3, columns: int = 64, group: int = 32, symmetric: bool = False) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, columns // group, generator=generator).half().float()
    zeros = torch.randint(0, 2**bits, scales.shape, generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    return Quantized(codes, scales, zeros, bits, group, symmetric)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_stands_for_code_minus_zero_times_scale(bits: int) -> None:
    weight = made(bits)
    matrix = weight.dequantize()
    for row in range(3):
        for column in range(64):
            group = column // 32
            offset = int(weight.codes[row, column]) - int(weight.zeros[row, group])
            assert matrix[row, column] == offset * weight.scales[row, group]
    assert weight.codes.dtype == torch.uint8  # in-place arithmetic of dequantize() has not touched it


def test_scheme_is_what_a_configuration_says() -> None:
    assert made(group=32).scheme == Scheme(4, 32, False)
    assert made(8, group=64, symmetric=True).scheme == Scheme(8, -1, True)
    assert Scheme(4, 128, True).groups(4096) == 32 and Scheme(8, -1, True).groups(4304) == 1
    with pytest.raises(ValueError, match="4304 columns do not fall into groups of 128"):
        Scheme(4, 128, True).groups(4304)
    with pytest.raises(ValueError, match="codes of 4 and 8 bits, not of 3"):
        Scheme(3, 128, True)


def test_what_is_not_of_one_matrix_is_refused() -> None:
    weight = made()
    with pytest.raises(ValueError, match="not of one matrix in groups of 64"):
        Quantized(weight.codes, weight.scales, weight.zeros, 4, 64, False)
    with pytest.raises(ValueError, match="uint8, scales float32"):
        Quantized(weight.codes, weight.scales.half(), weight.zeros, 4, 32, False)


def test_scales_are_rounded_before_and_not_by_the_file() -> None:
    weight = made()
    assert torch.equal(exact_scales(weight, torch.float16).float(), weight.scales)
    with pytest.raises(ValueError, match="4-bit codes are not exact in bfloat16: round them before"):
        exact_scales(weight, torch.bfloat16)
